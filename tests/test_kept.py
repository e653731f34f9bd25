"""Compiled models that are kept: round trips, damage of every kind, the key of a compilation, and the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import secure
from parties.cli import console
from parties.net import secret_files
from parties.served import compiled_files, files
from parties.served.compiled_files import CompiledCache, check_new, is_compiled
from protocols.fixedpoint import FixedPoint
from secure.ckks.compile import encrypt
from secure.deployments import compilation, kept
from secure.deployments.compilation import Compilation
from secure.deployments.deployment import COMPILE, CompileOptions, Deployment, deployments, variants
from secure.deployments.self_test import Accept
from secure.errors import CompiledError, InvalidInput
from secure.models.index import MANIFEST
from secure.models.text import text_inputs
from secure.tasks.embed import Embed
from tests import ckks_server
from tests.test_cli import ROOT, Run, in_words, process, run
from tests.tiny import LENGTH, TEXT, Served, expected, sentences

__all__ = ["run"]  # the fixture

SAMPLES = [{"input": torch.linspace(-2, 2, 8).reshape(2, 4) * (1 + k)} for k in range(3)]


@cache
def small(name: str) -> secure.Compiled:
    """A model for a variant of a deployment, as ``variants`` names them."""
    deployment = variants(Deployment)[name]
    if "network" not in deployment.takes:
        samples, module = [ckks_server.inputs("tiny", k) for k in range(8)], ckks_server.model("tiny")
        return secure.compile(module, samples[0], calibration=samples[1:], deployment=deployment)
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval().requires_grad_(False)
    return secure.compile(module, SAMPLES[0], calibration=SAMPLES, deployment=deployment, network="wan")


def asked(compiled: secure.Compiled) -> dict[str, Any]:
    return ckks_server.inputs("tiny") if "network" not in compiled.deployment.takes else SAMPLES[1]


def is_same(one: secure.Compiled, other: secure.Compiled) -> None:
    """All that a server uses is equal, bit for bit."""
    assert one.program.encoded == other.program.encoded
    assert one.model.weights_digest == other.model.weights_digest
    for name in ("deployment", "options", "about", "made", "tokenizer_json", "cost"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.client_tables.keys() == other.client_tables.keys()
    assert all(torch.equal(one.client_tables[n], other.client_tables[n]) for n in one.client_tables)
    assert one.deployment.choices(one.model) == other.deployment.choices(other.model)


@pytest.mark.parametrize("name", variants(Deployment))
def test_round_trip(name: str, tmp_path: Path) -> None:
    compiled = small(name)
    secure.save_compiled(compiled, tmp_path / "kept")
    again = secure.load_compiled(tmp_path / "kept")
    is_same(compiled, again)
    inputs = asked(compiled)
    assert torch.equal(secure.plain_reference(compiled, inputs), secure.plain_reference(again, inputs))
    for field in dataclasses.fields(compiled.model):  # nothing of a compiled form is forgotten
        if field.name not in ("program", "integers", "client_tables", "schedule"):
            assert getattr(compiled.model, field.name) == getattr(again.model, field.name), field.name
    with secure.insecure_in_process(again) as session:
        answer = session.query(inputs)
    assert float((answer - secure.plain_reference(compiled, inputs)).abs().max()) < 0.02


@pytest.mark.parametrize("embedding", ["one-hot", "client-table"])
def test_a_text_model(embedding: str, directory: Path, tmp_path: Path) -> None:
    compiled = secure.compile_text_model(
        str(directory), LENGTH, embedding=embedding, fixed_point=FixedPoint(fraction_bits=14), calibration=sentences()
    )
    secure.save_compiled(compiled, tmp_path / "kept")
    again = secure.load_compiled(tmp_path / "kept")
    is_same(compiled, again)
    assert again.tokenizer is not None
    assert compiled.tokenizer is not None
    assert (again.tokenizer.pad_id, again.tokenizer.lowercase) == (
        compiled.tokenizer.pad_id,
        compiled.tokenizer.lowercase,
    )
    inputs = text_inputs(again.tokenizer, TEXT, LENGTH)
    assert torch.equal(secure.plain_reference(compiled, inputs), secure.plain_reference(again, inputs))
    with secure.insecure_in_process(again) as session:
        assert float((session.embed([TEXT])[0] - expected(directory, TEXT)).abs().max()) < 0.02


def test_files_are_secret_and_whole(tmp_path: Path) -> None:
    secure.save_compiled(small("two-party"), place := tmp_path / "below" / "kept")
    assert is_compiled(place)
    assert not is_compiled(tmp_path)
    assert place.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in place.iterdir()} == {0o600}
    assert [p.name for p in place.parent.iterdir()] == ["kept"]  # nothing unfinished is left
    with pytest.raises(InvalidInput, match="is already there\nhint: give a new directory"):
        secure.save_compiled(small("two-party"), place)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="is already there"):
        secure.save_compiled(small("two-party"), tmp_path / "link")
    (tmp_path / "empty").mkdir()
    secure.save_compiled(small("two-party"), tmp_path / "empty")
    secure.load_compiled(tmp_path / "empty")


def test_integers_take_no_more_than_they_need(tmp_path: Path) -> None:
    compiled = small("two-party")
    secure.save_compiled(compiled, tmp_path / "kept")
    held = load((tmp_path / "kept" / kept.WEIGHTS).read_bytes())
    for name, value in compiled.model.integers.items():
        known = torch.iinfo(held[name].dtype)
        assert known.min <= int(value.min()) <= int(value.max()) <= known.max
        assert known.bits == 8 or int(value.abs().max()) >= 1 << (known.bits // 2 - 1)


# damage


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory of a compiled model."""
    secure.save_compiled(small("two-party"), tmp_path / "kept")
    return tmp_path / "kept"


def unless_damaged(place: Path) -> secure.Compiled | None:
    try:
        return secure.load_compiled(place)
    except CompiledError as error:
        told = str(error)
    assert "\nhint: " in told
    assert str(place) in told
    return None


def test_every_flipped_byte_is_found(place: Path) -> None:
    """In any file: it is refused, or means the same (a blank of the manifest)."""
    compiled, generator = small("two-party"), random.Random(3)
    for path in sorted(place.iterdir()):
        content = path.read_bytes()
        for at in generator.sample(range(len(content)), min(len(content), 60)):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << generator.randrange(8))]) + content[at + 1 :])
            if (again := unless_damaged(place)) is not None:
                assert path.name == kept.MANIFEST
                is_same(compiled, again)
        path.write_bytes(content)
    secure.load_compiled(place)


def test_cut_and_longer_files(place: Path) -> None:
    for path in sorted(place.iterdir()):
        content = path.read_bytes()
        for other in (b"", content[:-1], content + b"x"):
            path.write_bytes(other)
            with pytest.raises(CompiledError, match=f"{path.name} is damaged"):
                secure.load_compiled(place)
        path.write_bytes(content)


def test_missing_files(place: Path) -> None:
    for path in sorted(place.iterdir()):
        path.rename(away := place.parent / "away")
        with pytest.raises(CompiledError, match=f"kept: {path.name} is missing"):
            secure.load_compiled(place)
        away.rename(path)
    with pytest.raises(CompiledError, match="nowhere is missing"):
        secure.load_compiled(place.parent / "nowhere")


def test_files_of_two_models_do_not_mix(place: Path) -> None:
    secure.save_compiled(small("three-party"), other := place.parent / "other")
    for name in (kept.PROGRAM, kept.WEIGHTS, kept.FACTS):
        shutil.copytree(place, mixed := place.parent / f"mixed-{name}")
        shutil.copy(other / name, mixed / name)
        if (other / name).read_bytes() != (place / name).read_bytes():
            with pytest.raises(CompiledError, match=f"{name} is damaged"):
                secure.load_compiled(mixed)


def rewritten(place: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change files and let the manifest name what is there: a directory that was made wrong, not damaged."""
    files = {path.name: path.read_bytes() for path in place.iterdir() if path.name != kept.MANIFEST}
    change(files)
    named = {n: kept.KeptFile(size=len(f), sha256=hashlib.sha256(f).hexdigest()) for n, f in files.items()}
    manifest = kept.CompiledManifest(format=kept.FORMAT, unseen=secure.__version__, files=named)
    files[kept.MANIFEST] = manifest.model_dump_json().encode()
    for name, payload in files.items():
        (place / name).write_bytes(payload)
        (place / name).chmod(0o600)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[dict[str, bytes]], None]:
    def act(files: dict[str, bytes]) -> None:
        change(held := load(files[kept.WEIGHTS]))
        files[kept.WEIGHTS] = save(held)

    return act


def facts(**other: Any) -> Callable[[dict[str, bytes]], None]:
    def act(files: dict[str, bytes]) -> None:
        files[kept.FACTS] = json.dumps(json.loads(files[kept.FACTS]) | other).encode()

    return act


def sizes(change: Callable[[Any], Any]) -> Callable[[dict[str, bytes]], None]:
    def act(files: dict[str, bytes]) -> None:
        content = json.loads(files[kept.FACTS])
        change(content["sizes"])
        files[kept.FACTS] = json.dumps(content).encode()

    return act


def first_of(found: Any) -> str:
    return str(next(iter(found[0]["tensors"].values())))


def first(held: dict[str, torch.Tensor]) -> str:
    return next(name for name, value in held.items() if value.dim() == 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensors(lambda held: held.pop(first(held))), "a size has no Program or no weights"),
        (tensors(lambda held: held.update(more=torch.zeros(1))), "or they have no size"),
        (sizes(lambda sizes: sizes.clear()), "a size has no Program or no weights"),
        (sizes(lambda sizes: sizes.append(sizes[0])), "a size has no Program or no weights"),
        (sizes(lambda sizes: sizes.extend(sizes[:1] * 40)), "it does not hold together"),
        (sizes(lambda sizes: sizes[0]["tensors"].popitem()), "or they have no size"),
        (sizes(lambda sizes: sizes[0]["tensors"].update(more=first_of(sizes))), "not those that the Program reads"),
        (lambda files: files.update({kept.PROGRAMS[1]: files[kept.PROGRAM]}), "or they have no size"),
        (tensors(lambda held: held.update({first(held): torch.zeros(3, 3, dtype=torch.int8)})), "has the shape"),
        (tensors(lambda held: held.update({n: v.double() for n, v in held.items()})), "is no integers"),
        (tensors(lambda held: held.update({n: v.repeat(7) for n, v in held.items() if v.dim() == 1})), "shape"),
        (lambda files: files.update({kept.WEIGHTS: b"\xff" * 100}), "a header of"),
        (lambda files: files.update({kept.PROGRAM: b"{}"}), "the Program has version None"),
        (lambda files: files.update({kept.FACTS: b"[" * 100_000}), "it does not hold together"),
        (facts(deployment="none"), "unknown deployment 'none'"),
        (facts(compiled_as={"refresh": "True"}), "knows no model compiled as"),
        (facts(network="moon"), "unknown network"),
        (facts(fixed_point={"fraction_bits": 99}), "fraction_bits is an integer"),
        (facts(more=1), "it does not hold together"),
        (sizes(lambda sizes: sizes[0].update(own={"choice": {"network": 1}})), "it does not hold together"),
        (lambda files: files.update({kept.TOKENIZER: b"{}"}), "the tokenizer is not the one of the Program"),
        (lambda files: files.update({"../other": b""}), "may not name"),
        (lambda files: files.pop(kept.FACTS), "does not name 'model.json'"),
    ],
)
def test_what_does_not_hold_together(change: Callable[[dict[str, bytes]], None], message: str, place: Path) -> None:
    rewritten(place, change)
    with pytest.raises(CompiledError, match=message):
        secure.load_compiled(place)


def test_schedules_that_are_none(tmp_path: Path) -> None:
    """Each part of a schedule of ciphertexts is checked against the rest of it and against the Program."""
    secure.save_compiled(small("ckks"), place := tmp_path / "kept")
    content = json.loads((place / kept.FACTS).read_bytes())
    (size,) = content["sizes"]
    header = size["own"]["schedule"]
    last = len(header["nodes"]) - 1
    planted: list[tuple[str, Any]] = [
        *((name, header[name][:-1]) for name in ("nodes", "paths", "outputs", "levels", "stages")),
        ("nodes", [*header["nodes"][:-1], ["dot", [last], [0], ""]]),  # it reads itself
        ("nodes", [*header["nodes"][:-1], ["dot", [0], [len(header["plains"])], ""]]),
        ("nodes", [*header["nodes"][:-1], ["leak", [0], [0], ""]]),
        ("nodes", [["input", [], [], "another"], *header["nodes"][1:]]),
        ("levels", [99, *header["levels"][1:]]),
        ("outputs", [last + 1]),
        ("slots", 7),
        ("plains", header["plains"][:1]),
        ("plains", [*header["plains"], None]),
        ("nodes", 3),
    ]
    for name, value in planted:
        own = size["own"] | {"schedule": header | {name: value}}
        rewritten(place, facts(sizes=[size | {"own": own}]))
        with pytest.raises(CompiledError, match=r"the schedule is none of the Program|does not hold together"):
            secure.load_compiled(place)
    rewritten(place, facts(sizes=[size]))
    secure.load_compiled(place)


def test_other_versions(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("__version__", "9.9.9"), ("FORMAT", 99)):
        with monkeypatch.context() as patch:
            patch.setattr(kept, name, value)
            with pytest.raises(CompiledError, match=rf"by unseen .*, this is .*{value}.*\nhint: compile"):
                secure.load_compiled(place)
    (place / kept.MANIFEST).write_bytes(b"{}")
    with pytest.raises(CompiledError, match="it was compiled by unseen None"):
        secure.load_compiled(place)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes are those of Unix")
def test_what_others_may_have_read_or_put_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in sorted(place.iterdir()):
        for mode in (0o640, 0o604, 0o620):
            path.chmod(mode)
            with pytest.raises(InvalidInput, match=rf"others may read or write .*{path.name} \(mode {mode:04o}\)"):
                secure.load_compiled(place)
        path.chmod(0o600)
        path.rename(place.parent / "elsewhere")
        path.symlink_to(place.parent / "elsewhere")
        with pytest.raises((InvalidInput, CompiledError), match=r"is a link|is damaged"):
            secure.load_compiled(place)
        (place.parent / "elsewhere").replace(path)
    for mode in (0o750, 0o705, 0o711):
        place.chmod(mode)
        with pytest.raises(InvalidInput, match=rf"others may enter .*kept \(mode {mode:04o}\)\nhint: chmod 700"):
            secure.load_compiled(place)
    place.chmod(0o700)
    monkeypatch.setattr(secret_files, "_is_private_group", lambda _: False)
    place.parent.chmod(0o777)
    with pytest.raises(InvalidInput, match="others may write to"):
        secure.load_compiled(place)
    place.parent.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InvalidInput, match="belongs to another user"):
        secure.load_compiled(place)


def test_a_large_file_is_refused_before_it_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (place / kept.WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CompiledError, match=f"weights.safetensors is damaged: it has {1 << 40} bytes"):
        secure.load_compiled(place)
    manifest = json.loads((place / kept.MANIFEST).read_bytes())
    manifest["files"][kept.WEIGHTS]["size"] = 1 << 40
    (place / kept.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CompiledError, match=r"compiled.json is damaged: files\.weights\.safetensors\.size"):
        secure.load_compiled(place)
    (place / kept.MANIFEST).write_bytes(b"x" * (kept.MAXIMUM_MANIFEST + 1))
    with pytest.raises(InvalidInput, match="has more than 16384 bytes"):
        secure.load_compiled(place)


# the key

OTHER: dict[str, Any] = {
    "embedding": "client-table",
    "gelu": "puma",
    "approximations": "puma",
    "fixed_point": FixedPoint(margin_bits=2),
    "network": "wan",
    "answer_bits": 9,
    "checked": False,
}
"""Other values of all options of compiling."""


def other_values(value: Any) -> Any:
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"


def neighbours(compilation: Compilation) -> Iterator[tuple[str, Compilation]]:
    """Compilations that differ from one in a single thing that a user may choose, by its name."""
    replace = dataclasses.replace
    for field in dataclasses.fields(CompileOptions):
        options = replace(compilation.options, **{field.name: OTHER[field.name]})
        yield field.name, replace(compilation, options=options)
    for field in dataclasses.fields(FixedPoint):
        fixed = replace(FixedPoint(), **{field.name: getattr(FixedPoint(), field.name) - 1})
        yield field.name, replace(compilation, options=replace(compilation.options, fixed_point=fixed))
    for found in deployments():
        yield found.name, replace(compilation, deployment=found())
        for name, (known, field) in found.options().items():
            if COMPILE in known.used:
                changed = found(**{name: other_values(field.default)})
                yield f"{found.name} {name}", replace(compilation, deployment=changed)
    yield "length", replace(compilation, lengths=(LENGTH + 1,))
    yield "batch", replace(compilation, batches=(2,))
    yield "two lengths", replace(compilation, lengths=(LENGTH, LENGTH + 1))
    yield "two batches", replace(compilation, batches=(1, 2))
    yield "sentences", replace(compilation, sentences=("One.",))
    yield "two sentences", replace(compilation, sentences=("One.", "Two."))
    yield "one of two", replace(compilation, sentences=("One.Two.",))
    yield "dimensions", replace(compilation, dimensions=4)
    yield "accepted cosine", replace(compilation, accept=Accept(cosine=0.5))
    yield "accepted error", replace(compilation, accept=Accept(error=0.5))
    yield "task", replace(compilation, task="classify")
    yield "revealed", replace(compilation, task="classify", reveal="logits")
    yield "capacity", replace(compilation, capacity=64)
    yield "temperature", replace(compilation, temperature=2.0)
    yield "draft length", replace(compilation, draft_length=4)
    (index := Path(compilation.model).parent / "index").mkdir(exist_ok=True)
    (index / MANIFEST).write_text("{}")
    yield "index", replace(compilation, task="search", index=str(index))
    yield "top", replace(compilation, task="search", index=str(index), top=5)
    yield "clusters", replace(compilation, task="search", index=str(index), clusters=2)
    assert {f.name for f in dataclasses.fields(Compilation)} == {
        *("model", "deployment", "lengths", "sentences", "options", "batches"),
        *(
            "dimensions",
            "accept",
            "task",
            "reveal",
            "capacity",
            "temperature",
            "draft_length",
            "index",
            "top",
            "clusters",
        ),
    }  # another one needs a line here


def left_out(compilation: Compilation) -> list[str]:
    """The names of what may be changed without another key."""
    seen = {compilation.key(): "itself"}
    return [name for name, other in neighbours(compilation) if seen.setdefault(other.key(), name) != name]


def test_the_key_holds_everything_that_a_user_may_choose(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Compilation(str(directory), secure.ThreeParty(), (LENGTH,))
    found = dataclasses.replace(found, deployment=dataclasses.replace(secure.TwoParty(), server="a:1"))
    assert left_out(found) == ["two-party"]  # where a client finds the server changes no model
    everything = Compilation.depends_on
    for planted in ("options", "lengths", "sentences", "compiled_as", "batches", "dimensions", "task", "reveal"):
        with monkeypatch.context() as patch:
            patch.setattr(
                Compilation,
                "depends_on",
                lambda self, planted=planted: {n: v for n, v in everything(self).items() if n != planted},
            )
            assert len(left_out(found)) > 1, planted


def test_the_key_holds_the_models_files(tmp_path: Path, directory: Path) -> None:
    shutil.copytree(directory, model := tmp_path / "model")

    def key(**other: Any) -> str:
        return Compilation(**{"model": str(model), "deployment": secure.TwoParty(), **other}).key()

    keys = [key()]
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        content = path.read_bytes()
        path.write_bytes(content + b"\n")  # JSON still, as the task is read from one
        keys.append(key())
        path.write_bytes(content)
    (model / "below").mkdir()
    (model / "below" / "new.json").write_text("{}")
    keys.append(key())
    (model / "below" / "new.json").rename(model / "new.json")
    keys.append(key())
    (model / "new.json").unlink()
    (model / ".hidden").write_text("no loader reads it")
    assert key() == keys[0] == key(model=f"{model}/")
    (model / "loop").symlink_to(model)
    (model / "broken").symlink_to(tmp_path / "nowhere")
    assert key() == keys[0]
    model.rename(tmp_path / "renamed")  # the Program's label names it
    keys.append(key(model=str(tmp_path / "renamed")))
    keys += [key(model=f"digits{n}") for n in ("", "-2", "-3")]
    assert len(set(keys)) == len(keys)


def test_the_key_holds_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's change of any module, and another version of a package that a model is loaded with."""
    keys = [(found := Compilation("digits", secure.TwoParty())).key()]
    package = tmp_path / "secure"
    (package / "below").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setitem(sys.modules, "planted", SimpleNamespace(__file__=str(package / "__init__.py")))
    monkeypatch.setattr(compilation, "SOURCES", ("planted",))
    for text in ("x = 1", "x = 2", "x = 12"):
        (package / "below" / "module.py").write_text(text)
        compilation._sources.cache_clear()
        keys.append(found.key())
    compilation._sources.cache_clear()
    monkeypatch.undo()
    assert keys[0] == found.key()
    for name in compilation.PACKAGES:
        compilation._version.cache_clear()
        with monkeypatch.context() as patch:
            real = importlib.metadata.version
            patch.setattr(
                importlib.metadata,
                "version",
                lambda asked, name=name, real=real: "0" if asked == name else real(asked),
            )
            keys.append(found.key())
    compilation._version.cache_clear()
    for name in ("__version__", "WIRE_VERSION", "FORMAT"):
        with monkeypatch.context() as patch:
            patch.setattr(compilation, name, "0")
            keys.append(found.key())
    assert len(set(keys)) == len(keys)


# the cache

KEYS = [f"{n:064x}" for n in range(9)]


@pytest.fixture
def cached(tmp_path: Path) -> CompiledCache:
    secure.save_compiled(small("two-party"), tmp_path / "one")
    size = kept.read_manifest((tmp_path / "one" / kept.MANIFEST).read_bytes()).size
    return CompiledCache(tmp_path / "cache" / "compiled", most=int(3.9 * size))


def names(cached: CompiledCache) -> set[str]:
    return {path.name for path in cached.directory.iterdir()}


def test_what_was_used_longest_ago_makes_room(cached: CompiledCache) -> None:
    compiled = small("two-party")
    assert cached.find(KEYS[0]) is None
    for n, key in enumerate(KEYS[:3]):
        size = cached.keep(key, compiled)
        assert size is not None
        assert size == sum(p.stat().st_size for p in cached.place(key).iterdir())
        os.utime(cached.place(key), (n, n))
    assert names(cached) == set(KEYS[:3])
    assert cached.directory.stat().st_mode & 0o777 == 0o700
    found = cached.find(KEYS[0])  # now it is the newest
    assert found is not None
    is_same(compiled, found)
    cached.keep(KEYS[3], compiled)
    assert names(cached) == {KEYS[0], KEYS[2], KEYS[3]}
    (cached.directory / "a-file-of-somebody").write_bytes(bytes(cached.most))  # it is not counted, and not touched
    cached.keep(KEYS[4], compiled)
    assert names(cached) == {"a-file-of-somebody", KEYS[0], KEYS[3], KEYS[4]}
    cached.forget(KEYS[4])
    cached.forget(KEYS[4])
    assert cached.find(KEYS[4]) is None
    assert dataclasses.replace(cached, most=9).keep(KEYS[5], compiled) is None  # larger than all of it
    assert names(cached) == {"a-file-of-somebody", KEYS[0], KEYS[3]}


def test_a_model_that_is_there_already_stays(cached: CompiledCache) -> None:
    """Two servers that start at the same moment both compile, and both keep."""
    assert cached.keep(KEYS[0], small("two-party")) == cached.keep(KEYS[0], small("two-party"))
    assert names(cached) == {KEYS[0]}


@pytest.mark.parametrize("at", range(8))
def test_a_server_that_is_killed_leaves_a_usable_cache(
    at: int, cached: CompiledCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any file, and between the last of them and the renaming."""
    compiled, steps = small("two-party"), list[str]()

    class Killed(BaseException):
        pass

    def step(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **named: Any) -> Any:
            steps.append(name)
            if len(steps) > at:
                raise Killed
            return act(*arguments, **named)

        return stepped

    with monkeypatch.context() as patch:
        patch.setattr(compiled_files, "store", step("store", files.store))
        patch.setattr(compiled_files, "_flush", step("flush", compiled_files._flush))
        patch.setattr(Path, "rename", step("rename", Path.rename))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a process that is killed cleans nothing
        with pytest.raises(Killed) if at < 7 else pytest.MonkeyPatch.context():
            cached.keep(KEYS[0], compiled)
    assert steps[: at + 1] == ["store", "store", "store", "store", "flush", "rename", "flush"][: at + 1]
    found = cached.find(KEYS[0])
    assert (found is not None) == (at >= 6)  # all or nothing
    if found is not None:
        is_same(compiled, found)
    else:
        assert all(name.startswith(".part-") for name in names(cached))
    for n, key in enumerate(KEYS[1:5]):  # and what is left makes room like others
        cached.keep(key, compiled)
        os.utime(cached.place(key), (2e9 + n, 2e9 + n))
    assert names(cached) == set(KEYS[2:5])


def test_damaged_and_open_caches(cached: CompiledCache) -> None:
    cached.keep(KEYS[0], small("two-party"))
    (cached.place(KEYS[0]) / kept.WEIGHTS).write_bytes(b"")
    with pytest.raises(CompiledError, match="is damaged"):
        cached.find(KEYS[0])
    cached.directory.chmod(0o755)
    for act in (lambda: cached.find(KEYS[0]), lambda: cached.keep(KEYS[1], small("two-party"))):
        with pytest.raises(InvalidInput, match=r"others may enter .*compiled \(mode 0755\)"):
            act()


# the commands


@pytest.fixture
def served(run: Run, directory: Path, dealer: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``unseen serve MODEL ARGUMENTS``, which ends as soon as it listens; its lines, and how often it compiled."""
    compilations, really = list[Compilation](), Compilation.run

    def counted(self: Compilation, *told: Any) -> secure.Compiled:
        compilations.append(self)
        return really(self, *told)

    monkeypatch.setattr(Compilation, "run", counted)
    monkeypatch.setattr(secure.Service, "wait_announced", lambda self, tell, drain: (tell(), self.close()))
    common = ["--listen", "127.0.0.1:0", "--dealer", dealer.address, "--same-owner", "--state", str(tmp_path / "state")]

    def serve(model: Path | str, *arguments: str) -> tuple[str, int]:
        before = len(compilations)
        ended = run("serve", str(model), *common, *arguments)
        assert (ended.code, ended.out) == (0, ""), ended.err
        assert "listening on" in ended.err
        return ended.err, len(compilations) - before

    return serve


def digest(told: str) -> str:
    return told.partition("; Program ")[2].partition("\n")[0]


def test_the_second_start_does_not_compile(served: Any, directory: Path, tmp_path: Path) -> None:
    options = ["--length", str(LENGTH), "--fraction-bits", "14"]
    first, compiled = served(directory, *options)
    assert compiled == 1
    place = tmp_path / "cache" / "unseen" / "compiled"
    (entry,) = place.iterdir()
    assert f"unseen serve: kept in {place}, " in first
    for stage in ("loading", "capturing", "observing", "calibrating", "emitting", "encoding", "masking"):
        assert f"unseen serve: {stage}" in first
    again, compiled = served(directory, *options)
    assert compiled == 0
    assert re.search(rf", compiled on [-0-9]+ [:0-9]+ UTC, from {place}\n", again)
    assert len(digest(first)) == 64
    assert digest(first) == digest(again)
    assert "compiling" not in again
    assert served(directory, "--length", str(LENGTH))[1] == 1
    assert served(directory, *options, "--no-keep")[1] == 1
    (entry / kept.WEIGHTS).write_bytes(b"")
    damaged, compiled = served(directory, *options)
    assert compiled == 1
    assert "a kept model is not used: " in damaged
    assert "weights.safetensors is damaged" in damaged
    assert served(directory, *options)[1] == 0
    place.chmod(0o755)
    refused, compiled = served(directory, *options)
    assert compiled == 1
    assert "kept models are not used: others may enter" in refused
    assert "not kept: others may enter" in refused
    assert entry.name not in first + again + damaged + refused  # it would confirm a guess of the weights


def test_a_cache_that_cannot_be_written_stops_no_server(served: Any, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    told, compiled = served(directory, "--length", str(LENGTH))
    assert compiled == 1
    assert "not kept: " in told


def test_the_command_compile(served: Any, run: Run, directory: Path, tmp_path: Path, dealer: Served) -> None:
    place, options = tmp_path / "kept", ["--length", str(LENGTH), "--embedding", "client-table", "--network", "wan"]
    ended = run("compile", str(directory), str(place), *options)
    assert (ended.code, ended.out) == (0, ""), ended.err
    assert f"holds secret weights; serve it with: unseen serve {place}" in ended.err
    told, compiled = served(place)
    assert compiled == 0
    assert digest(told) == digest(ended.err)
    assert "unseen serve: for WAN" in told
    served(place, *options, "--gelu", "cubic")
    for more, message in (
        (["--length", "9"], "--length 9: .* which was compiled with 8"),
        (["--embedding", "one-hot"], "--embedding one-hot: .* with client-table"),
        (["--gelu", "puma"], "--gelu puma: .* holds a compiled model"),
        (["--approximations", "puma"], "--approximations puma: "),
        (["--fraction-bits", "12"], "--fraction-bits 12: .* with 16"),
        (["--network", "lan"], "--network lan: .* with wan"),
        (["--calibration", str(directory / "config.json")], "--calibration .* ranges are fixed"),
    ):
        in_words(run("serve", str(place), *more), message, "compile it again")
    for more in (["--deployment", "ckks"], ["--deployment", "ckks", "--refresh"]):
        in_words(run("serve", str(place), *more), "was compiled for two-party, not for ckks", "compile it again")
    in_words(run("compile", str(directory), str(place)), "is already there", "give a new directory")
    in_words(run("serve", str(place), "--no-keep"), "--no-keep means nothing for models that are compiled", "leave it")
    refused = run("compile", str(directory), str(tmp_path / "x"), "--deployment", "three-party")
    in_words(refused, "nobody serves a whole model under three-party", "share-model")
    (place / kept.WEIGHTS).chmod(0o644)
    in_words(run("serve", str(place)), "others may read or write", "chmod 600")


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        (["--store-bytes", "1"], "--store-bytes means nothing without a store", "--store"),
        (["--store-key-file", "some.key"], "--store-key-file means nothing without a store", "--store"),
        (["--also", "MODEL"], "the model .* is given twice", "--length and --batch several times"),
        (
            ["--deployment", "ckks", "--refresh", "--batch", "2"],
            "a batch whose ciphertexts are refreshed",
            "one by one",
        ),
        ([word for n in range(3, 12) for word in ("--length", str(n))], "a model for 9 lengths", "--length 8 times"),
        (
            ["--deployment", "ckks", "--length", "4", "--length", "8"],
            "one length and one batch are served",
            "one of each",
        ),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(
    run: Run, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str, hint: str
) -> None:
    monkeypatch.setattr(Embed, "load", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.setattr("parties.services.hosting.check", lambda *_, **__: None)
    monkeypatch.setattr("parties.services.hosting.check_owners", lambda *_: None)
    more = [str(directory) if word == "MODEL" else word for word in more]
    line = ["serve", str(directory), "--no-keep", "--state", str(tmp_path), "--same-owner", *more]
    in_words(run(*line), message, hint)


def test_a_place_that_cannot_be_made() -> None:
    """It is tried before a model is compiled."""
    with pytest.raises(InvalidInput, match=r"/proc/none cannot be made: /proc: .*\nhint: give another directory"):
        check_new(Path("/proc/none"))


def test_a_directory_chooses_its_deployment(served: Any, run: Run, tmp_path: Path) -> None:
    secure.save_compiled(small("ckks-refresh"), place := tmp_path / "kept")
    arguments = ["serve", str(place), "--listen", "127.0.0.1:0", "--state", str(tmp_path / "state")]
    for more in ([], ["--deployment", "ckks"], ["--deployment", "ckks", "--refresh"]):
        ended = run(*arguments, *more)
        assert ended.code == 0, ended.err
        assert "unseen serve: encoding the weights" in ended.err
    in_words(
        run(*arguments, "--deployment", "two-party"), "was compiled for ckks, not for two-party", "compile it again"
    )
    in_words(run(*arguments, "--dealer", "a:1"), "was compiled for ckks, not for two-party", "compile it again")
    ended = run(*arguments, "--deployment", "ckks", "--precision", "5")
    in_words(ended, "was compiled with precision 9.0, not 5.0", "compile it again")


def test_every_stage_of_compiling_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[tuple[int, int, str]]()
    Compilation(str(directory), secure.TwoParty(), (LENGTH,)).run(lambda *said: told.append(said))
    stages = list(dict.fromkeys(what for *_, what in told))
    assert stages == [
        *("loading the model", "capturing the model", "observing ranges", "lowering", "calibrating"),
        *("emitting the Program", "encoding the weights", "comparing the compiled model with the original"),
    ]
    for stage in ("observing ranges", "calibrating"):
        counts = [(done, total) for done, total, what in told if what == stage]
        assert counts == [(n, len(counts)) for n in range(len(counts))]
        assert len(counts) > 9
    told.clear()
    samples = [ckks_server.inputs("tiny", k) for k in range(8)]
    encrypt(ckks_server.model("tiny"), samples[0], calibration=samples[1:], told=lambda *said: told.append(said))
    stages = list(dict.fromkeys(what for *_, what in told))
    assert stages[1:5] == ["observing ranges", "lowering", "calibrating", "packing for rings of degree 8192"]
    assert stages[5].startswith("choosing the scale of rings of degree 8192, ")


def test_progress_is_a_line_a_stage_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("parties.cli.console.time.monotonic", lambda: clock[0])
    with console.stages("serve") as told:
        for n in range(50):
            told(n, 50, "calibrating")
            clock[0] += console.STAGE / 10 + 1e-9
        told(0, 0, "encoding")
    assert capsys.readouterr().err.splitlines() == [
        "unseen serve: calibrating ...",
        *(f"unseen serve: calibrating, {n} of 50 ..." for n in (10, 20, 30, 40)),
        "unseen serve: encoding ...",
    ]


@pytest.mark.slow
def test_a_kept_model_needs_no_model_packages(tmp_path: Path, directory: Path) -> None:
    """The machine that serves a compiled directory may lack them, and does not wait for them."""
    compiled = secure.compile_text_model(str(directory), LENGTH, calibration=sentences())
    secure.save_compiled(compiled, tmp_path / "kept")
    code = "import sys, secure; secure.load_compiled(sys.argv[1]); print('transformers' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "kept")]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "False\n"


@pytest.mark.slow
def test_a_process_that_restarts_serves_the_same(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of a server, one after another, and a client that asks both."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with process(tmp_path / "dealer", "dealer", "--listen", "127.0.0.1:0") as dealer:
        arguments = ["serve", str(directory), "--length", str(LENGTH), "--listen", "127.0.0.1:0", "--same-owner"]
        arguments += ["--dealer", dealer.address, "--state", str(tmp_path / "state")]
        answers = []
        for name in ("first", "second"):
            with process(tmp_path / name, *arguments) as server:
                at = secure.TwoParty(server=server.address, dealer=dealer.address)
                with secure.connect(at, cache=tmp_path / "files") as session:
                    answers += session.embed([TEXT])
                assert server.end() == 0
    assert float((answers[0] - answers[1]).abs().max()) < 1e-3  # masks differ, and with them the last bits
    assert ", from " in (tmp_path / "second").read_text()
    assert len(list((tmp_path / "files").iterdir())) == 1  # the masked weights are the same too

"""Weights that are narrow, made when they are read, and mapped: the same answers, in memory that does not grow."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secure
from parties.limits import memory
from parties.three_party.shared_model import WEIGHTS, load_share, share_model
from protocols import madd52, matmul, narrow, ring
from protocols.matmul import Matrix
from protocols.narrow import NARROW, encode, is_finite, narrowed, product_of_rows, same
from protocols.three_party.weights import PublicWeights
from protocols.weights import ServerWeights
from secure.capture.tensor_files import map_file, map_tensors, write_tensors
from secure.deployments import kept
from secure.errors import InvalidInput, ShareError
from secure.lowering import made as made_module
from secure.lowering.made import Chosen, Made, Room, alike, unchanged
from secure.models import checkpoints
from secure.models.checkpoints import large_bytes, load_checkpoint
from secure.mpc.arithmetic import tied
from secure.mpc.budget import load_of
from tests.test_generator import PROMPTS, continued, decoder
from tests.three_parties import running

transformers = pytest.importorskip("transformers")

PUBLIC = secure.ThreeParty(public_weights=True)
SHORT, CAPACITY = 4, 8


def words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 62), 1 << 62, shape, generator=generator) * 2 + 1


def weights(*shape: int, kind: torch.dtype = torch.int16) -> Tensor:
    known = torch.iinfo(kind)
    return torch.randint(known.min, known.max + 1, shape, generator=torch.Generator().manual_seed(1)).to(kind)


# products


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("bits", [17, 52, 53, 64])
@pytest.mark.parametrize("shape", [(1, 64, 40), (8, 130, 1000), (17, 96, 33), (40, 64, 30), (3, 1, 1), (2, 0, 5)])
@pytest.mark.parametrize("native", [True, False])
def test_products_read_narrow_matrices(
    kind: torch.dtype, bits: int, shape: tuple[int, ...], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, inner, columns = shape
    if not native:
        monkeypatch.setattr(matmul, "native", lambda: False)
        monkeypatch.setattr(matmul, "_MOST_PACKED", 0)
    monkeypatch.setattr(narrow, "BLOCK", 1 << 9)
    x, w = words(rows, inner), weights(inner, columns, kind=kind)
    expected = ring.reduce((x[:, :, None] * w.to(torch.int64)).sum(1), bits)
    for signed in (True, False):
        assert Matrix(w, bits, signed=signed).times(x).equal(expected)
    assert Matrix(w, bits, signed=True).times(x.reshape(rows, 1, inner)).equal(expected.reshape(rows, 1, columns))
    if rows:
        assert Matrix(w, bits, signed=True).times(x[0]).equal(expected[0])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_transposed_matrices_are_read_where_they_lie(rows: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(matmul, "native", lambda: False)
        monkeypatch.setattr(matmul, "_MOST_PACKED", 0)
    x = words(rows, 50)
    for w in (weights(61, 50).T, weights(61, 100)[:, ::2].T):  # the second one is copied
        held, expected = Matrix(w, 50, signed=True), (x[:, :, None] * w.to(torch.int64)).sum(1)
        assert held.times(x).equal(ring.reduce(expected, 50))
    if native and not matmul.native():
        return  # this processor's kernel packs what is small
    assert isinstance(held._value, Tensor)
    lies = Matrix(weights(61, 50).T, 50, signed=True)._value
    assert isinstance(lies, Tensor)
    assert not lies.is_contiguous()


def test_a_narrow_matrix_is_not_copied() -> None:
    w = weights(40, 30)
    held = ServerWeights({"w": w}).packed("w", 64)
    if matmul.native():
        assert not held.own
        assert isinstance(held._value, Tensor)
        assert held._value.data_ptr() == w.data_ptr()
    meta = Matrix(w.to("meta"), 40, signed=True).times(words(2, 40).to("meta"))
    assert (meta.shape, meta.dtype) == ((2, 30), torch.int64)


@pytest.mark.parametrize(
    ("x", "w"), [(words(2, 3), weights(4, 2)), (words(2, 4).to(torch.int32), weights(4, 2)), (words(3), weights(3, 2))]
)
def test_products_check_their_operands(x: Tensor, w: Tensor) -> None:
    with pytest.raises(ValueError, match="no product of"):
        product_of_rows(x, w)
    with pytest.raises(ValueError, match="no product of"):
        madd52.matmul(x, w.to(torch.float32))


# encoding


@settings(deadline=None)  # it is compiled first
@given(st.integers(0, 40), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 2**32))
def test_encoding_is_that_of_the_ring(fraction: int, rows: int, columns: int, turned: bool, seed: int) -> None:
    x = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.T if turned else x
    found, expected = encode(x, fraction), ring.encode(x, fraction)
    assert found.to(torch.int64).equal(expected)
    assert found.dtype == narrowed(expected).dtype


@pytest.mark.parametrize(("value", "kind"), [(127, torch.int8), (-129, torch.int16), (1 << 15, torch.int32)])
def test_the_narrowest_type(value: int, kind: torch.dtype) -> None:
    for shape in ((1, 1), (1,), ()):
        assert encode(torch.full(shape, float(value), dtype=torch.float64), 0).dtype == kind
    assert narrowed(torch.tensor([value])).dtype == kind
    assert narrowed(torch.tensor([1 << 40])).dtype == torch.int64
    assert narrowed(torch.tensor([0.5])).dtype == torch.float32
    assert not same(torch.tensor([1]), torch.tensor([1], dtype=torch.int8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_no_numbers_are_seen(bad: float, kind: torch.dtype) -> None:
    x = torch.randn(50).to(kind)
    assert is_finite(x)
    x[17] = bad
    assert not is_finite(x)
    assert is_finite(torch.empty(0, dtype=kind))


# files


def file_of(tensors: Mapping[str, Tensor]) -> bytes:
    file = io.BytesIO()
    write_tensors(file, list(tensors), iter(tensors.items()))
    return file.getvalue()


TENSORS = {
    "odd": torch.arange(3, dtype=torch.int8),
    "wide": words(5, 3),
    "none": torch.empty((0, 4), dtype=torch.int16),
    "some": weights(7, 3),
    "turned": weights(8, 4).T,
    "half": torch.randn(4).half(),
    "one": torch.tensor(2.5),
}


def test_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load

    content = file_of(TENSORS)
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file:
        mapped = map_tensors(map_file(file), most=1 << 20)
    for found in (load(content), mapped, map_tensors(content, most=1 << 20)):
        assert found.keys() == TENSORS.keys()
        assert all(same(found[name], value) for name, value in TENSORS.items())
    assert map_tensors(file_of({}), most=1 << 10) == {}
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        assert map_file(file) == b""
    with pytest.raises(AssertionError, match="not those whose names"):
        write_tensors(io.BytesIO(), ["a"], [("b", torch.zeros(1))])


def changed(change: Any) -> bytes:
    content = file_of(TENSORS)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + content[8 + size :]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        file_of(TENSORS)[:-1],
        file_of(TENSORS) + b"\0",
        changed(lambda h: h.pop("wide")),
        changed(lambda h: h["wide"].update(shape=[5, 4])),
        changed(lambda h: h["wide"].update(shape=[-5, -3])),
        changed(lambda h: h["wide"].update(shape=5)),
        changed(lambda h: h["wide"].update(dtype="I3")),
        changed(lambda h: h["wide"].update(data_offsets=[0, 1 << 60])),
        changed(lambda h: h["wide"].update(data_offsets=[0])),
        changed(lambda h: h.update(more=[])),
        (2).to_bytes(8, "little") + b"[]",
        (1).to_bytes(8, "little") + b"{",
    ],
)
def test_files_that_do_not_hold_together(content: bytes) -> None:
    with pytest.raises(InvalidInput):
        map_tensors(content, most=1 << 20)


def test_a_header_is_bounded() -> None:
    with pytest.raises(InvalidInput, match="a header of"):
        map_tensors(file_of(TENSORS), most=100)


# tensors that are made


def test_what_has_no_room_is_made_again() -> None:
    made, calls = Made[str](Room(20)), list[str]()

    def recipe(name: str) -> Tensor:
        calls.append(name)
        return torch.zeros(4)

    for name in "ab":
        made.add(name, lambda name=name: recipe(name))  # type: ignore[misc]
    assert (list(made), len(made), "a" in made, "c" in made) == (["a", "b"], 2, True, False)
    assert not calls
    made.filled()
    for _ in range(2):
        assert made["a"].equal(made["b"])
    assert calls == ["a", "b", "b", "b"]
    one, other = Chosen({"a": made}), Chosen({"a": made, "b": made})
    assert alike(one, other, "a")
    assert calls == ["a", "b", "b", "b"]  # nothing was made for that
    assert alike(one, {"a": torch.zeros(4)}, "a")
    assert not alike(one, {"a": torch.ones(4)}, "a")
    assert (list(other), len(other), "b" in other, "c" in other) == (["a", "b"], 2, True, False)


def test_a_weight_that_changes_meanwhile_is_noticed() -> None:
    weight = torch.zeros(3)
    recipe = unchanged("w", weight.detach(), lambda value: value + 1)
    assert recipe().equal(torch.ones(3))
    weight.add_(1)
    with pytest.raises(InvalidInput, match="'w' was changed after the model was compiled"):
        recipe()


def test_a_model_without_room_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    inputs = {"input": torch.randn(3, 8)}
    one = secure.compile(model, inputs)
    monkeypatch.setattr(made_module, "KEPT", 0)
    other = secure.compile(model, inputs)
    assert one.program.digest == other.program.digest
    assert one.model.weights_digest == other.model.weights_digest
    assert all(same(value, other.model.integers[name]) for name, value in one.model.integers.items())
    assert all(value.dtype in NARROW for value in one.model.integers.values())
    with secure.insecure_in_process(other) as session:
        torch.testing.assert_close(session.query(inputs), model(**inputs).double(), atol=2e-3, rtol=0)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(InvalidInput, match="was changed after the model was compiled"):
        _ = other.model.weights_digest


@cache
def rounded(name: str) -> Any:
    """A decoder whose weights are those of float16, in float32."""
    model = copy.deepcopy(decoder(name))
    with torch.no_grad():
        for parameter in model.parameters():  # not what rotary positions are made of
            parameter.copy_(parameter.half())
    return model


@cache
def held(name: str = "llama") -> secure.Compiled:
    return build(rounded(name))


def build(model: torch.nn.Module) -> secure.Compiled:
    texts = [[1, 5, 9, 2, 7, 3, 4, 8]]
    return secure.compile_generator(model, prompt=SHORT, capacity=CAPACITY, calibration=texts, deployment=PUBLIC)


# checkpoints


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("checkpoint")
    copy.deepcopy(rounded("llama")).half().save_pretrained(where, max_shard_size="20KB")
    return where


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MAPPED", 0)


@pytest.mark.usefixtures("mapped")
def test_large_checkpoints_are_mapped(directory: Path) -> None:
    found, whole = load_checkpoint(directory, "AutoModelForCausalLM"), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "MAPPED", 1 << 40)
        whole = load_checkpoint(directory, "AutoModelForCausalLM")
        assert large_bytes(directory) == (0, 0)
    state, expected = found.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    assert all(value.dtype == torch.float16 and value.float().equal(expected[name]) for name, value in state.items())
    own, taken = large_bytes(directory)
    assert own > 0
    assert taken == sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    one = build(found)
    assert [size.program.digest for size in one.sizes] == [size.program.digest for size in held().sizes]
    assert one.model.weights_digest == held().model.weights_digest
    assert all(parameter.dtype == torch.float16 for parameter in found.parameters())  # as before


@pytest.mark.usefixtures("mapped")
def test_tied_weights_of_a_mapped_checkpoint_are_one(tmp_path: Path) -> None:
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    made.save_pretrained(tmp_path)
    found: Any = load_checkpoint(tmp_path, "AutoModelForCausalLM")
    assert found.lm_head.weight is found.transformer.wte.weight
    assert all(value.equal(made.state_dict()[name]) for name, value in found.state_dict().items())


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("kind", ["lacks", "has", "shape"])
def test_other_mapped_checkpoints_are_refused(directory: Path, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = {n: v for path in directory.glob("*.safetensors") for n, v in load_file(path).items()}
    match kind:
        case "lacks":
            tensors.pop("model.norm.weight")
        case "has":
            tensors["other"] = torch.zeros(2)
        case _:
            tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InvalidInput, match={"lacks": "lacks model", "has": "has other", "shape": r"of shape \(5,\)"}[kind]
    ):
        load_checkpoint(tmp_path, "AutoModelForCausalLM")


# three parties


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("shares")
    share_model(held(), where)
    return where


def test_parties_of_public_weights_map_one_file(shares: Path) -> None:
    files = [shares / f"party-{party}" / WEIGHTS for party in range(2)]
    assert files[0].samefile(files[1])
    assert not (shares / "party-2" / WEIGHTS).exists()
    assert files[0].stat().st_mode & 0o777 == 0o600
    elements = sum(value.numel() for value in held().model.integers.values())
    assert files[0].stat().st_size < 2.2 * elements + 8192
    with running(shares) as three, three.dial() as session:
        assert list(session.generate(PROMPTS[0], 2, ignore_end=True)) == continued(rounded("llama"), PROMPTS[0], 2)


def test_a_tied_table_and_head_are_there_once(tmp_path: Path) -> None:
    compiled = held("gpt2")
    (head, table), *more = tied(compiled.program.weight_shapes).items()
    assert not more
    assert head.startswith("model.transformer.wte.weight.T@")
    integers = compiled.model.integers
    assert integers[head].data_ptr() == integers[table].data_ptr()
    share_model(compiled, tmp_path)
    with (tmp_path / "party-0" / WEIGHTS).open("rb") as file:
        assert map_tensors(map_file(file), most=1 << 20).keys() == {*integers} - {head}
    with running(tmp_path) as three, three.dial() as session:
        assert list(session.generate(PROMPTS[0], 2, ignore_end=True)) == continued(rounded("gpt2"), PROMPTS[0], 2)
    secure.save_compiled(compiled, tmp_path / "kept")
    with (tmp_path / "kept" / kept.WEIGHTS).open("rb") as file:
        assert map_tensors(map_file(file), most=1 << 20).keys() == {*integers} - {head}
    loaded = secure.load_compiled(tmp_path / "kept")
    assert all(same(value, loaded.model.integers[name]) for name, value in integers.items())
    assert loaded.model.weights_digest == compiled.model.weights_digest


def test_a_file_system_without_links(shares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr(os, "link", refused)
    share_model(held(), tmp_path)
    one, other = (tmp_path / f"party-{party}" / WEIGHTS for party in range(2))
    assert not one.samefile(other)
    assert one.read_bytes() == other.read_bytes()
    load_share(tmp_path / "party-1")


def test_memory_is_said_and_bounded(shares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = load_share(shares / "party-0")
    own, mapped = share.memory
    assert mapped > 0
    assert load_share(shares / "party-2").memory[1] == 0
    said = memory.memory_said(own, mapped, "party 0", "more")
    assert "of memory and" in said
    assert "of mapped weights" in said
    monkeypatch.setattr(memory, "available_memory", lambda: own + mapped // 2)
    assert "the rest is read from the disk" in memory.memory_said(own, mapped, "party 0", "more")
    monkeypatch.setattr(memory, "available_memory", lambda: own - 1)
    with pytest.raises(InvalidInput, match=r"party 0 takes about .* GB to spare\nhint: fewer tokens"):
        load_share(shares / "party-0")


def test_a_client_of_three_parties_holds_no_weights() -> None:
    program = held().program
    whole, apart = (load_of(program.circuit, program.weight_shapes, weights=weights) for weights in (True, False))
    assert apart.weights == 0
    assert apart.memory < whole.memory
    assert apart.products < whole.products


def anonymous() -> int:
    """Bytes of this process's own memory."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == "RssAnon:") << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what memory is a process's own")
def test_no_memory_grows_with_mapped_weights(tmp_path: Path) -> None:
    size, count = 2176, 14  # 133 MB, of matrices that no kernel packs
    assert size**2 > matmul._MOST_PACKED
    path = tmp_path / "weights"
    names = [str(n) for n in range(count)]
    with path.open("wb") as file:
        write_tensors(file, names, ((name, weights(size, size)) for name in names))
    gc.collect()
    before = anonymous()
    with path.open("rb") as file:
        found = map_tensors(map_file(file), most=1 << 16)
    held, x = PublicWeights(0, found), words(8, size)
    for name in names:
        for bits in (48, 64):
            held.multiply(x, name, bits, diagonal=False)
    assert anonymous() - before < path.stat().st_size / 4


def test_damaged_weights_are_refused(shares: Path, tmp_path: Path) -> None:
    content = (shares / "party-0" / WEIGHTS).read_bytes()
    damaged = bytearray(content)
    damaged[-1] ^= 1
    where = tmp_path / "party-0"
    where.mkdir(mode=0o700)
    for path in (shares / "party-0").iterdir():
        (where / path.name).write_bytes(path.read_bytes() if path.name != WEIGHTS else bytes(damaged))
        (where / path.name).chmod(0o600)
    with pytest.raises(ShareError, match="is damaged"):
        load_share(where)


def test_numbers_of_a_seed_are_those_of_the_narrow_ones() -> None:
    """Weights as they were held before, in 64 bits, give the same shares."""
    model = held().model
    wide = replace(model, integers={name: value.to(torch.int64) for name, value in model.integers.items()})
    assert wide.weights_digest == model.weights_digest
    name = next(name for name, value in model.integers.items() if value.dim() == 2)
    x = torch.from_numpy(np.arange(3 * len(model.integers[name])).reshape(3, -1))
    assert (
        ServerWeights(wide.integers)
        .multiply(x, name, 60, diagonal=False)
        .equal(ServerWeights(model.integers).multiply(x, name, 60, diagonal=False))
    )

"""Once-per-model files and seeds on disk, and what never gets into a log."""

from __future__ import annotations

import base64
import dataclasses
import errno
import hmac
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.proto import unseen_pb2 as pb
from parties.served import described, files
from parties.served.files import MASKED_WEIGHTS, describe, fetch, store, unpack_masked
from parties.two_party import client as client_module
from parties.two_party import server as server_module
from parties.two_party.keys import model_name
from parties.two_party.masked_model import guarded_root_seed, load_root_seed, mask_model
from protocols.prg import derive_key, derive_seed
from secure.capture.documents import HEADER
from secure.errors import DownloadError, Error, InvalidInput
from secure.lowering.client_inputs import tables_label
from secure.models.served_tokenizer import load_tokenizer
from tests.tiny import TEXT, WORDS, Raw, Ready, Served, call, dealing, dial, serving, wait_until, works

# files


def test_the_cache_spares_the_download(
    server: Served, dealer: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, real = list[str](), files.fetch

    def fetch_counted(file: pb.File, download: Callable[[str], Iterable[bytes]], *limits: Any) -> bytes:
        def counted(sha256: str) -> Iterable[bytes]:
            fetched.append(sha256)
            return download(sha256)

        return real(file, counted, *limits)

    monkeypatch.setattr(described, "fetch", fetch_counted)

    def again() -> None:
        with call(server.address, dealer.address, cache=tmp_path / "cache") as connection:
            connection.embed([TEXT])

    again()
    again()
    assert len(fetched) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == f"{fetched[0]}.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again()
    assert len(fetched) == 2
    assert file.read_bytes() == good
    file.write_bytes(b"")
    again()
    assert len(fetched) == 3


def test_the_cache_directory_of_the_user(
    server: Served, dealer: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    call(server.address, dealer.address, cache=True).close()
    assert len(list((tmp_path / "unseen").iterdir())) == 1
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written"):
        call(server.address, dealer.address, cache=tmp_path / "file" / "below")


def test_a_cache_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those files stay that were used last; what is no file of the cache is not touched."""
    monkeypatch.setattr(files, "MAXIMUM_CACHE", 1000)
    (tmp_path / "mine.safetensors").write_bytes(bytes(5000))
    (tmp_path / ".part-left").write_bytes(bytes(300))  # by a process that was killed
    payloads = [bytes([number]) * 300 for number in range(5)]
    times = iter(range(1_000_000_000, 2_000_000_000, 100))

    def use(payload: bytes) -> bool:
        """True if it was in the cache."""
        downloads = list[str]()

        def download(sha256: str) -> list[bytes]:
            downloads.append(sha256)
            return [payload]

        file = describe("masked-weights", payload)
        assert fetch(file, download, tmp_path, 10_000) == payload
        if (path := tmp_path / f"{file.sha256}.safetensors").exists():
            os.utime(path, (at := next(times), at))
        return not downloads

    os.utime(tmp_path / ".part-left", (1, 1))
    assert [use(payload) for payload in payloads[:3]] == [False] * 3
    assert not (tmp_path / ".part-left").exists()
    assert use(payloads[0])  # used again, so 1 is now the oldest
    assert not use(payloads[3])
    assert [use(payloads[number]) for number in (0, 2, 3, 1)] == [True, True, True, False]
    assert not use(bytes(1001))  # larger than the whole cache: it is not kept, and pushes nothing out
    assert not use(bytes(1001))
    assert use(payloads[1])
    kept = [path for path in tmp_path.iterdir() if path.name != "mine.safetensors"]
    assert sum(path.stat().st_size for path in kept) <= 1000
    assert (tmp_path / "mine.safetensors").stat().st_size == 5000


@pytest.mark.parametrize("damage", [lambda b: b[:-1] + b"x", lambda b: b[:-1], lambda b: b + b"x", lambda b: b""])
def test_a_damaged_download_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    payload = bytes(range(200))
    with pytest.raises(DownloadError, match="masked-weights: what arrived is not the announced file"):
        fetch(describe("masked-weights", payload), lambda _: [damage(payload)], tmp_path, 200)
    assert list(tmp_path.iterdir()) == []


def test_a_download_without_end_stops(tmp_path: Path) -> None:
    def forever(_: str) -> Iterator[bytes]:
        while True:
            yield bytes(100)

    with pytest.raises(DownloadError, match="of 3 bytes"):
        fetch(describe("masked-weights", b"abc"), forever, None, 3)


def test_more_than_the_program_needs_is_not_downloaded(tmp_path: Path) -> None:
    asked = list[str]()

    def download(sha256: str) -> list[bytes]:
        asked.append(sha256)
        return [b"abcd"]

    file = describe("masked-weights", b"abcd")
    with pytest.raises(DownloadError, match="size of 4 bytes is impossible, the Program needs 3 at most"):
        fetch(file, download, tmp_path, 3)
    file.size = files.MAXIMUM_FILE + 1
    with pytest.raises(DownloadError, match=f"is impossible, the Program needs {files.MAXIMUM_FILE} at most"):
        fetch(file, download, tmp_path, 1 << 60)
    assert asked == []
    file.size = 4
    assert fetch(file, download, tmp_path, 4) == b"abcd"
    assert len(asked) == 1


def test_the_most_bytes_of_a_file(model: Ready) -> None:
    """No more than a header's allowance for each tensor beyond whole words for each weight."""
    payload, program = model.masked.files[MASKED_WEIGHTS], model.program
    most = files.masked_size(program.weight_rings, program.weight_shapes)
    words = 8 * sum(math.prod(shape) for shape in program.weight_shapes.values())
    assert len(payload) <= most <= words + (HEADER + 80) * (len(program.weight_rings) + 1)
    for names in (["t"], ["é" * 300, '"\\' * 20, "\x01" * 9], [str(n) for n in range(500)]):
        tables = {name: torch.zeros(7, 3) for name in names}
        assert len(save(tables)) <= files.tables_size(dict.fromkeys(names, (7, 3)))


@pytest.mark.parametrize(
    "other", [torch.zeros(6, 3), torch.zeros(7, 4), torch.zeros(21), torch.zeros(7, 3, dtype=torch.float64), None]
)
def test_token_tables_that_are_none(other: torch.Tensor | None) -> None:
    good = {"t": torch.ones(7, 3)}
    assert files.unpack_tables(save(good), {"t": (7, 3)}, tables_label(good))["t"].equal(good["t"])
    with pytest.raises(DownloadError, match="the token table 't' of 7 rows of 3 numbers did not come"):
        files.unpack_tables(
            save({"u": good["t"]} if other is None else {"t": other}), {"t": (7, 3)}, tables_label(good)
        )


def test_masked_weights_that_are_none(model: Ready) -> None:
    program, payload = model.program, model.masked.files[MASKED_WEIGHTS]
    for bad in (b"", b"\xff" * 64, payload[:100]):
        with pytest.raises(DownloadError, match=r"^masked-weights: (a header of|not a safetensors file)"):
            unpack_masked(bad, program.weight_rings, program.weight_shapes)
    rings = dict(program.weight_rings)
    held, (name, bits) = load(payload), next(iter(rings.items()))
    short = save({**held, f"{name}/{bits}": held[f"{name}/{bits}"][1:].clone()})
    with pytest.raises(DownloadError, match="the Program prescribes"):
        unpack_masked(short, rings, program.weight_shapes)
    twice = {key: value for key, value in held.items() if not key.startswith(next(reversed(rings)))}
    wrong = [
        save({**twice, f"{name}/{bits + 1}": held[f"{name}/{bits}"].clone()}),  # as many, but one weight twice
        *(save({**twice, f"{next(reversed(rings))}/{said}": torch.zeros(1)}) for said in ("65", "07", "", "-1")),
        save({**twice, next(reversed(rings)): torch.zeros(1)}),
    ]
    for bad in wrong:
        with pytest.raises(DownloadError, match="not those that the Program reads"):
            unpack_masked(bad, rings, program.weight_shapes)
    with pytest.raises(DownloadError, match="not those that the Program reads"):  # fewer bits than the Program needs
        unpack_masked(payload, {**rings, name: bits + 1}, program.weight_shapes)
    more = unpack_masked(payload, {**rings, name: 8}, program.weight_shapes)  # for another Program of the same weights
    assert more[name].equal(unpack_masked(payload, rings, program.weight_shapes)[name])
    rings.popitem()
    with pytest.raises(DownloadError, match="not those that the Program reads"):
        unpack_masked(payload, rings, program.weight_shapes)


def test_the_mask_seed_is_kept_and_secret(directory: Path, model: Ready, tmp_path: Path) -> None:
    digest = model.compiled.model.weights_digest
    state = tmp_path / "new" / "state"
    seed = load_root_seed(state, digest)
    (file,) = state.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert load_root_seed(state, digest) == seed == file.read_bytes()
    assert len(seed) == 32
    assert load_root_seed(state, "0" * 64) != seed
    again = mask_model(model.compiled.model, state)
    assert again.mask_seed == derive_seed(seed, "mask", digest) != seed
    assert again.files != model.masked.files  # another seed, another D
    # others learn a name that the seed determines: a digest of the weights would confirm a guess
    assert len({digest, again.weights_digest, model.weights_digest}) == 3
    same = mask_model(model.compiled.model, state)
    assert same.files == again.files
    file.write_bytes(seed[:5])
    with pytest.raises(Error, match="is damaged\nhint: delete it"):
        load_root_seed(state, digest)


def test_the_public_digest_tells_the_dealer_nothing(
    directory: Path, model: Ready, dealer: Served, server: Served, state: Path
) -> None:
    """Who knows the mask seed, as the dealer does, cannot check a guess of the weights against their public name."""
    known = [m for m in dealer.service._models.values() if m.weights_digest == model.weights_digest]
    assert [m.mask_seed for m in known] == [model.masked.mask_seed]
    plain, root = model.compiled.model.weights_digest, load_root_seed(state, model.compiled.model.weights_digest)
    seed = model.masked.mask_seed
    for key in (seed, derive_seed(seed, "digest"), derive_seed(seed, "mask"), derive_key(seed, "digest"), b""):
        for guess in (plain.encode(), bytes.fromhex(plain)):
            assert hmac.digest(key, guess, "sha256").hex() != model.weights_digest
        if key:
            assert derive_seed(key, "mask", plain) != seed
    assert plain != model.weights_digest == model_name(seed)
    # it takes the root, which the server alone keeps, so that its clients' copies stay valid over restarts
    assert seed == derive_seed(root, "mask", plain)
    assert mask_model(model.compiled.model, state).files == model.masked.files


def test_old_masks_are_renewed(model: Ready, tmp_path: Path) -> None:
    """At a start after so many days, with another name, another B and another D."""
    compiled, day = model.compiled.model, 86400
    first = mask_model(compiled, tmp_path, 90)
    (file,) = tmp_path.iterdir()
    assert mask_model(compiled, tmp_path, 90).files == first.files
    os.utime(file, (time.time() - 91 * day,) * 2)
    assert mask_model(compiled, tmp_path).files == first.files
    assert mask_model(compiled, tmp_path, 92).files == first.files
    second = mask_model(compiled, tmp_path, 90)
    assert second.files != first.files
    assert second.mask_seed != first.mask_seed
    assert second.weights_digest != first.weights_digest
    assert mask_model(compiled, tmp_path, 90).files == second.files
    assert list(tmp_path.iterdir()) == [file]


def test_a_seed_file_that_was_copied_masks_other_weights_otherwise(model: Ready, tmp_path: Path) -> None:
    """Two D under one B would show the difference of the weights."""
    name, value = next(iter(model.compiled.model.integers.items()))
    other = dataclasses.replace(model.compiled.model, integers={**model.compiled.model.integers, name: value + 1})
    ours = mask_model(model.compiled.model, tmp_path)
    seed = load_root_seed(tmp_path, model.compiled.model.weights_digest)
    store(tmp_path / f"weight-mask-{other.weights_digest}.seed", seed)
    assert mask_model(other, tmp_path).mask_seed != ours.mask_seed


def test_servers_that_start_together_agree_on_the_seed(tmp_path: Path) -> None:
    seeds, barrier = list[bytes](), threading.Barrier(8)

    def run() -> None:
        barrier.wait()
        seeds.append(load_root_seed(tmp_path, "0" * 64))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seeds) == 8
    assert len(set(seeds)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_other_weights_get_another_seed(directory: Path, state: Path, model: Ready) -> None:
    name, value = next(iter(model.compiled.model.integers.items()))
    other = dataclasses.replace(model.compiled.model, integers={**model.compiled.model.integers, name: value + 1})
    served = mask_model(other, state)
    assert served.weights_digest != model.weights_digest
    assert served.mask_seed != model.masked.mask_seed
    assert served.files != model.masked.files


def test_two_servers_with_two_seeds_at_one_dealer(
    directory: Path, model: Ready, server: Served, dealer: Served, tmp_path: Path
) -> None:
    """Each has its own mask under its own name, which follows from the mask's seed: nobody else can take it."""
    second = mask_model(model.compiled.model, tmp_path)
    with serving(Ready(model.compiled, second), dealer.address) as other:
        works(other, dealer)
        works(server, dealer)
    assert second.weights_digest == model_name(second.mask_seed) != model.weights_digest


# secrets


def bug(*_: object) -> None:
    raise ZeroDivisionError("division")


def test_nothing_secret_is_logged_or_shown(
    model: Ready,
    directory: Path,
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    root = load_root_seed(state, model.compiled.model.weights_digest)
    seeds, shown = [model.masked.mask_seed, root, derive_seed(root, "digest")], list[str]()
    for module in (client_module, server_module):
        real = module.fresh_seed

        def recorded(real: Callable[[], bytes] = real) -> bytes:
            seeds.append(real())
            return seeds[-1]

        monkeypatch.setattr(module, "fresh_seed", recorded)
    with dealing() as dealer, serving(model, dealer.address) as server:
        with dial(server, dealer) as connection:
            connection.embed([TEXT])
            for text in (" ".join(WORDS[:40]), ""):
                with pytest.raises(ValueError, match="the text") as caught:
                    connection.embed([text])
                shown.append(str(caught.value))
            connection.prepare()
            assert [repr(ready) for ready in connection.link._ready] == [
                object.__repr__(r) for r in connection.link._ready
            ]
            shown += [repr(connection), repr(connection.reports), repr(connection.link._ready)]
            with monkeypatch.context() as patch:
                patch.setattr(server_module, "Framed", bug)
                with pytest.raises(Error) as broken:
                    connection.embed([TEXT])
            shown.append(str(broken.value))
        with Raw(server, dealer, model) as raw:
            raw.start()
            raw.say(frame=pb.Frame(data=b"\0", last=True))
            shown.append(raw.hear_failure().message)
        shown += [repr(s) for s in dealer.service._sessions.values()]
        shown += [repr(m) for m in dealer.service._models.values()]
        shown += [repr(model), repr(model.masked), repr(model.compiled)]
    everything = caplog.text + "\n".join(shown)
    assert len(seeds) == 6
    for seed in seeds:
        for form in (seed.hex(), repr(seed)[2:-1], base64.b64encode(seed).decode(), str(list(seed))[1:-1]):
            assert form not in everything
    assert not any(word in everything for word in WORDS)
    ids = [
        load_tokenizer(directory).tokenizer.token_to_id(word) for word in WORDS[:12]
    ]  # more than positions there are
    assert str(ids)[1:-1] not in everything
    assert "dealt query 0" in caplog.text
    wait_until(lambda: "query 0 answered" in caplog.text, "the log says so")


def test_a_state_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves a model whose parts it remembers, and says so of another."""
    digest, apart = "a" * 64, {"one": "1"}
    seed, real = guarded_root_seed(tmp_path, digest, apart), Path.open

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return read_only() if "+" in mode or "w" in mode else real(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", read_only)
    assert guarded_root_seed(tmp_path, digest, apart) == seed
    message = r"{} cannot be written: .*\nhint: give a --state that this user may write"
    for changed, name in (({"two": "2"}, "apart.json"), ({"one": "2"}, "seed")):
        with pytest.raises(InvalidInput, match=message.format(rf"weight-mask-a+\.{name}")):
            guarded_root_seed(tmp_path, digest, {**apart, **changed})
    acts: list[Callable[[], bytes]] = [
        lambda: load_root_seed(tmp_path, digest, rotate=-1),
        lambda: load_root_seed(tmp_path, "b" * 64),
        lambda: guarded_root_seed(tmp_path, "b" * 64, apart),
    ]
    for act in acts:
        with pytest.raises(InvalidInput, match=message.format(r"weight-mask-[ab]+\.seed")):
            act()
    assert guarded_root_seed(tmp_path, digest, apart) == seed


def test_a_seed_serves_one_content_of_a_name(tmp_path: Path) -> None:
    """The seed stays as parts come and go. It is another one if a name had other integers, or nobody knows any more."""

    def seed(**apart: str) -> bytes:
        return guarded_root_seed(tmp_path, "a" * 64, apart)

    first = seed(one="1")
    assert seed(one="1", two="2") == seed(two="2") == seed() == seed(one="1") == first
    second = seed(one="3")
    assert second != first
    assert seed(two="5") == second  # what "two" was under the first seed does not matter under the second
    (record,) = tmp_path.glob("*.apart.json")
    for damage in (record.unlink, lambda: record.write_bytes(b""), lambda: record.write_bytes(b'{"two": 5}')):
        before = seed(two="5")
        damage()
        after = seed(two="6")
        assert after != before
        assert seed(two="6") == after
        seed(two="5")

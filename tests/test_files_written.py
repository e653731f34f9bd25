"""Every file that a role writes stands in the table of docs/operations.md, with the mode that it has."""

from __future__ import annotations

import re
import stat
from fnmatch import fnmatch
from pathlib import Path

import pytest

import secure
from parties import deployments
from parties.cli.main import app
from parties.limits.quotas import Limits, Quota
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.errors import InvalidInput
from tests.ckks_server import compiled, dial, inputs
from tests.dealer_key import KEY
from tests.three_parties import shared
from tests.tiny import TEXT, Ready, wait_until

DOCS = Path(__file__).resolve().parent.parent / "docs" / "operations.md"


def rows() -> list[tuple[list[str], str]]:
    """(patterns of names, mode) of each row of the table."""
    table = DOCS.read_text(encoding="utf-8").partition("## Every file")[2].partition("**Never resume**")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    return [(re.findall(r"`([^`]+)`", line[0]), line[2]) for line in lines]


def mode_of(path: Path) -> str:
    """The mode that the table gives a file of this name; "" if it does not name it."""
    data_base = re.sub(r"-(wal|shm)$", "", path.name)
    for names, mode in rows():
        if any(fnmatch(each, f"*/{name}") for each in (f"/{data_base}", str(path)) for name in names):
            return mode
    return ""


def check(root: Path, *but: str) -> set[str]:
    """Compare all files below ``root`` with the table; return their names. but: directories that are left out."""
    found = set[str]()
    for path in (p for p in root.rglob("*") if p.is_file() and not any(part in but for part in p.parts)):
        if path.name.startswith(".part-"):
            continue  # it is being written
        found.add(path.name)
        assert f"{stat.S_IMODE(path.stat().st_mode):04o}" == mode_of(path), path
        assert not stat.S_IMODE(path.parent.stat().st_mode) & 0o077, path.parent
    return found


def test_there_are_rows() -> None:
    assert len(rows()) > 15
    assert all(mode[:4] in ("0600", "0644") for _, mode in rows())


def test_files_of_two_parties(model: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSEEN_STORE_KEY", "ab" * 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, many = tmp_path / "roles", Limits(Quota(queries=100, preparations=100))
    root.mkdir(mode=0o700)
    KEY.save(root / "dealer")  # which the tests' own state directory names
    dealing = deployments.serve(
        role=DEALER, deployment=TwoParty(), state=root / "dealer", store=root / "dealer" / "store", quotas=many
    )
    with dealing as dealer:
        peers = {DEALER: dealer.address}
        store = root / "server" / "store"
        server = deployments.serve(
            model.compiled, role=SERVER, peers=peers, state=root / "server", store=store, store_gb=0.01, quotas=many
        )
        with server, secure.connect(TwoParty(server=server.address, dealer=dealer.address)) as session:
            session.embed([TEXT])
            wait_until(lambda: any(store.glob("*.entry")), "an entry is stored", 30)
            names = check(root)
    assert {"dealer.key", "dealer.pub", "entries.sqlite", "name"} <= names
    assert {each.partition(".place-")[0] for each in names if ".place-" in each} == {"entries.sqlite", "name"}
    assert any(name.endswith(".seed") for name in names)
    assert any(name.startswith("quotas-") for name in names)
    cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert cached
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o022 for path in cached)
    # a store that a backup brings back is refused, whichever side it is of
    saved = store.with_name("saved")
    store.rename(saved)
    store.mkdir(mode=0o700)
    for path in saved.iterdir():
        (store / path.name).write_bytes(path.read_bytes())
        (store / path.name).chmod(0o600)
    with (
        deployments.serve(role=DEALER, deployment=TwoParty(), state=root / "dealer") as dealer,
        pytest.raises(InvalidInput, match="was copied or restored"),
    ):
        deployments.serve(
            model.compiled,
            role=SERVER,
            peers={DEALER: dealer.address},
            state=root / "server",
            store=store,
            store_gb=0.01,
        )


def test_files_that_commands_write(model: Ready, directory: Path, tmp_path: Path) -> None:
    for made in ("pki", "share", "compiled", "own"):
        (tmp_path / made).mkdir(mode=0o700)
    for role in (SERVER, "client"):
        app()(["certs", str(tmp_path / "pki"), role], standalone_mode=False)
    app()(["token", "new", "alice", "--tokens", str(tmp_path / "own" / "tokens")], standalone_mode=False)
    shared(directory, tmp_path / "share" / "of", "one-hot")
    secure.save_compiled(model.compiled, tmp_path / "compiled" / "model")
    assert {"key.pem", "cert.pem", "ca-key.pem"} <= check(tmp_path / "pki", "issued")
    assert check(tmp_path / "own") == {"tokens"}
    assert {"seeds", "manifest.json"} <= check(tmp_path / "share")
    for path in (tmp_path / "compiled" / "model").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_files_of_ciphertexts(tmp_path: Path) -> None:
    for each in ("server", "client"):
        (tmp_path / each).mkdir(mode=0o700)
    with deployments.serve(compiled("tiny"), role=SERVER, state=tmp_path / "server") as server:
        with dial(server.address, tmp_path / "client" / "keys") as session:
            session.query(inputs("tiny"))
        for path in (p for p in tmp_path.rglob("*") if p.is_file()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

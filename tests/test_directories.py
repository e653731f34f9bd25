"""Directories that cannot be written, or are nowhere: said in words, and before anything takes long."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

import secure
from parties import deployments
from parties.net.directories import check_writable, user_directory
from protocols import warm
from secure.errors import InvalidInput
from tests.test_cli import Run, in_words, run

__all__ = ["run"]  # the fixture


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is compiled, which is said where it lasts."""
    monkeypatch.setattr(warm, "warm_up", lambda: None)


def test_a_user_without_a_home_is_told_what_to_set(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback. What needs no directory works."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    in_words(run("token", "list", "--tokens", "/no/file"), "/no/file cannot be read", "unseen token new")
    in_words(run("embed", "x"), "this user has no home directory", "set HOME, or XDG_CACHE_HOME")
    in_words(run("dealer", "--listen", "127.0.0.1:0"), "this user has no home directory", "set HOME, or XDG_STATE_HOME")


def test_a_directory_of_the_standard_needs_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert user_directory("XDG_STATE_HOME", ".local", "state") == tmp_path


def test_a_full_disk_is_noticed(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    check_writable(tmp_path / "new", "the state directory", "")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InvalidInput, match=r"the state directory .* cannot be written: File too large\nhint: x"):
            check_writable(tmp_path, "the state directory", "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_a_directory_that_was_filled_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InvalidInput, match="Read-only file system"):
        check_writable(tmp_path, "the state directory", "x")
    (tmp_path / "dealer.key").touch()
    check_writable(tmp_path, "the state directory", "x")


def test_a_state_that_cannot_be_written_is_said_before_anything_is_compiled(
    directory: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a bare OSError after the model was compiled."""
    monkeypatch.setattr("parties.cli.serve.made", lambda *_, **__: pytest.fail("it was compiled"))
    wrong = tmp_path / "file"
    wrong.touch()
    state = str(wrong / "state")
    said = "the state directory .* cannot be written: Not a directory"
    in_words(run("serve", str(directory), "--state", state), said, "give another directory: --state")
    in_words(run("dealer", "--state", state), said, "give another directory: --state")
    for deployment, role in ((secure.TwoParty(), "dealer"),):
        with pytest.raises(InvalidInput, match=said):
            deployments.serve(role=role, listen="127.0.0.1:0", deployment=deployment, state=wrong / "state")
    deployments.check_state(secure.ThreeParty(), "party 1", wrong / "state", counts=False)  # it keeps none
    with pytest.raises(InvalidInput, match=said):
        deployments.check_state(secure.ThreeParty(), "party 1", wrong / "state", counts=True)

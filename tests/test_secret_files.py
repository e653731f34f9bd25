"""Secret files are read as ssh reads them: nobody else can have read them, or put them there."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from parties.net import secret_files
from parties.net.secret_files import check_directory, read_secret, read_trusted
from parties.two_party.masked_model import load_root_seed
from parties.two_party.sealing import SealingKey
from secure.errors import InvalidInput

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes are those of Unix")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "held" / "secret"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"s" * 32)
    path.chmod(0o600)
    return path


def test_what_only_this_user_may_read_is_read(file: Path) -> None:
    for mode in (0o600, 0o400, 0o700):
        file.chmod(mode)
        assert read_secret(file) == b"s" * 32
        assert read_trusted(file) == b"s" * 32
    with pytest.raises(FileNotFoundError):
        read_secret(file.with_name("none"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o666, 0o777])
def test_files_that_are_open_to_others(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(
        InvalidInput, match=rf"others may read or write .*secret \(mode {mode:04o}\)\nhint: chmod [67]00"
    ):
        read_secret(file)
    if mode & 0o022:
        with pytest.raises(InvalidInput, match=r"others may write .*secret"):
            read_trusted(file)
    else:
        assert read_trusted(file) == b"s" * 32


@pytest.mark.parametrize("mode", [0o702, 0o720, 0o777])
def test_directories_in_which_others_may_replace_it(file: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_files, "_is_private_group", lambda _: False)
    file.parent.chmod(mode)
    with pytest.raises(InvalidInput, match=rf"others may write to .*held \(mode {mode:04o}\)\nhint: chmod go-w"):
        read_secret(file)
    file.parent.chmod(mode | stat.S_ISVTX)  # as /tmp is: others may add files, and replace none
    assert read_secret(file) == b"s" * 32


def test_a_directory_above_counts_too(file: Path) -> None:
    below = file.parent / "below"
    below.mkdir(mode=0o700)
    file.parent.chmod(0o707)
    with pytest.raises(InvalidInput, match=r"others may write to .*held "):
        check_directory(below)


def test_a_users_own_group_is_nobody_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many systems make one a user, and directories that it may write to."""
    import grp
    import pwd

    user = SimpleNamespace(pw_gid=file.parent.stat().st_gid, pw_name="ann")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    file.parent.chmod(0o770)
    for name, members, private in (
        ("ann", [], True),
        ("ann", ["ann"], True),
        ("ann", ["bob"], False),
        ("x", [], False),
    ):
        group = SimpleNamespace(gr_gid=user.pw_gid, gr_name=name, gr_mem=members)
        monkeypatch.setattr(grp, "getgrgid", lambda _, group=group: group)
        if private:
            assert read_secret(file) == b"s" * 32
        else:
            with pytest.raises(InvalidInput, match="others may write to"):
                read_secret(file)


def test_links_and_what_is_no_file(file: Path, tmp_path: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    with pytest.raises(InvalidInput, match=r"link is a link\nhint: give an ordinary file"):
        read_secret(link)
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        read_secret(file.parent)
    os.mkfifo(pipe := file.with_name("pipe"))
    with pytest.raises(InvalidInput, match="is no ordinary file"):  # and does not wait for a writer
        read_secret(pipe)
    with pytest.raises(InvalidInput, match=r"no ordinary file|another user"):
        read_secret(Path("/dev/null"))
    elsewhere = tmp_path / "elsewhere"  # a link to a directory is followed, and what it leads to is checked
    elsewhere.symlink_to(file.parent)
    assert read_secret(elsewhere / "secret") == b"s" * 32
    file.parent.chmod(0o707)
    with pytest.raises(InvalidInput, match=r"others may write to .*held "):
        read_secret(elsewhere / "secret")


def test_files_of_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InvalidInput, match="belongs to another user"):
        read_secret(file)


def test_large_files(file: Path) -> None:
    file.write_bytes(bytes(100))
    assert len(read_secret(file, most=100)) == 100
    with pytest.raises(InvalidInput, match="has more than 99 bytes"):
        read_secret(file, most=99)


def test_the_seed_and_the_dealers_key_are_read_so(tmp_path: Path) -> None:
    """Both were once taken from behind links, and from files that anybody could write."""
    state = tmp_path / "state"
    loads: dict[str, Callable[[], bytes]] = {
        f"weight-mask-{'0' * 64}.seed": lambda: load_root_seed(state, "0" * 64),
        "dealer.key": lambda: SealingKey.load(state).public.encoded,
    }
    before = [load() for load in loads.values()]
    for name, load in loads.items():
        path, kept = state / name, state / "kept"
        path.chmod(0o666)
        with pytest.raises(InvalidInput, match="others may read or write"):
            load()
        path.chmod(0o600)
        path.rename(kept)
        path.symlink_to(kept)
        with pytest.raises(InvalidInput, match="is a link"):
            load()
        kept.replace(path)
        state.chmod(0o777)
        with pytest.raises(InvalidInput, match="others may write to"):
            load()
        state.chmod(0o700)
    assert [load() for load in loads.values()] == before

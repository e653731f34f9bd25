"""A process confined as a unit of systemd or a container confines it: ``python -m tests.confined CALLS COMMAND...``.

``CALLS`` is a file with the names of the system calls that it may make, one a line; others end with EPERM, as does a
socket of another family than IPv4, IPv6 and Unix's. It may execute what it has written to memory, as numba does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


class _Compared(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def confine(names: Sequence[str]) -> None:
    """Allow this process and those that it starts these system calls alone."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Compared),
    ]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    refuse = ERRNO | errno.EPERM
    rules = library.seccomp_init(refuse)
    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # of another architecture
        if name == "socket":
            for family in FAMILIES:
                same = _Compared(0, 4, int(family), 0)  # SCMP_CMP_EQ
                assert library.seccomp_rule_add_array(rules, ALLOW, number, 1, ctypes.byref(same)) == 0
        else:
            assert library.seccomp_rule_add_array(rules, ALLOW, number, 0, None) == 0
    assert library.seccomp_load(rules) == 0


def calls(groups: Sequence[str]) -> list[str]:
    """The system calls of systemd's SystemCallFilter= lines: groups, and names; a line with "~" takes some away."""
    allowed = set[str]()
    for line in groups:
        away, names = line.startswith("~"), set[str]()
        for word in line.lstrip("~").split():
            names |= _group(word)
        allowed = allowed - names if away else allowed | names
    return sorted(allowed)


def _group(word: str) -> set[str]:
    if not word.startswith("@"):
        return {word}
    shown = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True)
    words = [line.split()[0] for line in shown.stdout.splitlines()[1:] if line.strip() and "#" not in line]
    return set[str]().union(*(_group(each) for each in words))


def on_a_read_only_disk(command: Sequence[str], writable: Sequence[Path]) -> list[str]:
    """The command on a disk that cannot be written but in these directories, without any capability of root."""
    keep = " && ".join(f"mount --bind '{path}' '{path}'" for path in writable)
    script = f'{keep} && mount -o remount,bind,ro / && exec "$@"'
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc", script, "sh", *bare, *command]


def missing() -> str:
    """What is not here to confine a process; "" if all is."""
    for program in ("unshare", "setpriv", "systemd-analyze"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return "libseccomp is not installed"
    if subprocess.run(
        on_a_read_only_disk(["true"], [Path(__file__).parent]), capture_output=True, check=False
    ).returncode:
        return "this machine allows no namespaces"
    return ""


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text().split())
    os.execvp(sys.argv[2], sys.argv[2:])

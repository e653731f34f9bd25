"""Kernels that root compiled once, and that a service reads but cannot replace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core import config
from numba.core.caching import NullCache

from protocols import kept_kernels, kernels
from protocols.kept_kernels import is_own

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
import numpy as np
from protocols import kernels

def added(x):
    return x + 1

added.__code__ = added.__code__.replace(co_filename=sys.argv[1])
kernel = kernels.compiled(added)
for kind in sys.argv[2:]:
    assert kernel(np.ones(3, kind)).tolist() == [2, 2, 2]
print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def ran(cache: Path, source: Path, *kinds: str, without_rights: bool = False) -> tuple[int, int]:
    """(kernels that were read, kernels that were compiled) by a process. without_rights: as an ordinary user."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(source), *kinds]
    if without_rights and os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and setpriv is not installed")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *command]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    read, made = found.stdout.split()
    return int(read), int(made)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The file that a kernel's cache belongs to."""
    path = tmp_path / "kernel.py"
    path.write_text("x\n")
    return path


def test_what_cannot_be_written_is_read(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kept"
    assert ran(cache, source, "int64") == (0, 1)
    (inner,) = cache.iterdir()
    before = sorted(inner.iterdir())
    assert before
    assert is_own(str(inner))
    for path in (inner, cache):
        path.chmod(0o555)
    assert ran(cache, source, "int64", "int32", without_rights=True) == (1, 1)
    assert sorted(inner.iterdir()) == before  # the second one was compiled, and not kept
    inner.chmod(0o755)
    for path in before:
        path.chmod(0)
    assert ran(cache, source, "int64", without_rights=True) == (0, 1)  # what cannot be read is no mistake


def test_what_others_may_write_is_not_read(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kept"
    assert ran(cache, source, "int64") == (0, 1)
    assert ran(cache, source, "int64") == (1, 0)
    (inner,) = cache.iterdir()
    inner.chmod(0o757)
    assert not is_own(str(inner))
    assert ran(cache, source, "int64") == (0, 1)
    inner.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(inner, 65534, -1)
        assert not is_own(str(inner))


def test_nothing_else_is_tried_where_a_directory_is_given(source: Path, tmp_path: Path) -> None:
    """numba itself goes on to the user's cache if it may not write to the directory that it was given."""
    assert ran(tmp_path / "no" / "such", source, "int64", without_rights=True) == (0, 1)
    assert ran(Path("/proc/nowhere"), source, "int64") == (0, 1)


def test_kernels_without_a_directory_to_keep_them_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service's user may have no home, and no right to write to the package."""

    def one_more(x: int) -> int:
        return x + 1

    monkeypatch.setattr(config, "CACHE_DIR", "/x")
    monkeypatch.setattr(kept_kernels._InGivenPlace, "_locator_classes", [])
    made = kernels.compiled(one_more)
    assert made(1) == 2
    assert isinstance(made._cache, NullCache)  # type: ignore[attr-defined]

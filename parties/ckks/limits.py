"""Limits of a process that computes with what clients sent: memory, processor time, no core files."""

from __future__ import annotations

import os
import resource
from pathlib import Path

LOADING = 60.0  # seconds of CPU time that loading keys may take in any case
LOADED = 5e6  # bytes of keys for which a slow machine may take a second more


def loading_seconds(size: int) -> float:
    """Return the seconds of CPU time that loading ``size`` bytes of keys may take."""
    return LOADING + size / LOADED


def limit(memory: int, seconds: float, *, children: int = 0) -> None:
    """Limit this process from here on: to ``memory`` bytes of addresses more than it has, and to so much CPU time.

    Beyond its memory an allocation fails; beyond its time the kernel ends the process. It leaves no core file, which
    would hold weights and keys. children: bytes more that processes forked from it may give themselves with ``limit``.
    """
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now + memory + children
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (min(now + memory, most), most))
    limit_time(seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time(seconds: float) -> None:
    """Allow this process so many seconds of CPU time from here on."""
    spent = os.times()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent.user + spent.system + seconds) + 1, hard))

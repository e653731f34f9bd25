"""What the benchmarks share: the machine, child processes and their peak memory, where results are kept."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


class ChildFailed(RuntimeError):
    """A child process ended in another way than it should; the message holds the end of what it said."""


def machine(module: str) -> dict[str, Any]:
    """What the numbers were measured on, and with which command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": shlex.join([Path(sys.executable).name, "-m", module, *sys.argv[1:]]),
    }


def peak(process: int | str = "self") -> float:
    """A running process's peak memory in MB (a child's ``ru_maxrss`` counts what its parent had when it forked)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def forget_peak() -> None:
    """Let this process's peak memory count from now on, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Service:
    """``python -m MODULE ARGUMENTS`` as a child that says in one line of JSON where it listens.

    ``announced``: that line; ``peak`` after ``stop``: its peak memory in MB.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the child
        command = [sys.executable, "-m", module, *arguments]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        self.peak, self._said = 0.0, ""
        if not line:
            self.stop()
            raise ChildFailed(f"{module} {' '.join(arguments)} did not start:\n{self.said()}")
        self.announced: dict[str, Any] = json.loads(line)
        self.address = str(self.announced["listening"])

    @property
    def pid(self) -> int:
        return self._child.pid

    def said(self) -> str:
        """The end of its standard error."""
        return self._said if self._log.closed else self.log()[-2000:]

    def log(self) -> str:
        """All of its standard error, while it runs."""
        # not by seeking, as the child writes at the same place
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def stop(self) -> None:
        if self._child.returncode is None and self._child.stdout is not None:
            self.peak = peak(self._child.pid)
            self._child.terminate()
            self._child.wait()
            self._child.stdout.close()
            self._said = self.said()
            self._log.close()


def dealer(*options: str) -> Service:
    """``unseen dealer`` on a free port of loopback, one thread."""
    return Service("parties.cli", "dealer", "--listen", "127.0.0.1:0", "--threads", "1", "--announce", *options)


def run(command: list[str]) -> tuple[bytes, float]:
    """Run a child to its end; its standard output and its peak memory in MB."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=output, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        log.seek(0)
        if child.returncode:
            said = log.read().decode(errors="replace")[-2000:]
            raise ChildFailed(f"exit code {child.returncode} of {' '.join(command[1:5])} ...\n{said}")
        return output.read(), usage.ru_maxrss / 1024

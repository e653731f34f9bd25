"""Signals that end a service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

WAITING = """
import signal, threading, time
from parties.services.signals import Signals
for _ in range(8):  # any of them may receive a signal
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
caught = Signals(signal.SIGINT, signal.SIGTERM)
print("up", flush=True)
first = caught.next()
while not caught.waits():
    time.sleep(0.01)
print(first, caught.next(), flush=True)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_two_signals_at_once_both_arrive(attempt: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
        try:
            found, _ = child.communicate(timeout=20)
        finally:
            child.kill()
        assert sorted(map(int, found.split())) == sorted([signal.SIGINT, signal.SIGTERM])

"""Stores whose processes are killed at random instants: no entry twice, none lost but the one in flight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def crashed(kind: str, directory: Path, points: int, processes: int) -> dict[str, Any]:
    """In a process of its own, because it forks."""
    command = [sys.executable, "-m", "tests.store_crash", kind, str(directory), str(points), str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    assert "dropped" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


KILLS = int(os.environ.get("UNSEEN_KILLS", "30"))
"""How often the slow tests kill a process; 1,000 take some minutes each."""

MANY = [pytest.param(KILLS, 1, marks=pytest.mark.slow), pytest.param(KILLS // 2, 2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", ["files", "database", "both"])
@pytest.mark.parametrize(("points", "processes"), [(10, 1), *MANY])
def test_killed_at_any_instant(kind: str, points: int, processes: int, tmp_path: Path) -> None:
    found = crashed(kind, tmp_path, points, processes)
    assert found["kills"] == points * processes
    assert found["twice"] == 0
    assert found["lost"] <= found["taking"] <= found["kills"]  # none but those that a killed process was taking
    assert (found["wrong"], found["failed"], found["parts"]) == (0, [], [])
    assert found["put"] > found["lost"]


def test_a_store_that_burns_late_is_caught(tmp_path: Path) -> None:
    """The check itself."""
    assert crashed("late", tmp_path, 25, 1)["twice"] > 0

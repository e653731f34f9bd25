"""Whoever waits for a command sees what it is doing, on a terminal and elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from parties.cli import console
from parties.cli.console import Late
from tests.test_cli import Run, run
from tests.test_profiling import SMALL

__all__ = ["run"]  # the fixture


def test_a_stage_that_lasts_is_said_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "STAGE", 0.05)
    with console.progress("embed") as told:
        told(0, 0, "connecting")
        told(0, 9, "embedding")  # connecting was over at once
        time.sleep(0.3)
        told(1, 9, "embedding")
    told(2, 9, "too late")
    time.sleep(0.15)
    assert capsys.readouterr().err.splitlines() == ["unseen embed: embedding ..."]


def test_nothing_is_said_of_what_has_ended(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "STAGE", 0.05)
    late = Late()
    late.begin("first")
    late.end()
    late.begin("second")
    late.begin("third")
    late.end()
    late.end()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_kernels_that_are_compiled_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "STAGE", 0.05)
    monkeypatch.setattr(console, "use_threads", lambda _: None)
    monkeypatch.setattr("protocols.kernels.warm_up", lambda: time.sleep(0.3))
    console.get_ready(1)
    assert "getting kernels ready" in capsys.readouterr().err


def test_counting_has_a_time_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two constants of one name once made it a line every two seconds, for hours."""
    clock = [0.0]
    monkeypatch.setattr("parties.cli.console.time.monotonic", lambda: clock[0])
    with console.counting("embed", "texts", 100) as counted:
        for done in range(1, 31):
            clock[0] += 3.0
            counted(done)
    assert len(capsys.readouterr().err.splitlines()) == 3  # of 90 s


def test_a_profile_says_what_it_is_doing(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL))
    ended = run("profile", str(file), "--length", "8", "--no-time")
    assert ended.code == 0, ended.err
    assert [line.split(":")[1].split()[0] for line in ended.err.splitlines()] == ["compiling", "counting"]

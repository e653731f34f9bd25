"""The command ``unseen``: its verbs as processes, and every mistake in words, with a hint and without a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import secure
from parties import deployments
from parties.cli import console, demo
from parties.cli import main as cli
from parties.telemetry import logs
from parties.two_party.client import TwoPartyLink
from secure.deployments.two_party import CLIENT, DEALER, SERVER
from secure.errors import Error, PeerLost
from tests.tiny import LENGTH, TEXT, WORDS, Served, expected, sentences, served_program

ROOT = Path(__file__).parent.parent
NOBODY = "127.0.0.1:1"
COMMAND = [sys.executable, "-m", "parties.cli"]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``unseen ARGUMENTS`` in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [name for name in os.environ if name.startswith("UNSEEN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(logs, "log_to_stderr", lambda *_: None)
    monkeypatch.setattr(console, "_form", logs.TEXT)

    def ask(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["unseen", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.app_main()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, *capsys.readouterr())

    return ask


def in_words(ended: Ended, message: str, hint: str) -> None:
    """A mistake of the user: code 1, the message, then the hint, and no more."""
    assert ended.code == 1
    assert ended.out == ""
    lines = ended.err.strip().splitlines()
    first, *rest = [line for line in lines if not re.match(r"unseen [\w -]+: .*( \.\.\.$|, compiled on )", line)]
    assert re.fullmatch(f"unseen: error: .*{message}.*", first)
    (last,) = rest
    assert re.fullmatch(f"hint: .*{hint}.*", last)


# help


def test_help(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    for verb in ("dealer", "serve", "embed", "demo"):
        assert verb in ended.out
        inner = run(verb, "--help")
        assert inner.code == 0
        assert "--announce" not in inner.out
    assert "semi-honest" in ended.out


@pytest.mark.parametrize(
    ("count", "named", "found"),
    [(3, "2", 3), (3, None, 3), (0, "5", 5), (0, None, 0), (0, "", 0), (0, "4,2", 0), (0, "-1", 0), (0, "0", 0)],
)
def test_threads_of_a_command(monkeypatch: pytest.MonkeyPatch, count: int, named: str | None, found: int) -> None:
    """Without a number it has those that the environment says, else one a processor."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    console.use_threads(count)
    assert torch.get_num_threads() == (found or os.cpu_count())


def test_texts_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n\n"))
    ended = run("embed")
    assert ended.code == 1
    assert "unseen: error: no text\nhint: give texts as arguments" in ended.err
    monkeypatch.setattr("sys.stdin", io.StringIO("A secret line.\n"))
    ended = run("embed", "--server", "127.0.0.1:1")
    assert "the server at 127.0.0.1:1 cannot be reached" in ended.err
    assert "secret" not in ended.err


@pytest.mark.parametrize(
    "arguments",
    [["embed", "x", "--threads", "-1"], ["embed", "x", "--deadline", "0"], ["serve", "--embedding", "x"], ["no"]],
)
def test_wrong_usage(arguments: list[str], run: Run) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert "Usage" in ended.err
    assert "Traceback" not in ended.err


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["embed", "x", "--server", "nowhere"], "the server: 'nowhere' is not host:port", "for example"),
        (["embed", "x", "--dealer", "a:b"], "the dealer: 'a:b' is not host:port", "for example"),
        (
            ["embed", "x", "--server", NOBODY],
            f"the server at {NOBODY} cannot be reached",
            "start it with: unseen serve",
        ),
        (["embed", "x", "--server", "192.0.2.1:5"], "is not on this machine.*not be encrypted", "--insecure"),
        (["embed", "x", "--compare-with", "/no/model"], "no model at '/no/model'", "save_pretrained"),
        (["dealer", "--listen", "0.0.0.0:0"], "the dealer: 0.0.0.0:0 is not on this machine", "--insecure"),
        (["dealer", "--listen", "x"], "--listen: 'x' is not host:port", "for example"),
        (["serve", "--listen", "0.0.0.0:0"], "the server: 0.0.0.0:0 is not on this machine", "--insecure"),
        (["serve", "--dealer", "192.0.2.1:5", "--listen", "x"], "--listen: 'x' is not host:port", "for example"),
        (["serve", "/no/model"], "no model at '/no/model'", "save_pretrained"),
        (["serve", "--dealer", "192.0.2.1:5"], "the dealer: 192.0.2.1:5 is not on this machine", "--insecure"),
        (
            ["serve", "--calibration", "/no/file"],
            "--calibration: /no/file cannot be read: No such",
            "one sentence a line",
        ),
    ],
)
def test_mistakes_in_words(arguments: list[str], message: str, hint: str, run: Run) -> None:
    in_words(run(*arguments), message, hint)


def test_a_mistake_that_needs_no_hint(run: Run) -> None:
    ended = run("serve", "--fraction-bits", "99")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == "unseen: error: fixed point: fraction_bits is an integer from 8 to 20, got 99\n"


def test_mistakes_about_a_model(run: Run, directory: Path, tmp_path: Path, dealer: Served) -> None:
    model = str(directory)
    free = ["--listen", "127.0.0.1:0", "--dealer", dealer.address]
    in_words(run("serve", model, "--length", "400", *free), "takes no length of 400 tokens", "3 to 16")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    in_words(run("serve", model, "--calibration", str(empty)), "has no sentences", "one sentence a line")
    empty.write_bytes(b"\xff\xfe")
    in_words(run("serve", model, "--calibration", str(empty)), "cannot be read", "one sentence a line")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(sentences()))
    arguments = ["serve", model, "--length", str(LENGTH), "--calibration", str(texts), "--listen", "127.0.0.1:0"]
    in_words(run(*arguments, "--dealer", NOBODY), f"the dealer at {NOBODY} cannot be reached", f"--listen {NOBODY}")


def test_a_port_in_use(run: Run, dealer: Served) -> None:
    in_words(run("dealer", "--listen", dealer.address), f"the address {dealer.address} cannot be used", "another port")


def test_mistakes_about_a_text(run: Run, server: Served, dealer: Served) -> None:
    at = ["--server", server.address, "--dealer", dealer.address]
    long = " ".join(WORDS[:30])
    ended = run("embed", long, *at)
    in_words(ended, f"the text has 32 tokens .*, the limit is {LENGTH}", "shorten")
    assert WORDS[0] not in ended.err
    ended = run("embed", TEXT, "", *at)  # the answer before a failure is paid for, so it is shown
    assert TEXT in ended.out
    in_words(replace(ended, out=""), "the text is empty", "at least one word")
    in_words(
        run("embed", TEXT, *at[:2], "--dealer", NOBODY), f"the dealer at {NOBODY}", f"unseen dealer --listen {NOBODY}"
    )
    in_words(run("embed", TEXT, *at, "--program-digest", "00"), "Program digest: .*this client expects '00'", "")


def test_an_interrupt_is_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(deployments, "connect", interrupted)
    ended = run("embed", "x")
    assert ended.code == 130
    assert "Traceback" not in ended.err


# answers


def test_embeddings_as_json(run: Run, server: Served, dealer: Served, directory: Path, tmp_path: Path) -> None:
    texts = sentences(2)
    ended = run("embed", *texts, "--server", server.address, "--dealer", dealer.address, "--json")
    assert (ended.code, ended.err) == (0, "")
    rows = json.loads(ended.out)
    cost = served_program(server).cost
    for text, row in zip(texts, rows, strict=True):
        assert row["text"] == text
        torch.testing.assert_close(
            torch.tensor(row["embedding"], dtype=torch.float64), expected(directory, text), atol=5e-3, rtol=0
        )
        moved = {(t["sender"], t["receiver"], t["phase"]): t["bytes"] for t in row["traffic"]}
        assert row["rounds"] == cost.rounds
        assert moved[CLIENT, SERVER, "online"] == cost.to_first
        assert moved[SERVER, CLIENT, "online"] == cost.to_second
        assert moved[DEALER, SERVER, "offline"] == cost.dealt
    assert len(list((tmp_path / "cache" / "unseen").iterdir())) == 1
    assert run("embed", TEXT, "--server", server.address, "--dealer", dealer.address, "--json", "--no-cache").code == 0


def test_a_report_for_people(run: Run, server: Served, dealer: Served, directory: Path) -> None:
    at = ["--server", server.address, "--dealer", dealer.address]
    ended = run("embed", *sentences(2), *at, "--compare-with", str(directory))
    assert (ended.code, ended.err) == (0, f"unseen embed: embedding in the clear with {directory}, to compare ...\n")
    cosines = [float(c) for c in re.findall(r"cosine to the plaintext model\s+([\d.]+)", ended.out)]
    assert len(cosines) == 2
    assert min(cosines) > 0.999
    assert f"{served_program(server).cost.rounds} rounds" in ended.out
    assert "who learnt what" in ended.out
    assert re.search(r"once: [\d.]+ [kM]B from server to client", ended.out)


# processes


@dataclass
class Process:
    child: subprocess.Popen[str]
    address: str
    log: Path

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.child.send_signal(how)
        return self.child.wait(timeout=20)


@contextmanager
def process(log: Path, *arguments: str, whole: Sequence[str] = (), **environment: str) -> Iterator[Process]:
    """``unseen ARGUMENTS``, whose log goes to a file. whole: the command, where something else begins it."""
    with log.open("w") as file:
        child = subprocess.Popen(
            list(whole) or [*COMMAND, *arguments, "--announce"],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
    assert child.stdout is not None
    with child.stdout as lines:
        try:
            yield Process(child, json.loads(lines.readline())["listening"], log)
        finally:
            child.kill()
            child.wait()


def at(server: Process, dealer: Process) -> secure.TwoParty:
    return secure.TwoParty(server=server.address, dealer=dealer.address)


def serve(directory: Path, dealer: Process, log: Path, state: Path, texts: Path, *more: str) -> Any:
    arguments = ["serve", str(directory), "--dealer", dealer.address, "--listen", "127.0.0.1:0", "--threads", "1"]
    arguments += ["--length", str(LENGTH), "--state", str(state), "--calibration", str(texts), "--same-owner"]
    return process(log, *arguments, *more)


def test_three_processes(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it: an answer, a server that is killed in the middle, clean ends, and logs that tell nothing."""
    texts, cache = tmp_path / "texts.txt", tmp_path / "cache" / "unseen"
    texts.write_text("\n".join(sentences()))
    logs = [tmp_path / name for name in ("dealer.log", "first.log", "second.log")]
    with process(logs[0], "dealer", "--listen", "127.0.0.1:0", "--verbose") as dealer:
        with serve(directory, dealer, logs[1], tmp_path / "state", texts) as server:
            ended = subprocess.run(
                [*COMMAND, "embed", TEXT, "--server", server.address, "--dealer", dealer.address, "--json"],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
                check=False,
            )
            waits = re.sub(r"(?m)^unseen embed: .* \.\.\.\n", "", ended.stderr)  # what takes long on a slow machine
            assert (ended.returncode, waits) == (0, "")
            vector = torch.tensor(json.loads(ended.stdout)[0]["embedding"], dtype=torch.float64)
            torch.testing.assert_close(vector, expected(directory, TEXT), atol=5e-3, rtol=0)

            frames, send = list[None](), TwoPartyLink._send

            def killing(self: TwoPartyLink, **content: Any) -> None:
                frames.extend([None] * ("frame" in content))
                if len(frames) == 20:
                    server.end(signal.SIGKILL)
                send(self, **content)

            monkeypatch.setattr(TwoPartyLink, "_send", killing)
            with secure.connect(at(server, dealer), cache=cache, deadline=20) as session:
                message = r"is gone; this client waited for its message of module 'encoder[^']*' \(round \d+ of"
                with pytest.raises(PeerLost, match=message):
                    session.embed([TEXT])
            monkeypatch.undo()
        with serve(directory, dealer, logs[2], tmp_path / "state", texts, "--verbose") as server:  # knows its seed yet
            with secure.connect(at(server, dealer), cache=cache, deadline=20) as session:
                session.embed([TEXT])
            assert len(list(cache.iterdir())) == 1
            assert server.end() == 0
        assert dealer.end() == 0
    (seed,) = [file.read_bytes() for file in (tmp_path / "state").iterdir()]
    told = "\n".join(log.read_text() for log in logs)
    assert "query 0 answered" in told
    assert "dealt query 0" in told
    assert "Traceback" not in told
    assert seed.hex() not in told
    assert not any(word in told for word in WORDS)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_once_ends_cleanly(how: signal.Signals, tmp_path: Path) -> None:
    with process(tmp_path / "log", "dealer", "--listen", "127.0.0.1:0") as dealer:
        start = time.monotonic()
        assert dealer.end(how) == 0
        assert time.monotonic() - start < 10
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_demo_says_which_process_did_not_start() -> None:
    told, message = io.StringIO(), r"the dealer did not start \(exit code 1\)\nhint: see its output"
    failing = demo.process(Console(file=told), "dealer", "red", ["dealer", "--listen", "nowhere"])
    with pytest.raises(Error, match=message), failing:
        pass
    assert "unseen: error: --listen: 'nowhere' is not host:port" in told.getvalue()

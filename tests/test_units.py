"""The units for systemd in ``examples/deploy``: what they run, how they confine it, and that it runs so."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from numba.core.caching import _CacheLocator

import secure
from parties.cli import main
from parties.cli.config import PREFIX, known_settings
from parties.cli.main import app
from parties.limits.tokens import Token, new_holder
from parties.services.draining import DRAIN
from parties.services.ready import READY, tell_ready
from protocols import kernels
from protocols.three_party import dpf
from protocols.two_party import digits
from secure.deployments.two_party import DEALER, SERVER
from tests import confined
from tests.test_cli import COMMAND, Process, process
from tests.tiny import TEXT, Ready, expected

UNITS = sorted((Path(__file__).resolve().parent.parent / "examples" / "deploy" / "systemd").glob("*.service"))
PROGRAM = "/opt/unseen/bin/unseen"
PLACES = {"%S": "var/lib", "%C": "var/cache", "%t": "run", "%d": "credentials"}


def settings(path: Path) -> dict[str, list[str]]:
    """The lines of a unit's [Service], by name."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().partition("[Service]")[2].partition("[Install]")[0].splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def placed(text: str, root: Path, instance: str = "0") -> str:
    """A line with its specifiers, in directories below ``root``; /etc is there too."""
    for name, at in PLACES.items():
        text = text.replace(name, str(root / at))
    return re.sub(r"(?<![\w.])/etc/", f"{root}/etc/", text.replace("%i", instance)).replace("$$", "$")


def command(path: Path, root: Path) -> list[str]:
    (line,) = settings(path)["ExecStart"]
    program, *words = shlex.split(placed(line, root))
    assert program == PROGRAM
    return words


def test_there_is_one_for_every_role() -> None:
    assert [path.name for path in UNITS] == [
        "unseen-dealer.service",
        "unseen-party@.service",
        "unseen-proxy.service",
        "unseen-server.service",
    ]


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_a_unit_runs_a_command_of_unseen(path: Path, tmp_path: Path) -> None:
    verb, *rest = command(path, tmp_path)
    commands: Any = typer.main.get_command(main.app())
    with commands.commands[verb].make_context(verb, rest) as context:
        given = dict(context.params)
    assert given["tls"] is not None
    known = known_settings(commands.commands[verb])
    for name in re.findall(rf"\b{PREFIX}_(\w+)=", path.read_text()):
        assert name.lower().replace("_", "-") in known, name


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_a_unit_lets_queries_end_and_keeps_its_directories_closed(path: Path) -> None:
    found = {name: values[-1] for name, values in settings(path).items()}
    assert found["Type"] == "notify"
    assert int(found["TimeoutStopSec"]) > DRAIN
    assert found["KillMode"] == "mixed"  # the first process passes SIGTERM on, and a second one ends work at once
    for kind in ("State", "Cache", "Runtime"):
        assert found[f"{kind}DirectoryMode"] == "0700"
    own = (Path("/opt/unseen/kernels"), "NUMBA_CACHE_DIR")
    assert f"{own[1]}={own[0]}" in settings(path)["Environment"][0]
    assert "MemoryDenyWriteExecute" not in found
    assert all(f"/{found['StateDirectory']}" in word for word in re.findall(r"%[SCt]\S+", found["ExecStart"]))
    users = (path.parent / "unseen.sysusers").read_text()
    assert re.search(rf"(?m)^u {found['User']} - ", users)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_systemd_reads_a_unit_and_finds_it_closed(path: Path, tmp_path: Path) -> None:
    unit = tmp_path / path.name.replace("@", "@0")
    unit.write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    for what in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=15"]):
        found = subprocess.run(["systemd-analyze", *what, str(unit)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr
        if what[0] == "verify":
            assert found.stdout + found.stderr == ""


# readiness


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """Listen as systemd does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        heard.settimeout(10)
        yield heard


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_hears_once_that_a_service_is_ready(abstract: bool, tmp_path: Path) -> None:
    address = f"@unseen-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with manager(address) as heard:
        arguments = ["dealer", "--listen", "127.0.0.1:0", "--state", str(tmp_path / "state")]
        with process(tmp_path / "dealer.log", *arguments, NOTIFY_SOCKET=address) as dealer:
            assert heard.recv(64) == READY
            socket.create_connection(("127.0.0.1", int(dealer.address.rpartition(":")[2])), 5).close()
            assert dealer.end() == 0
        heard.setblocking(False)
        with pytest.raises(BlockingIOError):
            heard.recv(64)


def test_nobody_is_told_where_nobody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tell_ready()
    assert not caplog.records
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    tell_ready()
    assert "did not hear that this one is ready" in caplog.text


# running


def kernels_of_root(where: Path) -> Path:
    """What `python -m protocols.warm` writes, from what this process has beside the package."""
    for package in {Path(str(module.__file__)).parent for module in (kernels, digits, dpf)}:
        place = where / _CacheLocator.get_suitable_cache_subpath(str(package / "x.py"))  # type: ignore[no-untyped-call]
        place.mkdir(parents=True)
        for path in (package / "__pycache__").glob("*.nb?"):
            shutil.copy(path, place)
        place.chmod(0o555)
    return where


def started(path: Path, root: Path, **environment: str) -> Any:
    """The role of a unit as it would run: its files put in place, then its command, confined, at a free port."""
    found = settings(path)
    for kind in ("State", "Cache", "Runtime"):
        where = root / PLACES[{"State": "%S", "Cache": "%C", "Runtime": "%t"}[kind]] / found[f"{kind}Directory"][0]
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
    for line in found["LoadCredential"]:
        name, _, source = line.partition(":")
        (root / "credentials").mkdir(exist_ok=True)
        shutil.copy(placed(source, root), root / "credentials" / name)
    (prepare,) = found["ExecStartPre"]
    subprocess.run(shlex.split(placed(prepare, root)), check=True)
    words = command(path, root)
    words[words.index("--listen") + 1] = "127.0.0.1:0"
    words[words.index("--metrics") + 1] = "127.0.0.1:0"
    given = dict(
        each.split("=", 1)
        for line in found["Environment"]
        for each in placed(line, root).split()
        if "NUMBA" not in each
    )
    (root / "tmp").mkdir(exist_ok=True)
    (root / "calls").write_text("\n".join(confined.calls(found["SystemCallFilter"])))
    inside = [sys.executable, "-m", "tests.confined", str(root / "calls"), *COMMAND, *words, "--announce"]
    writable = [root / "var", root / "run", root / "tmp"]
    whole = confined.on_a_read_only_disk(inside, writable)
    return process(
        root / f"{path.stem}.log", whole=whole, HOME="/nonexistent", TMPDIR=str(root / "tmp"), **given, **environment
    )


def health(running: Process) -> str:
    (at,) = re.findall(r"numbers for Prometheus: (http://\S+)/metrics", running.log.read_text())
    with urllib.request.urlopen(f"{at}/healthz", timeout=5) as answer:
        said: str = answer.read().decode()
        return said


@pytest.mark.slow
def test_roles_run_as_their_units_confine_them(model: Ready, directory: Path, tmp_path: Path) -> None:
    """A disk that is read-only but for their own directories, no capability, and systemd's list of system calls."""
    if reason := confined.missing():
        pytest.skip(reason)
    pytest.importorskip("prometheus_client")
    pki, token = tmp_path / "pki", Token.fresh()
    for role in (SERVER, DEALER, "client"):
        app()(["certs", str(pki), role], standalone_mode=False)
        shutil.copytree(pki / role, tmp_path / "etc" / "unseen" / "tls" / role)
    (tmp_path / "etc" / "unseen" / "tokens").write_text(new_holder(token, "alice", 9).line() + "\n")
    compiled = tmp_path / "var" / "lib" / "unseen-server" / "compiled"
    compiled.parent.mkdir(parents=True, mode=0o700)
    secure.save_compiled(model.compiled, compiled)
    units = {path.stem: path for path in UNITS}
    kernels_of_root(tmp_path / "kernels")
    with started(units["unseen-dealer"], tmp_path) as dealer:
        told = {"UNSEEN_DEALER": dealer.address, "UNSEEN_SAME_OWNER": "yes"}
        with started(units["unseen-server"], tmp_path, **told) as server:
            assert health(server) == health(dealer) == "serving\n"
            deployment = secure.TwoParty(server=server.address, dealer=dealer.address)
            network = secure.Tls(tmp_path / "etc" / "unseen" / "tls" / "client")
            with secure.connect(deployment, network=network, token=token.text, cache=False) as session:
                torch.testing.assert_close(session.embed([TEXT])[0], expected(directory, TEXT), atol=5e-3, rtol=0)
            assert server.end() == 0
        assert dealer.end() == 0
    logs = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert "Traceback" not in logs
    assert sorted(p.name for p in (tmp_path / "var" / "lib" / "unseen-dealer").iterdir())[:2] == [
        "dealer.key",
        "dealer.pub",
    ]

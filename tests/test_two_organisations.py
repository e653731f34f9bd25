"""The Compose files of two organisations and a notary: what they run, as processes with certificates.

There are no containers here. Commands, variables and volumes are read from the files, and a path in a container is the
one that its volumes name in the directory of the organisation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import secure
from parties.cli.main import app
from tests.test_cli import Process, process
from tests.tiny import TEXT, WORDS, Ready, expected

yaml = pytest.importorskip("yaml")
for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module)

DEPLOY = Path(__file__).resolve().parent.parent / "examples" / "deploy"
ORGANISATIONS = {"dealer": "notary.example", "server": "models.example", "client": "clinic.example"}
NAMES = """
[roles]
"spiffe://clinic.example/unseen/client/*" = "client"
"spiffe://models.example/unseen/server/*" = "server"
"spiffe://notary.example/unseen/dealer/*" = "dealer"

[names]
server = "spiffe://models.example/unseen/server/server"
dealer = "spiffe://notary.example/unseen/dealer/dealer"
"""


def filled_in(text: str, given: dict[str, str]) -> str:
    """A text with its variables, as Compose fills them in."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if kind == ":?" and not given.get(name):
            raise AssertionError(f"{name}: {rest}")
        return given.get(name) or rest

    return re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, text)


def command_of(where: Path, file: str, name: str, **given: str) -> tuple[list[str], dict[str, str]]:
    """The arguments and variables of a service, with the paths of ``where`` in place of those in its container."""
    service = yaml.safe_load((DEPLOY / file).read_text())["services"][name]
    given = {"UNSEEN_UID": "1", "UNSEEN_GID": "1", **given}
    filled_in(service["user"], given)
    volumes = [volume.split(":")[:2] for volume in service["volumes"]]

    def outside(text: str) -> str:
        for mine, theirs in volumes:
            if text == theirs or text.startswith(f"{theirs}/"):
                return str(where / mine) + text[len(theirs) :]
        assert not text.startswith("/"), f"{text} is in no volume"
        return text

    words = [outside(filled_in(word, given)) for word in service["command"]]
    if "--listen" in words:
        words[words.index("--listen") + 1] = "127.0.0.1:0"
    if "--metrics" in words:
        words[words.index("--metrics") + 1] = "127.0.0.1:0"
    return words, {key: outside(filled_in(each, given)) for key, each in service.get("environment", {}).items()}


def running(where: Path, file: str, name: str, **given: str) -> AbstractContextManager[Process]:
    arguments, environment = command_of(where, file, name, **given)
    return process(where / f"{name}.log", *arguments, whole=(), **environment)


def exchange_certificates(tmp: Path) -> dict[str, Path]:
    """Each organisation makes its authority and its role, and trusts the others, as docs/deploy.md says."""
    places = {role: tmp / domain for role, domain in ORGANISATIONS.items()}
    for role, domain in ORGANISATIONS.items():
        app()(["certs", str(places[role] / "pki"), role, "--domain", domain], standalone_mode=False)
    for role, where in places.items():
        own = shutil.copytree(where / "pki" / role, where / "tls" / role)
        for name in ("ca.pem", "revoked.pem"):
            given = [(place / "pki" / "authority" / name).read_bytes() for place in places.values()]
            (own / name).write_bytes(b"".join(given))
        (own / "tls.toml").write_text(NAMES)
        for each in ("state", "key", "cache"):
            (where / each).mkdir(mode=0o700)
        (where / "state" / role).mkdir(mode=0o700)
    return places


@pytest.mark.slow
def test_two_organisations(model: Ready, directory: Path, tmp_path: Path) -> None:
    places = exchange_certificates(tmp_path)
    notary, models, clinic = (places[role] for role in ("dealer", "server", "client"))
    secure.save_compiled(model.compiled, models / "compiled")
    texts = [TEXT, " ".join(WORDS[7:9])]
    with running(notary, "compose.dealer.yaml", "dealer") as dealer:
        (key,) = re.findall(r"key (SHA256:\S+),", (notary / "dealer.log").read_text())
        told: dict[str, Any] = {"UNSEEN_DEALER": dealer.address, "UNSEEN_DEALER_KEY": key}
        with running(models, "compose.yaml", "server-1", **told, UNSEEN_SAME_OWNER="yes") as server:
            told |= {"UNSEEN_SERVER": server.address, "UNSEEN_PROGRAM_DIGEST": model.program.digest}
            with running(clinic, "compose.client.yaml", "proxy", **told) as proxy:
                (_, key_file), _ = command_of(clinic, "compose.client.yaml", "ask")
                asked = subprocess.run(
                    [sys.executable, str(DEPLOY / "ask.py"), f"http://{proxy.address}/v1", key_file],
                    input="\n".join(texts),
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=60,
                )
                assert proxy.end() == 0
    answers = [torch.tensor(json.loads(line), dtype=torch.float64) for line in asked.stdout.splitlines()]
    for text, answer in zip(texts, answers, strict=True):
        torch.testing.assert_close(answer, expected(directory, text), atol=5e-3, rtol=0)
    assert list((clinic / "cache" / "unseen").iterdir())  # the masked weights are kept
    assert os.stat(key_file).st_mode & 0o077 == 0
    logs = {log.stem: log.read_text() for log in tmp_path.glob("*/*.log")}
    assert logs.keys() == {"dealer", "server-1", "proxy"}
    assert "client 'spiffe://clinic.example/unseen/client/client'" in logs["server-1"]
    for said in logs.values():
        assert not any(word in said for text in texts for word in text.split())


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="UNSEEN_SERVER: host and port of the server"):
        command_of(tmp_path, "compose.client.yaml", "proxy")

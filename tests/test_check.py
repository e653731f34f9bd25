"""``unseen check``: each planted fault is found and its remedy said, each in one line."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import secure
from parties.cli import check as module
from parties.limits.tokens import Token
from parties.net import versions
from parties.net.caller import permit
from parties.net.endpoints import Endpoint
from parties.net.network import Network, Plaintext
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import (
    DealerServicer,
    ModelServicer,
    add_DealerServicer_to_server,
    add_ModelServicer_to_server,
)
from parties.served.files import state_directory
from parties.services import hosting, status
from parties.services.status import StatusService
from parties.tls.authority import Authority
from parties.tls.tls import Tls
from parties.two_party.sealing import PUBLIC_FILE, SealingKey
from secure.deployments.deployment import deployments
from secure.version import WIRE_VERSION
from tests.dealer_key import KEY
from tests.test_cli import Ended, Run, run
from tests.test_kept import small

__all__ = ["run"]  # the fixture

FREE = "127.0.0.1:0"
ROLES = [role.name for deployment in deployments() for role in deployment().roles()]
PROGRAM, OTHER = "a" * 64, "b" * 64


@contextmanager
def standing(
    role: str = "server",
    deployment: str = "two-party",
    program: str = PROGRAM,
    knows: str = PROGRAM,
    network: Network | None = None,
) -> Iterator[str]:
    """A service of which only the status answers; yields its address."""
    service = StatusService(deployment, role, ROLES, program, lambda digest: digest == knows)
    server, at = hosting.start(
        Endpoint("127.0.0.1", 0),
        [
            service.add,
            lambda server: add_DealerServicer_to_server(_Key(), server),
            lambda server: add_ModelServicer_to_server(_Model(deployment, role), server),
        ],
        network=network or Plaintext(),
        what=role,
        role=role,
        permissions={**service.permissions, **_Key.permissions, **_Model.permissions},
    )
    try:
        yield str(at)
    finally:
        server.stop(0).wait()


class _Model(ModelServicer):
    """Offers two models."""

    permissions = permit("Model", Describe=["client"])

    def __init__(self, deployment: str, role: str) -> None:
        self.deployment, self.role = deployment, role

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        offers = [pb.Offer(model=name, length=length, batch=1) for name in ("one", "two") for length in (16, 32)]
        return pb.Description(
            version=WIRE_VERSION, deployment=self.deployment, role=self.role, program=b"any", offers=offers
        )


class _Key(DealerServicer):
    """A dealer that tells its key and no more."""

    permissions = permit("Dealer", Key=ROLES)

    def Key(self, request: pb.DealerKeyRequest, context: grpc.ServicerContext) -> pb.DealerKeyReply:
        return pb.DealerKeyReply(key=KEY.public.encoded)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory in which another dealer's public key is known; returns the key's path."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    SealingKey.generate().save(state_directory())
    return state_directory() / PUBLIC_FILE


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services of other users: no two tags are equal."""
    monkeypatch.setattr(status, "owner_tag", lambda nonce: secrets.token_bytes(len(nonce)))


@contextmanager
def two_parties(dealer: dict[str, Any] | None = None, **server: Any) -> Iterator[list[str]]:
    """A server and a dealer; yields the options that find them."""
    with ExitStack() as stack:
        server_at = stack.enter_context(standing(**server))
        dealer_at = stack.enter_context(standing("dealer", **{"program": "", **(dealer or {})}))
        yield ["--server", server_at, "--dealer", dealer_at]


def found(ended: Ended, what: str, said: str, hint: str) -> None:
    """One thing is wrong: one line says it, and one says what to do."""
    lines = ended.out.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert len(wrong) == 1, ended.out
    assert wrong[0].startswith(f"WRONG {what}: "), wrong
    assert said in wrong[0]
    after = lines[lines.index(wrong[0]) + 1]
    assert after.startswith("      hint: ")
    assert hint in after
    assert ended.code == 1
    assert " wrong" in ended.err


def test_nothing_is_wrong(run: Run, others: None, tmp_path: Path) -> None:
    with two_parties() as at:
        ended = run("check", "embed", *at)
        assert ended.code == 0, ended.out
        assert "WRONG" not in ended.out
        assert f"ok    the Program: {PROGRAM}, the same everywhere" in ended.out
        assert "unseen check: all 9 are ok" in ended.err
        served = run("check", "serve", "--listen", FREE, "--state", str(tmp_path / "state"), *at[2:])
        assert served.code == 0, served.out
        assert "ok    the owner of the dealer: another user or machine" in served.out
        assert run("check", "dealer", "--listen", FREE).code == 0


# planted faults


def test_nobody_answers(run: Run, others: None) -> None:
    with two_parties() as at:
        at[3] = "127.0.0.1:1"
        found(run("check", "embed", *at), "the dealer", "127.0.0.1:1 cannot be reached", "start it with: unseen dealer")


def test_another_service_answers(run: Run, others: None) -> None:
    with two_parties(role="dealer", program="") as at:
        found(run("check", "embed", *at), "the server", "it is the dealer of two-party, not the server", "addresses")
    with two_parties(deployment="ckks") as at:
        found(run("check", "embed", *at), "the server", "it is the server of ckks", "check the addresses")


def test_another_version(run: Run, others: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with two_parties() as at:
        monkeypatch.setattr(versions, "WIRE_VERSION", 99)
        ended = run("check", "embed", *at)
        assert ended.out.count("it speaks version") == 2
        assert "hint: update it: all sides need the same version of unseen" in ended.out


def test_a_clock(run: Run, others: None, monkeypatch: pytest.MonkeyPatch) -> None:
    late = iter([0.0, -3600.0])
    now = status.clock

    def clock() -> float:
        return now() + next(late, 0.0)  # ours; then the server's, and all others

    monkeypatch.setattr(status, "clock", clock)
    with two_parties() as at:
        said = "it is 3,600 s behind this machine's"
        found(run("check", "embed", *at), "the clock of the server", said, "set both clocks")


def test_programs(run: Run, others: None) -> None:
    with two_parties() as at:
        pinned = run("check", "embed", *at, "--program-digest", OTHER)
        found(pinned, "the Program", f"the server has {PROGRAM}, this side {OTHER}", "ask the owners")
    with two_parties({"knows": OTHER}) as at:
        said = f"the dealer does not know the Program {PROGRAM}"
        found(run("check", "embed", *at), "the Program", said, "start the server with this dealer's address")


def test_parties_with_two_programs(run: Run, others: None) -> None:
    with ExitStack() as stack:
        at = [
            stack.enter_context(standing(f"party {i}", "three-party", OTHER if i == 2 else PROGRAM)) for i in range(3)
        ]
        ended = run("check", "embed", "--deployment", "three-party", "--parties", ",".join(at))
        found(ended, "the Program", f"party 2 has {OTHER}, party 1 {PROGRAM}", "ask the owners")


def test_a_port_in_use(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        found(run("check", "dealer", "--listen", at), f"port {at}", "it may be in use", "choose another port")


def test_a_seed_that_others_can_read(run: Run, tmp_path: Path) -> None:
    state = tmp_path / "s"
    state.mkdir(mode=0o700)
    (state / "weight-mask-1.seed").write_bytes(b"secret")
    (state / "weight-mask-1.seed").chmod(0o640)
    with standing("dealer", program="") as dealer:
        line = ["check", "serve", "--listen", FREE, "--state", str(state), "--dealer", dealer, "--same-owner"]
        what = f"secret files in {state}"
        found(run(*line), what, f"others may read {state}/weight-mask-1.seed (mode 0640)", "chmod go-rwx")
        (state / "weight-mask-1.seed").chmod(0o600)
        state.chmod(0o777)
        found(run(*line), what, f"others may write to {state} (mode 0777)", f"chmod go-w {state}")
        state.chmod(0o700)
        (state / "link.seed").symlink_to("/etc/hostname")
        found(run(*line), what, f"{state}/link.seed is a link", "put the file itself there")
        (state / "link.seed").unlink()
        assert run(*line).code == 0


def test_no_room(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with standing("dealer", program="") as dealer:
        line = ["check", "serve", "--listen", FREE, "--dealer", dealer, "--same-owner", "--state"]
        ended = run(*line, str(file))
        assert f"WRONG the state directory {file}: {file} cannot be written" in ended.out
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
        state = tmp_path / "state"
        ended = run(*line, str(state))
        found(ended, f"the state directory {state}", "5 MB are free, 1,074 MB may be needed", "make room")
        assert not state.exists()


def test_dealer_and_server_of_one_owner(run: Run, tmp_path: Path) -> None:
    with standing("dealer", program="") as dealer:
        ended = run("check", "serve", "--listen", FREE, "--state", str(tmp_path / "s"), "--dealer", dealer)
        found(ended, "the owner of the dealer", "it is this user on this machine", "--same-owner")


def test_a_share(run: Run, tmp_path: Path) -> None:
    ended = run("check", "party", "--id", "2", "--listen", FREE, "--share", str(tmp_path / "none"))
    found(ended, f"the share {tmp_path}/none", "No such file or directory", "unseen share-model")


def test_a_model_that_is_not_offered(run: Run, others: None) -> None:
    with two_parties() as at:
        ended = run("check", "embed", *at, "--model", "two")
        assert ended.code == 0, ended.out
        assert "ok    the model two: offered for 16, 32 tokens" in ended.out
        found(run("check", "embed", *at, "--model", "three"), "the model three", "offers no model 'three'", "one, two")


def test_models_to_serve(run: Run, others: None, tmp_path: Path) -> None:
    """Each of them is looked at: whether it is there, and was compiled with the options that are given."""
    secure.save_compiled(small("two-party"), kept := tmp_path / "kept")
    with standing("dealer", program="") as dealer:
        line = ["check", "serve", str(kept), "--listen", FREE, "--dealer", dealer, "--state", str(tmp_path / "state")]
        ended = run(*line)
        assert ended.code == 0, ended.out
        said = f"--batch 8: {kept} holds a compiled model, which was compiled with 1"
        found(run(*line, "--batch", "8"), f"the model {kept}", said, "leave --batch out")
        found(run(*line, "--also", "/no/model"), "the model /no/model", "/no/model", "")
        found(run(*line, "--memory", "1e6"), "the memory for prepared queries", "GB are free", "lower --memory")


def test_the_key_of_a_store(run: Run, others: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSEEN_STORE_KEY", raising=False)
    key = tmp_path / "store.key"
    line = ["check", "dealer", "--listen", FREE, "--store", str(tmp_path / "store")]
    found(run(*line), "the store's key", "a store needs a key", "UNSEEN_STORE_KEY")
    key.write_text("0" * 64)
    key.chmod(0o644)
    found(run(*line, "--store-key-file", str(key)), "the store's key", "others may read or write", "chmod")
    key.chmod(0o600)
    ended = run(*line, "--store-key-file", str(key))
    assert ended.code == 0, ended.out
    assert "ok    the store's key: it can be read" in ended.out


def test_tokens(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("zzz\n")
    ended = run("check", "dealer", "--listen", FREE, "--tokens", str(tmp_path / "tokens"))
    found(ended, f"tokens {tmp_path}/tokens", "line 1: a line of tokens has a SHA-256", "unseen token new")


# certificates


@pytest.fixture
def made(tmp_path: Path) -> Authority:
    """An authority of ``unseen certs``, and certificates of a client, a server and a dealer."""
    authority = Authority.make(tmp_path / "certs")
    for role in ("client", "server", "dealer"):
        authority.issue(role, role)
    return authority


@contextmanager
def under_tls(made: Authority, stranger: Path | None = None, plain: bool = False) -> Iterator[list[str]]:
    """Server and dealer under TLS, or one without; yields the options that find them. stranger: of the server."""
    server = Plaintext() if plain else Tls(stranger or made.directory / "server")
    with standing(network=server) as at, standing("dealer", program="", network=Tls(made.directory / "dealer")) as d:
        yield ["check", "embed", "--server", at, "--dealer", d, "--tls", str(made.directory / "client")]


def test_all_is_well_under_tls(run: Run, others: None, made: Authority) -> None:
    with under_tls(made) as line:
        ended = run(*line)
        assert ended.code == 0, ended.out
        assert "ok    own certificate: TLS 1.3: " in ended.out
        assert "valid" in ended.out


def test_an_expired_certificate(run: Run, others: None, made: Authority) -> None:
    with under_tls(made) as line:
        line[-1] = str(made.issue("client", "late", days=0))
        found(run(*line), "own certificate", "cert.pem has expired", "unseen certs DIRECTORY --renew")


def test_a_key_that_others_can_read(run: Run, others: None, made: Authority) -> None:
    key = made.directory / "client" / "key.pem"
    with under_tls(made) as line:
        key.chmod(0o644)
        found(run(*line), "own certificate", f"{key}", "chmod")
        key.chmod(0o600)
        key.write_bytes((made.directory / "server" / "key.pem").read_bytes())
        found(run(*line), "own certificate", f"{key}", "")


def test_a_peer_that_was_revoked(run: Run, others: None, made: Authority) -> None:
    with under_tls(made) as line:
        made.revoke(str(made.directory / "server"))
        found(run(*line), "the server", "was revoked", "unseen certs")


def test_a_peer_of_another_authority(run: Run, others: None, made: Authority, tmp_path: Path) -> None:
    other = Authority.make(tmp_path / "other")
    with under_tls(made, other.issue("server", "server")) as line:
        found(run(*line), "the server", "signed by an authority that ca.pem does not hold", "the same ca.pem")


def test_a_peer_of_another_role(run: Run, others: None, made: Authority) -> None:
    with under_tls(made) as line:
        line[3], line[5] = line[5], line[3]
        ended = run(*line)
        assert ended.out.count("WRONG") == 2
        assert ended.code == 1


def test_a_peer_without_tls(run: Run, others: None, made: Authority) -> None:
    with under_tls(made, plain=True) as line:
        found(run(*line), "the server", "does not speak TLS", "--tls DIRECTORY; nothing was sent to it")


def test_a_token_under_tls(run: Run, others: None, made: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSEEN_TOKEN", Token.fresh().text)
    with under_tls(made) as line:
        assert run(*line).code == 0


def test_another_dealer(run: Run, others: None, known: Path, made: Authority, tmp_path: Path) -> None:
    """Its key is not the one that is known; under TLS, its certificate vouches for any."""
    with two_parties() as at:
        found(
            run("check", "embed", *at), "the dealer's key", f"has the key {KEY.public.fingerprint}, not", "--dealer-key"
        )
        assert run("check", "embed", *at, "--dealer-key", KEY.public.text).code == 0
        known.unlink()
        found(run("check", "embed", *at), "the dealer's key", "is not known", "copy dealer.pub")
        state = tmp_path / "state"
        state.mkdir()
        (state / "dealer.pub").write_text(KEY.public.text)
        serving = run("check", "serve", "--listen", FREE, "--dealer", at[3], "--state", str(state), "--same-owner")
        assert f"the dealer's key: {KEY.public.fingerprint}" in serving.out, serving.out
    with under_tls(made) as line:
        assert run(*line).code == 0


# how it is asked


def test_commands_of_the_file(run: Run, others: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what the commands themselves would."""
    with two_parties() as at:
        file = tmp_path / "c.toml"
        free = f'listen = "{FREE}"\n'
        file.write_text(f'[dealer]\n{free}[serve]\n{free}dealer = "{at[3]}"\n[embed]\nserver = "{at[1]}"\n')
        monkeypatch.setenv("UNSEEN_EMBED_DEALER", at[3])
        ended = run("--config", str(file), "check")
        assert ended.code == 0, ended.out
        assert [line.rpartition(" ")[2] for line in ended.err.splitlines()][:3] == ["embed", "serve", "dealer"]
    ended = run("check", "embed", "--no-such-option")
    assert ended.code == 2
    assert "No such option" in ended.err
    assert run("check", "nothing").code == 2


def test_as_a_user_that_is_not_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.seed").write_bytes(b"x")
    tmp_path.chmod(0o700)
    (tmp_path / "secret.seed").chmod(0o600)
    uid = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    finding = module.tried("x", lambda: module._closed(tmp_path))
    assert finding.wrong
    assert "belongs to another user" in finding.said

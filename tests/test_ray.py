"""Work on a Ray cluster: what is checked without Ray, by stand-ins for a cluster, and the whole of it with Ray.

The latter is skipped where Ray is not installed (the extra ``ray``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("tokenizers")

import secure
from parties.bulk.connection import Connection
from parties.cluster import joined
from parties.cluster.dealing import DealingWorker, RayDealing, blocks
from parties.cluster.embedding import EACH, ENDED, QUERIES, Answer, EmbeddingWorker, Workers, coded, decoded
from parties.cluster.joined import TLS_FILES, Cluster, is_ours, lost, same_versions, uses_tls
from parties.services.dealing import Dealing, DealingHere, DealtModel
from parties.two_party.dealer import DealerService
from protocols.circuit import deal
from protocols.prg import Key, fresh_seed
from protocols.weights import DealerWeights
from secure.deployments.deployment import deployments
from secure.errors import DealerError, Error, HandshakeError, InputTooLong, InvalidInput, MissingPackage, PeerLost
from secure.tasks.embed import Embed
from secure.version import __version__
from tests.dealer_key import KEY
from tests.test_cli import COMMAND, ROOT, Run, in_words, process, run
from tests.tiny import LENGTH, Ready, dealing, dial, expected, sentences, serving

__all__ = ["run"]  # the fixture

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def fresh_key() -> Key:
    return Key(fresh_seed()[:16])


# the dealer's computing, anywhere


def test_dealing_is_a_function_of_keys(model: Ready) -> None:
    """The same bytes here, in a worker, and from the protocols alone."""
    mask, server, client = fresh_key(), fresh_key(), fresh_key()
    dealt = DealtModel.of(model.program, mask)
    whole = b"".join(DealingHere().corrections(dealt, server, client))
    weights = DealerWeights(mask, model.program.weight_shapes)
    assert whole == b"".join(bytes(p) for _, p in deal(model.program.circuit, server, client, weights))
    worker, program = DealingWorker(), model.program
    for _ in range(2):
        given = program.encoded, program.digest, mask.value, server.value, client.value
        assert b"".join(block.tobytes() for block in worker.deal(*given)) == whole
    assert len(worker._models) == 1
    assert mask.value.hex() not in repr(dealt)


def test_a_worker_keeps_few_models(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parties.cluster.dealing.MODELS", 2)
    worker, program, masks = DealingWorker(), model.program, [fresh_key() for _ in range(3)]
    for mask in (masks[0], masks[1], masks[0], masks[2]):
        assert sum(map(len, worker.deal(program.encoded, program.digest, mask.value, bytes(16), bytes(16)))) > 0
    assert [mask for _, mask in worker._models] == [masks[0].value, masks[2].value]


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 30))
def test_blocks_are_the_same_bytes(pieces: list[bytes], size: int) -> None:
    found = list(blocks(map(memoryview, pieces), size))
    assert b"".join(block.tobytes() for block in found) == b"".join(pieces)
    assert all(len(block) == size for block in found[:-1])
    assert all(map(len, found))


class Elsewhere(Dealing):
    """Dealing that fails at its second piece, and remembers how it ended."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.ended, self.closed = fails, list[str](), False

    def corrections(self, model: DealtModel, server: Key, client: Key) -> Iterator[bytes | memoryview]:
        try:
            for piece in model.corrections(server, client):
                yield piece
                if self.fails:
                    raise DealerError("a worker of the cluster failed")
        finally:
            self.ended.append("ended")

    def about(self) -> tuple[str, ...]:
        return ("dealt elsewhere",)

    def close(self) -> None:
        self.closed = True


def test_a_dealer_that_deals_elsewhere(model: Ready, directory: Path) -> None:
    elsewhere = Elsewhere()
    with dealing(DealerService(KEY, dealing=elsewhere)) as dealer, serving(model, dealer.address) as server:
        with dial(server, dealer) as session:
            (answer,) = session.embed(["a sentence"])
            torch.testing.assert_close(answer, expected(directory, "a sentence"), atol=5e-3, rtol=0)
        assert elsewhere.ended == ["ended"]
        elsewhere.fails = True
        with dial(server, dealer) as session:
            with pytest.raises(DealerError, match="a worker of the cluster failed"):
                session.prepare()
            with pytest.raises(PeerLost, match="has ended"):  # the number is burnt, and the session with it
                session.prepare()
    assert not elsewhere.closed  # whoever made it closes it: the service


def test_the_service_closes_its_dealing_and_says_where_it_is(tmp_path: Path) -> None:
    elsewhere = Elsewhere()
    with secure.serve(role="dealer", deployment=secure.TwoParty(), state=tmp_path, dealing=elsewhere) as service:
        assert "dealt elsewhere" in service.about
    assert elsewhere.closed


# a cluster in this process


class Call:
    def __init__(self, actor: Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *given: Any) -> Callable[[], Any]:
        return lambda: self._actor.call(self._name, given)


class Actor:
    """An actor that dies after ``dies`` answers of its streams, if that is not None."""

    def __init__(self, worker: Any, dies: int | None) -> None:
        self.worker, self.left, self.dead = worker, dies, False

    def __getattr__(self, name: str) -> Call:
        return Call(self, name)

    def call(self, name: str, given: tuple[Any, ...]) -> Any:
        if self.dead:
            raise RuntimeError("it is dead")
        return getattr(self.worker, name)(*given)

    def answers(self, name: str, given: tuple[Any, ...]) -> Iterator[Any]:
        for answer in self.call(name, given):
            if self.left == 0:
                self.dead = True
                raise RuntimeError("it died")
            if self.left is not None:
                self.left -= 1
            yield answer


class FakeCluster:
    """Actors of this process; a stream computes when it is taken. dies: by the number of an actor, see ``Actor``."""

    def __init__(self, make: Callable[[], Any], dies: dict[int, int] | None = None, count: int = 2) -> None:
        self.make, self.dies, self.count = make, dies or {}, count
        self.actors, self.given, self.cancelled, self.closed = list[Actor](), list[Any](), 0, False

    def workers(self, kind: type[Any], count: int | None) -> list[Actor]:
        assert isinstance(self.make(), kind)
        made = [Actor(self.make(), self.dies.get(len(self.actors) + i)) for i in range(count or self.count)]
        self.actors += made
        return made

    def get(self, found: Any) -> Any:
        return [each() for each in found] if isinstance(found, list) else found

    def stream(self, method: Call, ahead: int, *given: Any) -> Iterator[Any]:
        self.given.append(given)
        return method._actor.answers(method._name, given)

    def taken(self, stream: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from stream
        except RuntimeError as error:
            lost(error)

    def cancel(self, stream: Any) -> None:
        self.cancelled += 1

    def about(self) -> tuple[str, ...]:
        return ("a cluster",)

    def close(self) -> None:
        self.closed = True


def test_dealing_on_a_cluster(model: Ready) -> None:
    keys = fresh_key(), fresh_key()
    dealt = DealtModel.of(model.program, fresh_key())
    whole = b"".join(dealt.corrections(*keys))
    cluster = FakeCluster(DealingWorker)
    found = RayDealing(cluster)  # type: ignore[arg-type]
    assert b"".join(found.corrections(dealt, *keys)) == whole
    left = found.corrections(dealt, *keys)
    next(left)
    with_one_busy = found.corrections(dealt, *keys)
    next(with_one_busy)
    assert sorted(found._busy.values()) == [1, 1]  # each on a worker of its own
    left.close()  # type: ignore[attr-defined]
    with_one_busy.close()  # type: ignore[attr-defined]
    assert sorted(found._busy.values()) == [0, 0]
    assert cluster.cancelled == 3
    found.close()
    assert cluster.closed


def test_a_worker_of_the_dealer_that_dies_is_replaced(model: Ready) -> None:
    keys = fresh_key(), fresh_key()
    dealt = DealtModel.of(model.program, fresh_key())
    cluster = FakeCluster(DealingWorker, dies={0: 0}, count=1)
    found = RayDealing(cluster)  # type: ignore[arg-type]
    with pytest.raises(DealerError, match=r"a worker of the cluster failed \(RuntimeError\)"):
        b"".join(found.corrections(dealt, *keys))
    assert b"".join(found.corrections(dealt, *keys)) == b"".join(dealt.corrections(*keys))
    assert len(cluster.actors) == 2


class FakeWorker(EmbeddingWorker):
    """A worker whose answers follow from the texts. ``served``: what each that connects meets, in turn."""

    served: list[Any]

    def connect(self, connection: str) -> Any:
        return self.served.pop(0) if len(self.served) > 1 else self.served[0]

    def embed(self, options: dict[str, str], texts: list[str], first: int, retries: int) -> Iterator[Answer]:
        for number, text in enumerate(texts, first):
            if text == "lost":
                yield ENDED, b""
                yield coded(PeerLost(f"text {number}: the server is gone", "see its log"))
                return
            yield coded(InputTooLong(f"{text}: too long") if text.startswith("bad") else answer_of(text))


FACTS = (3, 2, "digest", "name", (8,), (("prompt:a", '"x: "'),))
CONNECTION = Connection(secure.TwoParty(), None, False, {"deadline": 5.0, "token": "secret token"})


def answer_of(text: str) -> Tensor:
    return torch.tensor([len(text), hash(text) % 1000, 0.1], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "served", [FACTS], raising=False)


def workers(dies: dict[int, int] | None = None, count: int = 2) -> Workers:
    return Workers(FakeCluster(FakeWorker, dies, count), CONNECTION)  # type: ignore[arg-type]


def texts_for(count: int) -> list[str]:
    return [f"{'bad' if i % 7 == 3 else 'text'} {i}" for i in range(count)]


def check(answers: list[Tensor | Error], texts: list[str]) -> None:
    assert len(answers) == len(texts)
    for text, answer in zip(texts, answers, strict=True):
        if text.startswith("bad"):
            assert isinstance(answer, InvalidInput)
            assert str(answer) == f"{text}: too long"
        else:
            assert torch.equal(answer, answer_of(text))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 2 * QUERIES - 1, 2 * QUERIES, 2 * QUERIES + 1, 500])
@pytest.mark.parametrize("actors", [1, 2, 3])
def test_texts_are_answered_in_order(count: int, actors: int) -> None:
    made, texts = workers(count=actors), texts_for(count)
    with made as asked:
        assert (asked.width, asked.program, asked.model) == (3, "digest", "name")
        check(list(asked.stream(Embed(), texts, retries=0, first=1)), texts)
    cluster: Any = made._cluster
    assert cluster.closed
    assert sum(len(given[1]) for given in cluster.given) == count
    assert all(given[0] == asdict(Embed()) for given in cluster.given)


def test_few_texts_are_read_ahead() -> None:
    read, made = 0, workers()

    def reading() -> Iterator[str]:
        nonlocal read
        for text in texts_for(10_000):
            read += 1
            yield text

    stream = made.stream(Embed(), reading(), retries=0, first=1)
    for number, _ in zip(range(1000), stream, strict=False):
        assert read <= number + (EACH * 2 + 1) * QUERIES * 2


@pytest.mark.parametrize("dies", [{0: 0}, {1: 5}, {0: 31, 1: 40}, {0: 3, 2: 3, 3: 3}, {0: 32, 1: 32}])
def test_a_worker_that_dies_is_replaced_and_no_text_is_lost(dies: dict[int, int]) -> None:
    made, texts = workers(dies), texts_for(200)
    check(list(made.stream(Embed(), texts, retries=3, first=1)), texts)
    asked = [text for given in made._cluster.given for text in given[1]]  # type: ignore[attr-defined]
    assert len(asked) > len(texts)  # some were given again


def test_after_some_deaths_it_gives_up_and_names_the_text() -> None:
    made = workers(dict.fromkeys(range(9), 4), count=1)
    stream, answers = made.stream(Embed(), texts_for(50), retries=2, first=101), list[Any]()
    with pytest.raises(PeerLost, match="text 113: a worker of the cluster is gone"):
        answers.extend(stream)
    check(answers, texts_for(12))


def test_what_ends_a_session_is_raised_behind_the_answers() -> None:
    made, answers = workers(), list[Any]()
    texts = [*texts_for(40), "lost", *texts_for(10)]
    with pytest.raises(PeerLost, match="text 47: the server is gone\nhint: see its log"):
        answers.extend(made.stream(Embed(), texts, retries=3, first=7))
    check(answers, texts[:40])


def test_workers_must_meet_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "served", [FACTS, (3, 2, "digest", "another", (8,))])
    with pytest.raises(HandshakeError, match="different Programs or weights"):
        workers()
    monkeypatch.setattr(FakeWorker, "served", [FACTS, coded(PeerLost("the server is gone"))])
    with pytest.raises(PeerLost, match="the server is gone"):
        workers()
    monkeypatch.setattr(FakeWorker, "served", [FACTS, FACTS, (3, 2, "other", "name", (8,))])
    with pytest.raises(HandshakeError, match="has another Program"):
        list(workers({0: 0}).stream(Embed(), texts_for(3), retries=1, first=1))


def test_versions_of_workers() -> None:
    same_versions([__version__, __version__], __version__)
    with pytest.raises(InvalidInput, match=r"a worker of the cluster has unseen 0\.0\.1"):
        same_versions([__version__, "0.0.1"], __version__)


def test_a_connection_travels() -> None:
    for kind in deployments():
        found = Connection.decoded(Connection(kind(), Path("tls"), False, {"pace": 0.0, "token": None}).encoded)
        assert (found.deployment, found.insecure, found.options) == (kind(), False, {"pace": 0.0, "token": None})
        assert found.tls is not None
        assert found.tls.is_absolute()
    assert "secret token" not in repr(CONNECTION)
    assert Connection.decoded(CONNECTION.encoded).options["token"] == "secret token"


def test_a_worker_embeds(model: Ready, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real worker, against real parties, in this process."""
    with dealing() as dealer, serving(model, dealer.address) as server:
        deployment = secure.TwoParty(server.address, dealer.address, KEY.public.text)
        connection = Connection(deployment, None, False, {"cache": False, "pace": 0.0, "threads": 1})
        worker = EmbeddingWorker()
        with pytest.raises(RuntimeError, match="not connected"):
            next(worker.embed({}, ["x"], 1, 0))
        width, batch, program, name, lengths, prompts = worker.connect(connection.encoded)  # type: ignore[misc]
        assert (batch, program, name) == (1, model.program.digest, model.weights_digest)
        assert (lengths, prompts) == ((LENGTH,), ())
        texts = [*sentences(2), "a " * 300]
        one, two, long = map(decoded, worker.embed({"long": "refuse"}, texts, 1, 0))
        assert isinstance(long, InvalidInput)
        for text, answer in zip(texts, (one, two), strict=False):
            torch.testing.assert_close(answer, expected(directory, text), atol=5e-3, rtol=0)
            assert len(answer) == width  # type: ignore[arg-type]
    *_, (ended, _), error = worker.embed({"long": "refuse"}, texts, 5, 0)
    assert ended == ENDED
    assert isinstance(decoded(error), PeerLost)
    code, said = worker.connect(connection.encoded)  # type: ignore[misc]
    assert isinstance(decoded((code, said)), PeerLost)


# joining


def test_without_ray(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match="ray is not installed"):
        Cluster("local")
    (tmp_path / "texts.txt").write_text("a")
    given = ["--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "o.npy")]
    in_words(run("embed", *given, "--ray", "local"), "ray is not installed", "unseen\\[ray\\]")
    in_words(run("dealer", "--state", str(tmp_path), "--ray", "local"), "ray is not installed", "unseen\\[ray\\]")


@pytest.mark.parametrize("command", [["dealer"], ["embed", "a text"]])
@pytest.mark.parametrize("option", [["--ray-workers", "2"], ["--ray-insecure"]])
def test_options_of_ray_without_it(command: list[str], option: list[str], run: Run) -> None:
    in_words(run(*command, *option), f"{option[0]} means nothing without --ray", "leave")


def test_ray_is_for_files(run: Run) -> None:
    in_words(run("embed", "a text", "--ray", "local"), "--ray means nothing without --input", "standard input")


def test_when_ray_encrypts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"RAY_USE_TLS": "1", **dict.fromkeys(TLS_FILES, "file")}
    assert uses_tls(whole)
    assert not uses_tls({})
    assert not uses_tls(whole | {"RAY_USE_TLS": "0"})
    for name in TLS_FILES:
        assert not uses_tls({k: v for k, v in whole.items() if k != name})
    assert is_ours("127.0.0.1")
    assert not is_ours("192.0.2.77")
    assert not is_ours("2001:db8::77")


class FakeRay:
    """The package ``ray``, joined to a cluster of some machines."""

    def __init__(self, *nodes: str) -> None:
        self._nodes, self.joined = nodes, 0

    def init(self, **given: Any) -> None:
        self.joined += 1

    def get_runtime_context(self) -> Any:
        return self

    gcs_address = "127.0.0.1:1"

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeManagerAddress": node, "Alive": True} for node in self._nodes]

    def shutdown(self) -> None:
        self.joined -= 1


@pytest.mark.parametrize(
    ("nodes", "strangers", "tls", "message"),
    [
        (["127.0.0.1"], True, False, "answers callers without token or certificate"),
        (["127.0.0.1"], True, True, "answers callers without token or certificate"),
        (["127.0.0.1", "192.0.2.77"], False, False, r"other machines \(192.0.2.77\), and its channels are not enc"),
        (["127.0.0.1"], False, False, ""),
        (["127.0.0.1", "192.0.2.77"], False, True, ""),
    ],
)
@pytest.mark.parametrize("address", ["local", "127.0.0.1:1"])
def test_clusters_that_are_open_are_refused(
    address: str, nodes: list[str], strangers: bool, tls: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(*nodes)
    monkeypatch.setattr(joined, "import_ray", lambda: fake)
    monkeypatch.setattr(joined, "answers_strangers", lambda at: strangers)
    monkeypatch.setattr(joined, "uses_tls", lambda environment: tls)
    if message:
        with pytest.raises(secure.EndpointError, match=message):
            Cluster(address)
        assert fake.joined == 0
    Cluster(address, insecure=bool(message)).close()
    assert fake.joined == 0


def test_ray_is_told_what_to_do_unless_its_user_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    for name in joined.DEFAULTS:
        monkeypatch.setenv(name, "said")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    joined.import_ray()
    assert {name: os.environ[name] for name in joined.DEFAULTS} == {**joined.DEFAULTS, "RAY_AUTH_MODE": "disabled"}


def test_nobody_there() -> None:
    with pytest.raises(PeerLost, match=r"Ray at 127\.0\.0\.1:1 cannot be reached"):
        joined.answers_strangers("127.0.0.1:1")


# the whole of it


def script(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


@needs_ray
@pytest.mark.slow
def test_a_real_cluster_that_answers_strangers_is_refused() -> None:
    """The cluster of this machine is open only if its owner wants that."""
    text = """
        from parties.cluster.joined import Cluster
        try:
            Cluster("local").close()
            print("joined")
        except Exception as error:
            print(type(error).__name__, error)
    """
    assert script(text).stdout == "joined\n"
    refused = script(text, RAY_AUTH_MODE="disabled").stdout
    assert refused.startswith("EndpointError Ray at ")
    assert "answers callers without token or certificate" in refused
    assert script(text.replace('"local"', '"local", insecure=True'), RAY_AUTH_MODE="disabled").stdout == "joined\n"


@needs_ray
@pytest.mark.slow
def test_real_workers_deal_the_same_bytes_and_stop_when_they_are_left(model: Ready, tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(model.program.encoded)
    ended = script(f"""
        from pathlib import Path
        from parties.cluster.dealing import RayDealing
        from parties.cluster.joined import Cluster
        from parties.services.dealing import DealingHere, DealtModel
        from protocols.prg import Key
        from secure.mpc.program import Program

        model = DealtModel.of(Program.from_bytes(Path({str(tmp_path / "program")!r}).read_bytes()), Key(b"m" * 16))
        keys = Key(b"s" * 16), Key(b"c" * 16)
        found = RayDealing(Cluster("local"), 1)
        here = b"".join(DealingHere().corrections(model, *keys))
        assert b"".join(found.corrections(model, *keys)) == here
        left = found.corrections(model, *keys)
        next(left)
        left.close()
        assert b"".join(found.corrections(model, *keys)) == here
        print(*found.about(), sep="|")
        found.close()
    """)
    assert ended.stdout.startswith("corrections are computed by 1 workers of a cluster|Ray at "), ended.stderr


@needs_ray
@pytest.mark.slow
def test_the_dealer_and_bulk_embedding_on_clusters(directory: Path, tmp_path: Path) -> None:
    source, calibration = tmp_path / "texts.txt", tmp_path / "calibration.txt"
    texts = sentences(40)
    source.write_text("\n".join([*texts, ""]) + "\n")
    calibration.write_text("\n".join(sentences()))
    ray = ["--ray", "local", "--ray-workers", "2"]
    where = ["--state", str(tmp_path / "dealer"), "--listen", "127.0.0.1:0"]
    with process(tmp_path / "dealer.log", "dealer", *where, *ray) as dealer:
        known = ["--dealer", dealer.address, "--dealer-key", str(tmp_path / "dealer" / "dealer.pub")]
        arguments = ["serve", str(directory), *known, "--listen", "127.0.0.1:0", "--length", str(LENGTH)]
        arguments += ["--calibration", str(calibration), "--state", str(tmp_path / "server"), "--same-owner"]
        with process(tmp_path / "server.log", *arguments) as server:
            output = tmp_path / "out.npy"
            asking = [*COMMAND, "embed", *known, "--server", server.address, *ray]
            asking += ["--input", str(source), "--output", str(output), "--pace", "0"]
            ended = subprocess.run(asking, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)
    assert ended.returncode == 1, ended.stderr  # the last has no embedding
    assert "41 rows in" in ended.stderr
    rows = np.load(output, allow_pickle=False)
    for text, row in zip(texts, rows, strict=False):
        torch.testing.assert_close(torch.from_numpy(row).double(), expected(directory, text), atol=5e-3, rtol=0)
    assert np.isnan(rows[-1]).all()
    said = (tmp_path / "dealer.log").read_text()
    assert "corrections are computed by 2 workers of a cluster" in said
    assert "who runs it learns all that its workers hold" in said
    seeds = [path.read_bytes() for path in (tmp_path / "server").glob("*.seed")]
    assert seeds
    assert all(json.dumps(seed.hex()) not in said for seed in seeds)

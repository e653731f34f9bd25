"""The client of the CKKS deployment: it makes the keys, encrypts, re-encrypts masked ciphertexts, and decrypts.

The secret key is made here and stays here. The client sends evaluation keys, ciphertexts and digests. Only its caller
gets decrypted values.
"""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from parties.ckks.keystore import keys_digest
from parties.net.calls import failed
from parties.net.frames import FrameReader, parts, to_frames
from parties.net.peer import Peer
from parties.net.secret_files import read_secret
from parties.net.watchdog import LASTING, Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import CkksStub
from parties.served.described import ConnectOptions, ask_description, read_description
from parties.served.files import store
from parties.telemetry.names import query_of_ciphertext
from protocols.ckks.canonical import InvalidCiphertext
from protocols.ckks.circuit import Vector
from protocols.ckks.seal import Client, Context, key_names
from protocols.wire import FrameError
from secure.ckks.client import ClientQuery
from secure.ckks.program import CkksProgram
from secure.cost.traffic import ONCE, Traffic
from secure.deployments.ckks import CLIENT, SERVER, Ckks, report
from secure.errors import Busy, InvalidInput, PeerLost, ProtocolError, printable
from secure.session.link import Ahead, Link, Report

LARGEST_KEY = 1 << 26  # bytes of the file in which a client keeps its secret key


class CkksLink(Link):
    """A link to a server, with this client's keys for its Program. A query that fails does not affect others.

    The deadline is for any one message. An evaluation may last longer, as messages report its progress, up to LASTING.
    key_seconds: seconds that it took to make the evaluation keys; 0 if the server had them already.
    """

    def __init__(self, deployment: Ckks, options: ConnectOptions) -> None:
        self.deployment = deployment.name
        self._deadline, self._told = options.deadline, options.told
        self.key_seconds = 0.0
        with ExitStack() as stack:  # whatever fails on the way closes what was opened
            self._server = Peer("the server", deployment.server, options.network, role=SERVER, start="unseen serve")
            stack.callback(self._server.close)
            self._stub = CkksStub(self._server.channel)
            description = ask_description(self._server, deployment, SERVER, options)
            found = read_description(self._server, description, SERVER, CkksProgram.from_bytes, options)
            self.program, self.model, self.once = found.program, found.model, found.once
            self.tables, self.tokenizer = found.tables, found.tokenizer
            self.compiled_as = found.compiled_as
            self._prepare_keys(Path(deployment.keys) if deployment.keys is not None else None)
            self._open = stack.pop_all()

    def close(self) -> None:
        self._open.close()

    # keys

    def _prepare_keys(self, directory: Path | None) -> None:
        """Make a secret key, or load the one that was kept, and upload evaluation keys unless the server holds them."""
        context = Context(self.program.parameters)
        # one key for each server and Program: servers could recognize a client by its evaluation keys' digest
        label = hashlib.sha256(f"{self._server.at}/{self.program.digest}".encode()).hexdigest()[:32]
        kept = directory / f"{label}.secret" if directory else None
        digest, secret = _read_secret(kept)
        if secret is None:
            self.client = Client(context)
        else:
            try:
                self.client, self.keys_digest = Client(context, secret), digest
            except InvalidCiphertext:
                raise InvalidInput(f"{kept} holds no secret key", "delete it: a new key will be made") from None
            with self._server.calling("asking for its keys", hint="try again"):
                if self._stub.Keys(pb.KeysRequest(digest=digest), timeout=self._deadline).held:
                    return
        began = time.perf_counter()
        keys = self.client.evaluation_keys(list(self.program.steps))
        self.keys_digest, self.key_seconds = keys_digest(keys), time.perf_counter() - began
        self._upload(keys)
        self.once = (*self.once, Traffic(CLIENT, SERVER, sum(map(len, keys.values())), ONCE))
        if kept is not None:
            with _usable(kept):
                store(kept, self.keys_digest.encode() + b"\n" + self.client.secret_bytes())

    def _upload(self, keys: Mapping[str, bytes]) -> None:
        with self._listening(self._stub.Upload(self._uploading(keys)), "taking the evaluation keys") as replies:
            if not any(reply.held for reply in replies):
                raise PeerLost(f"{self._server} ended the upload and holds no keys", "connect again")

    def _uploading(self, keys: Mapping[str, bytes]) -> Iterator[pb.UploadPart]:
        names = key_names(self.program.steps)
        yield pb.UploadPart(header=pb.KeysHeader(program_digest=self.program.digest, digest=self.keys_digest))
        for number, name in enumerate(names):
            if self._told:
                self._told(number, len(names), "uploading keys")
            for part in parts(keys[name]):
                yield pb.UploadPart(data=part)

    # queries

    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Vector], Report]:
        conversation = self.converse(0)
        try:
            return self.go_on(conversation, values, number)
        finally:
            self.leave(conversation)

    def converse(self, capacity: int) -> _EncryptedText:
        return _EncryptedText()

    def go_on(
        self,
        conversation: Any,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Vector], Report]:
        """Run a query in the call of its conversation; the first one opens it. One that fails ends the conversation."""
        assert isinstance(conversation, _EncryptedText)
        conversation.check(rows)
        began = time.perf_counter()
        exchange = ClientQuery(self.program, self.client)
        encrypted = exchange.inputs(values)
        if conversation.replies is None:
            start = pb.CkksStart(program_digest=self.program.digest, model=self.model, keys_digest=self.keys_digest)
            conversation.outbox.put(pb.CkksRequest(start=start))
            stream = self._stub.Query(iter(conversation.outbox.get, None))
            conversation.replies = _Heard(stream, self._deadline)
        _put(conversation.outbox, encrypted)
        try:
            with self._hearing(conversation.replies, "evaluating") as replies:
                results = exchange.results(self._answer(exchange, replies, conversation.outbox))
        except InvalidCiphertext as error:
            self.leave(conversation)
            raise ProtocolError(f"{self._server} sent no ciphertext of this Program: {error}") from None
        except Busy:  # it may be asked again, if there is nothing yet that it would have to know
            conversation.close(again=not conversation.filled)
            raise
        except BaseException:
            self.leave(conversation)
            raise
        conversation.filled += 1
        taken = report(exchange, number, time.perf_counter() - began)
        return results, replace(taken, id=query_of_ciphertext(encrypted[0]))

    def leave(self, conversation: Any) -> None:
        conversation.close()

    def _answer(
        self,
        exchange: ClientQuery,
        replies: Iterator[pb.CkksReply],
        outbox: queue.SimpleQueue[pb.CkksRequest | None],
    ) -> list[bytes]:
        """Return the encrypted outputs, after answering the refreshes on the way."""
        refreshes = self.program.refreshes
        for message in replies:
            kind = message.WhichOneof("content")
            if kind == "progress":
                if self._told:
                    p = message.progress
                    self._told(p.done, p.total, printable(p.path))
            elif kind == "failure":
                raise failed(message.failure)
            elif kind == "refresh":
                if message.refresh != exchange.rounds or message.refresh > len(refreshes):
                    raise ProtocolError(
                        f"the server asks for refresh {message.refresh}, the Program has {len(refreshes)}"
                    )
                masked = self._read(replies, self.program.reserve, len(refreshes[message.refresh - 1]))
                _put(outbox, exchange.refreshed(masked))
            elif kind == "result":
                if message.result != len(self.program.output):
                    raise ProtocolError(f"the server sends {message.result} results, not {len(self.program.output)}")
                return self._read(replies, 0, message.result)
            else:
                raise ProtocolError(f"the server sent {kind!r} where a refresh or a result was expected")
        raise PeerLost(f"{self._server} ended the query without an answer", "connect again")

    def _read(self, replies: Iterator[pb.CkksReply], level: int, count: int) -> list[bytes]:
        """Read ciphertexts of a level; raises ProtocolError if one has another size than it must."""
        out = []
        for number in range(count):
            reader, data = FrameReader(self.program.parameters.ciphertext_bytes(level)), None
            for message in replies:
                if message.WhichOneof("content") != "frame":
                    raise ProtocolError("the server sent no ciphertext where one was expected")
                try:
                    data = reader.add(message.frame)
                except FrameError as error:
                    raise ProtocolError(f"the server sent ciphertext {number + 1} of {count}: {error}") from None
                if data is not None:
                    break
            else:
                raise PeerLost(f"{self._server} ended the query within a ciphertext", "connect again")
            assert data is not None
            out.append(data)
        return out

    @contextmanager
    def _listening(self, stream: Any, doing: str) -> Iterator[Iterator[Any]]:
        """Yield the messages of a stream, each within the deadline; the stream ends with this context."""
        replies = _Heard(stream, self._deadline)
        try:
            with self._hearing(replies, doing) as messages:
                yield messages
        finally:
            replies.close()

    @contextmanager
    def _hearing(self, replies: _Heard, doing: str) -> Iterator[Iterator[Any]]:
        """Yield the messages of a stream that come from now on, and turn its errors into ours."""
        began = time.monotonic()

        def messages() -> Iterator[Any]:
            for message in replies.messages:
                if time.monotonic() - began > LASTING:
                    raise PeerLost(f"{self._server} is not done after {LASTING:g} s ({doing})", "ask its owner why")
                yield message

        with self._server.calling(doing, hint="connect again"):
            try:
                yield messages()
            except grpc.RpcError:
                if replies.watch.fired:
                    silent = f"{self._server} said nothing for {self._deadline:g} s ({doing})"
                    raise PeerLost(silent, "see the server's log") from None
                if self.ended:
                    raise PeerLost(f"this session has ended: {self.ended}", "connect again") from None
                raise


class _Heard:
    """The messages of a stream, each of which has to come within the deadline."""

    def __init__(self, stream: Any, deadline: float) -> None:
        self.watch = Watchdog(deadline, stream.cancel)
        self.messages, self._stream = self.watch.receiving(stream), stream

    def close(self) -> None:
        self.watch.stop()
        self._stream.cancel()


class _EncryptedText:
    """Queries that follow one another in one call of the service, which ends with it and forgets what they kept.

    filled: the rows that they have kept so far.
    """

    def __init__(self) -> None:
        self.outbox: queue.SimpleQueue[pb.CkksRequest | None] = queue.SimpleQueue()
        self.replies: _Heard | None = None
        self.filled, self._closed = 0, False

    def check(self, rows: int | None) -> None:
        """Raise PeerLost after the conversation's end, and InvalidInput for a query that does not read all its rows."""
        if self._closed:
            raise PeerLost("this conversation has ended", "begin another one")
        if rows not in (None, self.filled):
            raise InvalidInput(f"a query behind {rows} of {self.filled} rows", "on ciphertexts a text only goes on")

    def close(self, *, again: bool = False) -> None:
        """End the call. again: the next query opens another one."""
        if not self._closed:
            self._closed = not again
            self.outbox.put(None)
            if self.replies is not None:
                self.replies.close()
            self.outbox, self.replies = queue.SimpleQueue(), None


def _put(outbox: queue.SimpleQueue[pb.CkksRequest | None], ciphertexts: Sequence[bytes]) -> None:
    for data in ciphertexts:
        for frame in to_frames(data):
            outbox.put(pb.CkksRequest(frame=frame))


def _read_secret(kept: Path | None) -> tuple[str, bytes | None]:
    """Read the kept digest of the evaluation keys, and the secret key; the key is None if none was kept."""
    if kept is None:
        return "", None
    with _usable(kept):
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # before the upload of keys that could not be kept
        if not kept.is_file():
            return "", None
        digest, _, secret = read_secret(kept, most=LARGEST_KEY).partition(b"\n")
        return digest.decode(errors="replace"), secret


@contextmanager
def _usable(kept: Path) -> Iterator[None]:
    """Turn an OSError on the user's key file into an InvalidInput that names the file."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(f"the key {kept}: {error.strerror}", "give another directory for keys, or none") from None

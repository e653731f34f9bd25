"""Bearer tokens: they name callers that stand behind one certificate, such as the users of one organisation.

The service keeps the SHA-256 of each token, with a name and a last day, one a line in a file. To revoke a token, delete
its line; the file is read again when it changes. A token is 32 random bytes, so its digest tells nothing about it. It
crosses TLS or this machine's loopback, never another channel, and appears in no log, message or repr.

A client shows its token to every service that it calls: to server and dealer, or to all three parties. Who runs one of
them could show it to another; under TLS that takes a certificate with the client's name besides.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from parties.net.caller import Caller
from parties.net.endpoints import Endpoint, is_loopback
from parties.net.network import Network, Plaintext
from parties.net.secret_files import read_trusted
from secure.errors import EndpointError, InvalidInput, TokenError, printable

log = logging.getLogger("unseen.tokens")

HEADER, SCHEME, MARK = "authorization", "Bearer ", "unseen_"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
MAXIMUM_FILE = 1 << 20  # bytes of a file of tokens: about 10,000 lines


@dataclass(frozen=True)
class Token:
    """A token as its holder has it; its repr does not show it. Raises InvalidInput for text that cannot be one."""

    text: str = field(repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(MARK + "[A-Za-z0-9_-]{43}", self.text):
            raise InvalidInput("this is no token of unseen", f"a token begins with {MARK}; ask the service's owner")

    @classmethod
    def fresh(cls) -> Token:
        """Make a token of 32 random bytes."""
        return cls(MARK + secrets.token_urlsafe(32))

    @property
    def digest(self) -> str:
        """The SHA-256 of the token, in hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def __str__(self) -> str:
        return "a token"


class TokenHolder(NamedTuple):
    """A line of a file of tokens. until: the last day on which the token is valid."""

    digest: str
    name: str
    until: date

    def line(self) -> str:
        return f"{self.digest} {self.name} {self.until.isoformat()}"


def new_holder(token: Token, name: str, days: int) -> TokenHolder:
    """Return the line of a new token, valid for so many days. Raises InvalidInput for a name that cannot be one."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{printable(name)!r} is no name of a token", "use up to 64 letters, digits, dots, dashes, _ and @"
        )
    return TokenHolder(token.digest, name, datetime.now(UTC).date() + timedelta(days=days))


def read_holder(line: str) -> TokenHolder | None:
    """Read a line; None for one that is empty or a comment. Raises InvalidInput."""
    words = line.partition("#")[0].split()
    if not words:
        return None
    try:
        digest, name, until = words
        found = TokenHolder(digest, name, date.fromisoformat(until))
    except ValueError:
        raise InvalidInput("a line of tokens has a SHA-256, a name and a day (2027-01-31)") from None
    if not re.fullmatch("[0-9a-f]{64}", digest) or not NAME.fullmatch(name):
        raise InvalidInput("a line of tokens begins with a SHA-256 in hexadecimal digits and a name")
    return found


class Tokens:
    """The tokens of a service, in a file that it reads again when it changes.

    A line that cannot be read is an error at the start. Later it gives nobody access, and is reported in the log once;
    so does a file that is gone. Raises InvalidInput.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._seen: Any = None
        self._holders: Sequence[TokenHolder] = ()
        text = self._text()
        for number, line in enumerate(text.splitlines(), 1):
            try:
                read_holder(line)
            except InvalidInput as error:
                raise InvalidInput(f"{file}, line {number}: {error}", "make it with: unseen token new NAME") from None
        self.holders()

    def holders(self) -> Sequence[TokenHolder]:
        """Return the lines of the file as it is now."""
        with self._lock:
            try:
                found = self._file.stat()
                now: Any = (found.st_mtime_ns, found.st_size, found.st_ino)
            except OSError:
                now = ()
            if now != self._seen:
                self._seen, self._holders = now, tuple(self._read())
                log.info("%s has %d tokens", self._file, len(self._holders))
            return self._holders

    def _read(self) -> list[TokenHolder]:
        out = list[TokenHolder]()
        try:
            lines = self._text().splitlines()
        except InvalidInput as error:
            log.error("no token is valid: %s", str(error).replace("\n", "; "))
            return out
        for number, line in enumerate(lines, 1):
            try:
                if holder := read_holder(line):
                    out.append(holder)
            except InvalidInput as error:
                log.error("%s, line %d is ignored: %s", self._file, number, error)
        return out

    def _text(self) -> str:
        try:
            return read_trusted(self._file, most=MAXIMUM_FILE).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InvalidInput(
                f"tokens: {self._file} cannot be read: {why}", "make it with: unseen token new NAME"
            ) from None

    def named(self, who: Caller, context: grpc.ServicerContext) -> Caller:
        """Return the caller under the name that its token adds. Raises TokenError if it has no valid one.

        Every line is compared, in constant time, whether or not an earlier one matched.
        """
        said = [str(value) for key, value in context.invocation_metadata() or () if key == HEADER]
        if not said:
            raise TokenError(
                "this service asks every client for a token", "give it: --token-file FILE, or UNSEEN_TOKEN"
            )
        digest = hashlib.sha256(said[0].removeprefix(SCHEME).encode()).hexdigest() if len(said) == 1 else ""
        found = [holder for holder in self.holders() if hmac.compare_digest(holder.digest, digest)]
        if not found:
            raise TokenError("the token is not known here, or was revoked", "ask the service's owner for another one")
        if datetime.now(UTC).date() > found[0].until:
            raise TokenError(
                f"the token of {found[0].name!r} has expired ({found[0].until})",
                "ask the service's owner for another one",
            )
        return replace(who, name=f"{who.name}/{found[0].name}")


# the client's side


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """An interceptor of a channel that adds the token to every call."""

    def __init__(self, token: Token) -> None:
        self._header = (HEADER, SCHEME + token.text)

    def _with(self, continuation: Any, details: Any, request: Any) -> Any:
        optional = (getattr(details, name, None) for name in ("wait_for_ready", "compression"))
        metadata = [*(details.metadata or ()), self._header]
        added = _Details(details.method, details.timeout, metadata, details.credentials, *optional)
        return continuation(added, request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._with(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._with(continuation, client_call_details, request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._with(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._with(continuation, client_call_details, request_iterator)


@dataclass(frozen=True)
class WithToken(Network):
    """A network on whose channels every call shows a token. It is refused where it would cross unencrypted."""

    network: Network
    token: Token

    @property
    def proves_roles(self) -> bool:
        return self.network.proves_roles

    def check(self, endpoint: Endpoint, *, what: str) -> None:
        self.network.check(endpoint, what=what)
        if isinstance(self.network, Plaintext) and not is_loopback(endpoint.resolved()):
            raise EndpointError(
                f"{what}: the token would cross to {endpoint} unencrypted", "use certificates: unseen certs, and --tls"
            )

    def probe(self, endpoint: Endpoint, *, what: str, role: str) -> None:
        self.network.probe(endpoint, what=what, role=role)

    def channel(
        self, endpoint: Endpoint, *, what: str, role: str, met: Callable[[str], None] | None = None
    ) -> grpc.Channel:
        self.check(endpoint, what=what)
        # without encryption, one that stays on this machine, wherever the host's name leads by now
        network = Plaintext() if isinstance(self.network, Plaintext) else self.network
        return grpc.intercept_channel(network.channel(endpoint, what=what, role=role, met=met), _Bearer(self.token))

    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str, role: str) -> int:
        return self.network.bind(server, endpoint, what=what, role=role)

    def caller(self, context: grpc.ServicerContext) -> Caller:
        return self.network.caller(context)

    def about(self) -> tuple[str, ...]:
        return self.network.about()

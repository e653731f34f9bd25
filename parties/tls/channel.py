"""A channel that is pinned to its peer's certificate, and dials anew when there is a reason to look again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import grpc

from parties.net.calls import FailedCall
from parties.tls.certificates import Certificate
from parties.tls.credentials import Credentials
from secure.errors import Error, PeerLost, TlsError

_IDLE = grpc.ChannelConnectivity.IDLE.value[0]
_LOST = (grpc.ChannelConnectivity.TRANSIENT_FAILURE.value[0], grpc.ChannelConnectivity.SHUTDOWN.value[0])

Dial = Callable[[Credentials], tuple[grpc.Channel, Certificate]]
"""Finds the peer, checks its certificate, and opens a channel to the holder of that certificate alone."""


class TlsChannel(grpc.Channel):
    """A channel whose calls go through the connection that was dialled last.

    Before each call it looks whether that connection may still be used. It dials anew if the connection was lost, as
    the peer may have another certificate when it is back, and if our own files have changed. If the peer's certificate
    has ended or was revoked since, the connection is closed. A call that cannot be made fails like any other call of
    gRPC, with the reason.
    """

    def __init__(self, dial: Dial, credentials: Callable[[], Credentials]) -> None:
        self._dial, self._credentials = dial, credentials
        self._lock = threading.Lock()
        self._dialled: _Dialled | None = None
        self._closed = False

    def current(self) -> grpc.Channel:
        """Return the connection for the next call. Raises PeerLost or TlsError if there is none."""
        with self._lock:
            if self._closed:
                raise PeerLost("this side has closed the connection", "connect again")
            ours = self._credentials()
            if self._dialled is not None and not self._dialled.trusted(ours):
                self._dialled.channel.close()  # with all calls on it
                self._dialled = None
            if self._dialled is None or self._dialled.gone or self._dialled.ours is not ours:
                self._dialled = _Dialled(ours, *self._dial(ours))  # running calls keep the connection that they have
            return self._dialled.used()

    def unary_unary(self, method: str, *coders: Any, **named: Any) -> Any:
        return _Method(self, lambda channel: channel.unary_unary(method, *coders, **named), answers=False)

    def unary_stream(self, method: str, *coders: Any, **named: Any) -> Any:
        return _Method(self, lambda channel: channel.unary_stream(method, *coders, **named), answers=True)

    def stream_unary(self, method: str, *coders: Any, **named: Any) -> Any:
        return _Method(self, lambda channel: channel.stream_unary(method, *coders, **named), answers=False)

    def stream_stream(self, method: str, *coders: Any, **named: Any) -> Any:
        return _Method(self, lambda channel: channel.stream_stream(method, *coders, **named), answers=True)

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> NoReturn:
        raise NotImplementedError("a TlsChannel has no connectivity of its own: it dials when it is called")

    def unsubscribe(self, callback: Any) -> NoReturn:
        raise NotImplementedError("a TlsChannel has no connectivity of its own: it dials when it is called")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._dialled is not None:
                self._dialled.channel.close()
                self._dialled = None

    def __enter__(self) -> TlsChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Dialled:
    """A connection, the peer's certificate, and our credentials at the time."""

    def __init__(self, ours: Credentials, channel: grpc.Channel, certificate: Certificate) -> None:
        self.ours, self.channel, self.certificate = ours, channel, certificate
        self._used = False

    def used(self) -> grpc.Channel:
        """Return the channel for a call."""
        self._used = True
        return self.channel

    @property
    def gone(self) -> bool:
        """Tell whether the connection was lost: gRPC would connect again by itself, but to the same certificate.

        gRPC's public way to ask is a subscription, whose thread fails if the channel is closed at a bad moment.
        """
        core: Any = self.channel
        state = core._channel.check_connectivity_state(False)
        return state in _LOST or (self._used and state == _IDLE)

    def trusted(self, ours: Credentials) -> bool:
        """Tell whether the peer's certificate is still valid, and not revoked by the lists that we have now."""
        try:
            ours.require_not_revoked(self.certificate, "it")
            self.certificate.require_valid("it", "")
        except TlsError:
            return False
        return True


class _Method:
    """A method of the service behind a TlsChannel.

    answers: it answers with a stream, so errors come when that is read.
    """

    def __init__(self, channel: TlsChannel, bind: Callable[[grpc.Channel], Any], *, answers: bool) -> None:
        self._channel, self._bind, self._answers = channel, bind, answers

    def __call__(self, *request: Any, **options: Any) -> Any:
        return self._made(lambda method: method(*request, **options), later=self._answers)

    def with_call(self, *request: Any, **options: Any) -> Any:
        return self._made(lambda method: method.with_call(*request, **options), later=False)

    def future(self, *request: Any, **options: Any) -> Any:
        return self._made(lambda method: method.future(*request, **options), later=True)

    def _made(self, make: Callable[[Any], Any], *, later: bool) -> Any:
        """Make a call. later: it raises its error when its answer is read, and not now."""
        try:
            method = self._bind(self._channel.current())
        except Error as error:
            failed = FailedCall(error)
            if later:
                return failed
            raise failed from None
        return make(method)

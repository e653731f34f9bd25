"""A channel around another one, for what is done to messages on their way into gRPC and out of it."""

from __future__ import annotations

from typing import Any, Self

import grpc


class WrappedChannel(grpc.Channel):
    """The base of such channels: all but the methods' stubs is the inner channel's."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

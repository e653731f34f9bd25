"""The session of a shape: one that is given, or one that is opened, and closed with the shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from parties import deployments
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput
from secure.session.session import Session

Given = ParamSpec("Given")
Found = TypeVar("Found")


class Opened:
    """The base of shapes, a context manager. session: what answers.

    deployment: one with the addresses of its services, for which ``secure.connect`` is called with the options; or a
    Session that is open, which is not closed with the shape. Raises what ``secure.connect`` raises.
    """

    def __init__(self, deployment: Deployment | Session, **options: Any) -> None:
        self._own = not isinstance(deployment, Session)
        if isinstance(deployment, Session):
            if options:
                raise InvalidInput(f"{next(iter(options))} means nothing for a session that is open", "leave it out")
            self.session = deployment
        else:
            self.session = deployments.connect(deployment, **options)

    def close(self) -> None:
        """End the session, unless it was given."""
        if self._own:
            self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def aside(work: Callable[Given, Found], *arguments: Given.args, **named: Given.kwargs) -> Found:
    """Do what blocks in a thread beside the event loop, which may be a notebook's."""
    return await asyncio.to_thread(work, *arguments, **named)


def leave_out(**given: Any) -> None:
    """Raise InvalidInput for arguments of the original that have no meaning here, unless they ask for nothing."""
    for name, value in given.items():
        if value is not None:
            raise InvalidInput(f"{name} means nothing here", "leave it out")

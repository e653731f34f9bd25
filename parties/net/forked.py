"""Processes that are forked after gRPC was used: its threads are not in them, so calls there would wait for ever."""

from __future__ import annotations

import os

from secure.errors import EndpointError

_state = {"used": False, "forked": False}


def _note_fork() -> None:
    _state["forked"] = _state["used"]


os.register_at_fork(after_in_child=_note_fork)


def check(who: str) -> None:
    """Note that this process opens a channel to ``who``.

    Raises EndpointError in one that was forked from a process which had opened one.
    """
    if _state["forked"]:
        raise EndpointError(
            f"{who} cannot be reached from this process: it was forked from one that had connected before",
            'start it anew: multiprocessing.get_context("spawn"), or connect only after forking',
        )
    _state["used"] = True

"""The standard streams of a command, whatever it was started with: closed ones, and a locale that lacks characters."""

from __future__ import annotations

import io
import os
import sys


def settle_streams() -> None:
    """Make the standard streams usable, before anything is read or said.

    A stream that was closed becomes the null device, and so does its number, which the next file or connection would
    get otherwise. A character that the locale cannot write is written as an escape: an answer is not lost for it.
    Standard input is UTF-8, as files of texts are, whatever the locale says.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (until the end)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

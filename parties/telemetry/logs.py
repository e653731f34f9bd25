"""Log lines of a process, as text or as JSON, on its error output. They never hold shares, seeds, keys or inputs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

TEXT, JSON = FORMS = ("text", "json")


def tagged(**named: str) -> dict[str, Any]:
    """Return the ``extra`` of a log line: public names of what it is about, such as query or session; "" for none."""
    return {"about": {name: value for name, value in named.items() if value}}


def _about(record: logging.LogRecord) -> dict[str, str]:
    return getattr(record, "about", {})


class TextLines(logging.Formatter):
    """Lines for people: time, level, name and text, and in brackets what the line is about."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        named = " ".join(f"{name} {value}" for name, value in _about(record).items())
        return super().formatMessage(record) + (f" [{named}]" if named else "")


class JsonLines(logging.Formatter):
    """Lines for machines: one JSON object each, whose time is of UTC, and whose names are those of ``tagged``."""

    def format(self, record: logging.LogRecord) -> str:
        more = dict(_about(record))
        if record.exc_info:
            more["trace"] = self.formatException(record.exc_info)
        return json_line(record.created, record.levelname, record.name, record.getMessage(), more)


def json_line(seconds: float, level: str, logger: str, message: str, more: Mapping[str, str]) -> str:
    """Return one line in JSON. seconds: since 1970. more: what else it says, by name."""
    at = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": at, "level": level, "logger": logger, "message": message, **more}, ensure_ascii=False)


def log_to_stderr(verbose: bool, form: str = TEXT) -> None:
    """Log to the error output from now on. verbose: lines of level DEBUG too. form: one of FORMS."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == JSON else TextLines())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])

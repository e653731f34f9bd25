"""Quotas: how much each caller may use of a service in a day, counted on disk so that a restart forgets nothing.

A day is one of UTC. Preparations are counted when corrections are asked for, so a client that prepares queries and
drops them uses its quota up as well. There is no limit by default, and then nothing is counted: a number that is right
follows from the model and from the contract, and a guess would stop honest clients.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parties.net.caller import Caller
from secure.errors import InvalidInput, QuotaError, printable

QUERIES, PREPARATIONS, BYTES, SESSIONS = "queries", "preparations", "bytes", "sessions"
MAXIMUM_NAMES = 4096  # callers that are counted in one day


_Count = Annotated[int | None, Field(ge=0)]


class Quota(BaseModel):
    """The limits of one caller. queries, preparations, bytes: in a day; sessions: at a time. None: no limit."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    queries: _Count = None
    preparations: _Count = None
    bytes: _Count = None
    sessions: _Count = None


_NONE = Quota()


@dataclass(frozen=True)
class Limits:
    """The quotas of a service: that of every caller, and those of callers by name. What these leave out, every has."""

    every: Quota = _NONE
    named: Mapping[str, Quota] = field(default_factory=dict)

    @classmethod
    def read(cls, table: Mapping[str, Any], where: str) -> Limits:
        """Read a table of settings, with a table of its own for each caller that is named. Raises InvalidInput."""
        every = {name: value for name, value in table.items() if not isinstance(value, dict)}
        named = {name: value for name, value in table.items() if isinstance(value, dict)}
        return cls(
            _quota(every, f"{where} [quotas]"),
            {name: _quota(value, f"{where} [quotas.{printable(name)}]") for name, value in named.items()},
        )

    def __bool__(self) -> bool:
        return any(quota != _NONE for quota in (self.every, *self.named.values()))

    def of(self, name: str) -> Quota:
        """Return the quota of a caller."""
        own = self.named.get(name, _NONE).model_dump(exclude_none=True)
        return self.every.model_copy(update=own)

    def __str__(self) -> str:
        shown = ", ".join(f"{value:,} {name}" for name, value in self.every.model_dump(exclude_none=True).items())
        others = f"; of their own: {', '.join(map(printable, self.named))}" if self.named else ""
        return f"quota of a caller a day: {shown or 'none'}{others}"


NO_LIMITS = Limits()


def _quota(table: Mapping[str, Any], where: str) -> Quota:
    try:
        return Quota.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = get_close_matches(key, list(Quota.model_fields), n=1, cutoff=0.5)
            known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(Quota.model_fields)}"
            raise InvalidInput(f"{where}: unknown setting {printable(key)!r}", known) from None
        said = first["msg"][0].lower() + first["msg"][1:]
        raise InvalidInput(
            f"{where}: {key} = {printable(repr(first['input']))}: {said}", "give a whole number, or leave it out"
        ) from None


class Spend(Protocol):
    """A count of what callers use: it raises an Error when ``amount`` more of ``what`` is beyond a caller's quota."""

    def __call__(self, caller: Caller, what: str, amount: int) -> None: ...


def unlimited(caller: Caller, what: str, amount: int) -> None:
    """Count nothing."""


class Quotas:
    """The counts of a service's callers in the present day, and their limits.

    file: a small SQLite data base that only this user may read; None: counts are kept in memory alone. Several
    processes may share it. What the operating system has written survives the process, though a power failure may lose
    the last moments. Raises InvalidInput for a file that cannot be used.
    """

    def __init__(self, limits: Limits, file: Path | None = None) -> None:
        self.limits, self._lock, self._open = limits, threading.Lock(), Counter[str]()
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
            self._base = sqlite3.connect(file or ":memory:", timeout=10, isolation_level=None, check_same_thread=False)
            # where nobody closes it: the collector no longer does in silence. At the end threads may still use it
            weakref.finalize(self, self._base.close).atexit = False
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS used (day TEXT, caller TEXT, what TEXT, amount INTEGER NOT NULL,"
                " PRIMARY KEY (day, caller, what)) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise InvalidInput(
                f"the counts of quotas in {file} cannot be kept: {error}", "give another --state"
            ) from None

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def spend(self, caller: Caller, what: str, amount: int = 1) -> None:
        """Count ``amount`` more of queries, preparations or bytes.

        Raises QuotaError, and counts nothing, if that is beyond the caller's limit, or if its bytes are used up. Bytes
        themselves are counted after they crossed, so they raise nothing, and the last call may go beyond their limit.
        """
        day = today()
        with self._lock, self._transaction():
            self._base.execute("DELETE FROM used WHERE day < ?", (day,))
            used = self._counts(caller.name)
            if what != BYTES:
                self._check(caller, used, {what: amount})
                if not used and self._names(day) >= MAXIMUM_NAMES:
                    raise QuotaError(f"{MAXIMUM_NAMES} callers came today, which is the limit", "try again tomorrow")
            self._base.execute(
                "INSERT INTO used VALUES (?, ?, ?, ?)"
                " ON CONFLICT (day, caller, what) DO UPDATE SET amount = amount + excluded.amount",
                (day, caller.name, what, amount),
            )

    def require(self, caller: Caller) -> None:
        """Raise QuotaError if the caller's bytes are used up."""
        with self._lock:
            self._check(caller, self._counts(caller.name), {})

    def _check(self, caller: Caller, used: Mapping[str, int], more: Mapping[str, int]) -> None:
        quota = self.limits.of(caller.name)
        for what, amount in {BYTES: 1, **more}.items():
            limit = getattr(quota, what)
            if limit is not None and used.get(what, 0) + amount > limit:
                raise used_up(caller, what, limit)

    def _counts(self, name: str) -> dict[str, int]:
        rows = self._base.execute("SELECT what, amount FROM used WHERE day = ? AND caller = ?", (today(), name))
        return {str(what): int(amount) for what, amount in rows}

    @contextmanager
    def session(self, caller: Caller) -> Iterator[None]:
        """Count a session until the block ends. Raises QuotaError if the caller has as many as it may have."""
        limit = self.limits.of(caller.name).sessions
        with self._lock:
            if limit is not None and self._open[caller.name] >= limit:
                raise QuotaError(
                    f"{_who(caller)} has {limit} sessions at a time, which is its quota",
                    "close one, or try again later",
                )
            self._open[caller.name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[caller.name] -= 1
                self._open += Counter()  # drops zeros, so that names are not kept

    def used(self, name: str) -> dict[str, int]:
        """Return what a caller used today, by kind."""
        with self._lock:
            return self._counts(name)

    def _names(self, day: str) -> int:
        return int(self._base.execute("SELECT COUNT(DISTINCT caller) FROM used WHERE day = ?", (day,)).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")


def today() -> str:
    """Return the present day of UTC."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


def _who(caller: Caller) -> str:
    return f"the caller {printable(caller.name)!r}" if caller.name else "every caller without a certificate together"


def used_up(caller: Caller, what: str, limit: int) -> QuotaError:
    midnight = datetime.fromisoformat(today()) + timedelta(days=1)
    return QuotaError(
        f"the quota of {limit:,} {what} a day is used up for {_who(caller)}; a new day begins at "
        f"{midnight:%Y-%m-%d %H:%M} UTC",
        "wait until then, or ask the service's owner for a larger one ([quotas] in its settings)",
    )

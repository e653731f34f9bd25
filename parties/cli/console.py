"""The commands share two consoles, lines on the error output, announced addresses, threads, and progress bars."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from parties.telemetry.logs import JSON, TEXT, json_line
from secure.errors import printable
from secure.progress import Told

OUT = Console(highlight=False, emoji=False)
"""Answers and reports."""

ERR = Console(stderr=True, highlight=False, emoji=False)
"""Everything else that is said, so that answers can be piped on."""

EVERY = 30.0
"""Seconds between two lines on how far something is, where there is no terminal."""


_form = TEXT


def say_as(form: str) -> None:
    """Write what is said in this form of log lines from now on, so that they and it can be read alike."""
    global _form
    _form = form


def say(line: str) -> None:
    """A line on the error output, "unseen VERB: ..."."""
    if _form == JSON:
        line = json_line(time.time(), "INFO", "unseen", line, {})
    ERR.print(line, markup=False, soft_wrap=True)


def write(text: str) -> None:
    """Text for programs, as it is."""
    OUT.file.write(text)
    OUT.file.flush()


def announce(address: str) -> None:
    """Say in a line of JSON where a service listens, for whoever started it."""
    write(json.dumps({"listening": address}) + "\n")


def announced(line: str) -> str | None:
    """The address in a line of ``announce``; None for any other line."""
    if not line.startswith('{"listening"'):
        return None
    return str(json.loads(line)["listening"])


def say_error(error: BaseException) -> None:
    """A user's mistake in words: its message, then its hint."""
    first, *rest = printable(str(error)).splitlines() or [type(error).__name__]
    say(f"unseen: error: {first}")
    for line in rest:
        say(line)


def use_threads(count: int) -> None:
    """Let this process compute with so many threads; 0: see ``threads_of_all``."""
    import torch  # not above: commands that compute nothing start without it

    torch.set_num_threads(count or threads_of_all())


def threads_of_all() -> int:
    """Return what OMP_NUM_THREADS says, or one thread a processor."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if re.fullmatch("[1-9][0-9]{0,3}", named) else os.cpu_count() or 1


def get_ready(threads: int) -> None:
    """The same, and compile kernels before the first query waits for them."""
    from protocols import warm

    use_threads(threads)
    late = Late()
    try:
        late.begin("unseen: getting kernels ready ...")
        warm.warm_up()
    finally:
        late.end()


STAGE = 2.0  # seconds from one line of progress to the next, where there is no bar


class Late:
    """Says a line on the error output if what it is about lasts longer than STAGE."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._line = ""

    def begin(self, line: str) -> None:
        """Something else begins, of which ``line`` would be said; the same line goes on."""
        if line != self._line:
            self.end()
            self._line, self._timer = line, threading.Timer(STAGE, say, [line])
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """It has ended, and nothing more is said."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # no thread of it is left, so that this process may fork
        self._line, self._timer = "", None


@contextmanager
def stages(verb: str) -> Iterator[Told]:
    """A function that shows what is being done: a bar on a terminal, else a line for each stage and each STAGE."""
    said, at = "", 0.0
    with _bar(f"unseen {verb}") as bar:

        def told(done: int, total: int, what: str) -> None:
            nonlocal said, at
            bar(done, total, f"unseen {verb}: {what}")
            now = time.monotonic()
            if not ERR.is_terminal and (what != said or now - at >= STAGE):
                say(f"unseen {verb}: {what}{f', {done} of {total}' if done and total else ''} ...")
                said, at = what, now

        yield told


@contextmanager
def progress(verb: str) -> Iterator[Told]:
    """A function that shows what is being done: a bar on a terminal, else a line for each stage longer than STAGE.

    It shows nothing after the context.
    """
    late = Late()
    with _bar(f"unseen {verb}") as bar:
        ended = False

        def told(done: int, total: int, what: str) -> None:
            if ended:
                return
            bar(done, total, f"unseen {verb}: {what}")
            if not ERR.is_terminal:
                late.begin(f"unseen {verb}: {what} ...")

        try:
            yield told
        finally:
            ended = True
            late.end()


@contextmanager
def _bar(first: str) -> Iterator[Told]:
    """A function that shows a bar on the error output from its first call on, where that is a terminal.

    ``first``: what the bar says while nobody has said what is being done. The function shows nothing after the context.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        bars: list[tuple[Progress, TaskID]] = []
        ended = False

        def told(done: int, total: int, what: str) -> None:
            if not ERR.is_terminal or ended:
                return
            if not bars:
                bar = stack.enter_context(Progress(*columns, console=ERR, transient=True))
                bars.append((bar, bar.add_task(first, total=None)))
            bar, task = bars[0]
            bar.update(task, completed=done, total=total or None, description=what or first)

        try:
            yield told
        finally:
            ended = True


@contextmanager
def counting(verb: str, noun: str, total: int | None, begun: int = 0) -> Iterator[Callable[[int], None]]:
    """A function that is told how many are done, and shows that, how many a second, and the time left, if known.

    It shows a bar where the error output is a terminal, else a line every EVERY seconds. ``begun``: how many were done
    before.
    """
    start = last = time.monotonic()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[said]}"))
    with ExitStack() as stack:
        bar = None
        if ERR.is_terminal:
            bar = stack.enter_context(Progress(*columns, TimeElapsedColumn(), console=ERR, transient=True))
            task = bar.add_task(f"{verb}ing", total=total, completed=begun, said="")

        def counted(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            said = how_far(noun, done, total, (done - begun) / max(now - start, 1e-9))
            if bar is not None:
                bar.update(task, completed=done, said=said)
            elif now - last >= EVERY:
                last = now
                say(f"unseen {verb}: {said}")

        yield counted


def how_far(noun: str, done: int, total: int | None, rate: float) -> str:
    """The number that are done, of how many, how many a second, and the time left, in words."""
    of = "" if total is None else f" of {total:,}"
    left = "" if total is None or rate <= 0 else f", {in_time((total - done) / rate)} left"
    return f"{done:,}{of} {noun}, {rate:.3g} a second{left}"


def in_time(seconds: float) -> str:
    """A time in words, to about a percent."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes // 60:.0f} h {minutes % 60:.0f} min"

"""The faults of a soak: which there are, on whom, in which order, and how each is done."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos_world import Numbers, World
from benchmarks.watched import CLOCK
from tests.relay import DIRECTIONS

FROZEN = (0.5, 6.0)  # seconds of a freeze, of silence, of a delay and of a full disk
DELAYS = (0.01, 0.2)  # seconds that bytes are held back
NEAR = 200_000  # bytes within which one is changed
FULL = 4096  # bytes of a file beyond which a full disk takes nothing
JUMPS = (3 * 3600, -3 * 3600, 400 * 86400, -400 * 86400)  # seconds, of a restarted role's clock
ORPHANED = 10.0  # seconds after which a child of a killed role should have ended


@dataclass
class Fault:
    """What is done. begin: when it was done; over: when it was past, so that all should work; both on the clock of
    ``time.monotonic``. first, all: seconds from then to the first right answer to a later query, and until each client
    had one; infinity if that took too long."""

    kind: str
    on: str
    begin: float = 0.0
    over: float = 0.0
    first: float = float("inf")
    all: float = float("inf")


def deck(chance: random.Random, faults: Mapping[str, Sequence[str]]) -> Iterator[Fault]:
    """Yield faults for ever: every kind once, in random order, then every kind again. faults: by kind, on whom."""
    kinds = sorted(kind for kind, on in faults.items() if on)
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            yield Fault(kind, chance.choice(faults[kind]))


@dataclass
class Injector:
    """Does faults to a world. orphans: children that outlived the role that had started them.

    lives: the resident memory in MB of every role that was ended, when it was.
    """

    world: World
    chance: random.Random
    orphans: int = 0
    lives: list[tuple[str, float]] = field(default_factory=list)
    kinds: dict[str, Callable[[str], None]] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = {
            "kill": lambda on: self._restart(on, signal.SIGKILL),
            "terminate": lambda on: self._restart(on, signal.SIGTERM),
            "kill a client": lambda on: self._restart(on, signal.SIGKILL),
            "terminate a client": lambda on: self._restart(on, signal.SIGTERM),
            "kill a child": self._bereave,
            "freeze": self._freeze,
            "freeze a client": self._freeze,
            "cut": lambda on: self.world.relays[on].cut(),
            "silence": self._silence,
            "delay": self._delay,
            "corrupt": self._corrupt,
            "full disk": self._fill,
            "clock": self._jump,
        }

    def targets(self) -> dict[str, list[str]]:
        """By kind of fault, on whom it can be done here."""
        roles, clients, links = list(self.world.roles), list(self.world.clients), list(self.world.relays)
        out: dict[str, list[str]] = dict.fromkeys(("cut", "silence", "delay", "corrupt"), links)
        out |= dict.fromkeys(("kill", "terminate", "freeze"), roles)
        out |= dict.fromkeys((kind for kind in self.kinds if kind.endswith("client")), clients)
        out["full disk"] = [name for name, role in self.world.roles.items() if role.writes]
        out["clock"] = roles
        out["kill a child"] = [name for name, role in self.world.roles.items() if len(role.family()) > 1]
        return out

    def do(self, fault: Fault) -> None:
        """Do a fault, and return when it is past: what was killed listens again, what was frozen goes on."""
        fault.begin = time.monotonic()
        self.kinds[fault.kind](fault.on)
        fault.over = time.monotonic()

    # processes

    def _restart(self, on: str, number: int, **environment: str) -> None:
        each = self.world[on]
        family = each.family()
        if on in self.world.roles:
            self.lives.append((on, Numbers.of(family).resident))
        each.end(number)
        each.start(**environment)
        until = time.monotonic() + ORPHANED
        while any(map(alive, family)) and time.monotonic() < until:
            time.sleep(0.05)
        self.orphans += sum(map(alive, family))

    def _bereave(self, on: str) -> None:
        """Kill something that a role has started, which it has to replace."""
        with suppress(ProcessLookupError):
            os.kill(self.chance.choice(self.world[on].family()[1:]), signal.SIGKILL)

    def _freeze(self, on: str) -> None:
        each = self.world[on]
        each.signal(signal.SIGSTOP)
        self._some_time()
        each.signal(signal.SIGCONT)

    def _jump(self, on: str) -> None:
        """Start a role again with another time of day. Its later restarts have the right one."""
        self._restart(on, signal.SIGTERM, **{CLOCK: str(self.chance.choice(JUMPS))})

    def _fill(self, on: str) -> None:
        """Let no file of a role grow, by a limit of its process."""
        pids, ours = self.world[on].family(), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        for limit in (FULL, ours[0]):
            for pid in pids:
                with suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, ours[1]))
            if limit == FULL:
                self._some_time()

    # links

    def _silence(self, on: str) -> None:
        self.world.relays[on].silence()
        self._some_time()
        self.world.relays[on].speak()

    def _delay(self, on: str) -> None:
        self.world.relays[on].delay = self.chance.uniform(*DELAYS)
        self._some_time()
        self.world.relays[on].delay = 0.0

    def _corrupt(self, on: str) -> None:
        relay = self.world.relays[on]
        relay.damage(self.chance.choice(DIRECTIONS), self.chance.randrange(NEAR), self.chance.randrange(1, 256))
        until = time.monotonic() + FROZEN[1]
        while not relay.damaged and time.monotonic() < until:
            time.sleep(0.01)
        relay.heal()

    def _some_time(self) -> None:
        time.sleep(self.chance.uniform(*FROZEN))


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

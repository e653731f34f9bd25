"""Capacity: the cores, memory, disk and bandwidth of each role for a number of clients and queries, and what they cost.

It is arithmetic on the demand of one query (``secure.cost.demand``); nothing is measured here. Its rules:

- The busiest time asks ``peak`` times the mean rate of a day. Machines are as many as keep each role's processors busy
  for ``utilisation`` of that time at most.
- A query waits for a processor as in a queue of c servers with Poisson arrivals and a fixed service time (M/D/c), in
  which it waits half as long as in M/M/c; Erlang's formula gives that. Each machine has a queue of its own.
- With a store, the correlations of the busiest hours are made in the other hours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secure.cost.demand import PROCESS, QueryDemand, RoleDemand
from secure.cost.traffic import OFFLINE, ONCE, ONLINE, traffic_json
from secure.errors import InvalidInput

DAY, DAYS = 86400.0, 30  # seconds of a day; days of a month
MONTH_HOURS = 24 * DAYS
MAXIMUM_MACHINES = 1 << 20


@dataclass(frozen=True)
class Workload:
    """The load of a service.

    clients: those that are connected at once at the busiest time. queries_per_day: of all of them together.
    texts_per_query: what a query brings; it takes several runs of a Program whose batch is smaller. peak: the rate of
    the busiest time, over the mean rate. store_hours: hours of the busiest time whose correlations are made ahead and
    kept. utilisation: the part of the busiest time in which a role's processors may be busy. latency: the most seconds
    that an answer may take on average at the busiest time; None: any. sessions_per_machine: clients that a machine
    which answers them admits at once; None: any number. Raises InvalidInput for values out of range.
    """

    clients: int
    queries_per_day: float
    texts_per_query: int = 1
    peak: float = 3.0
    store_hours: float = 0.0
    utilisation: float = 0.7
    cores_per_machine: int = 4
    latency: float | None = None
    sessions_per_machine: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("clients", 1, 1 << 40),
            ("queries_per_day", 1e-9, 1e15),
            ("texts_per_query", 1, 1 << 40),
            ("peak", 1, 1e6),
            ("store_hours", 0, 23.9),
            ("utilisation", 0.01, 0.99),
            ("cores_per_machine", 1, 1 << 16),
        ):
            value = getattr(self, name)
            if not least <= value <= most:  # neither is NaN
                raise InvalidInput(f"{name.replace('_', ' ')}: {value!r}", f"from {least:g} to {most:g}")
        if self.sessions_per_machine is not None and self.sessions_per_machine < 1:
            raise InvalidInput(f"sessions per machine: {self.sessions_per_machine!r}", "1 or more")
        if self.latency is not None and not 0 < self.latency < math.inf:
            raise InvalidInput(f"latency: {self.latency!r}", "seconds, more than 0")


@dataclass(frozen=True)
class PriceList:
    """Prices, in any one currency: of an hour of a core, of an hour of a GB of memory, of a GB that leaves a machine,
    and of a GB of disk for a month. Raises InvalidInput for a negative one, and if none is given.
    """

    core_hour: float = 0.0
    gb_hour: float = 0.0
    gb_out: float = 0.0
    disk_gb_month: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:
                raise InvalidInput(f"{name.replace('_', '-')}: a price of {value!r}", "give a number, 0 or more")
        if not any(asdict(self).values()):
            raise InvalidInput("no price is given", f"one of {', '.join(n.replace('_', '-') for n in asdict(self))}")


@dataclass(frozen=True)
class RolePlan:
    """The plan of one role. Figures that nothing predicts are None.

    processor_seconds_a_text: of a text, both phases. cores: busy at the busiest time, over ``utilisation``. machines:
    of ``cores_per_machine`` cores; for clients, their number. limit: what decides that number: "cores", "network" (the
    bandwidth of one), "sessions" or "latency"; "" if one is enough. busy: the part of the busiest time in which a
    machine's cores are busy; for a client, of one core. wait: mean seconds that a run waits for a processor at the
    busiest time. memory, disk: bytes of each machine. peak_in, peak_out: bits a second of all machines together.
    day_in, day_out: bytes. month_cost: by what costs, without clients; None without prices.
    """

    role: str
    processor_seconds_a_text: float | None
    cores: float | None
    machines: int | None
    limit: str
    busy: float | None
    wait: float
    memory: int | None
    disk: int | None
    peak_in: float
    peak_out: float
    day_in: float
    day_out: float
    month_cost: Mapping[str, float] | None


@dataclass(frozen=True)
class CapacityPlan:
    """The plan of all roles for a workload. latency: mean seconds until an answer at the busiest time, if known.

    waiting: the part of it that the network alone takes. month_cost, cost_1000_texts: of all hosted roles, if known.
    """

    workload: Workload
    demand: QueryDemand
    roles: tuple[RolePlan, ...]
    latency: float | None
    waiting: float
    month_cost: float | None
    cost_1000_texts: float | None
    assumptions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        d = self.demand
        query = {
            "rounds": d.cost.rounds,
            "batch": d.batch,
            "traffic": traffic_json(d.cost.traffic),
            "seconds": d.seconds,
            "offline_seconds": d.offline_seconds,
            "waiting_seconds": d.waiting,
            "network": d.network.name,
            "roles": [asdict(role) for role in d.roles],
        }
        return {
            "workload": asdict(self.workload),
            "query": query,
            "roles": [asdict(role) for role in self.roles],
            "latency_seconds": self.latency,
            "network_seconds": self.waiting,
            "month_cost": self.month_cost,
            "cost_1000_texts": self.cost_1000_texts,
            "assumptions": list(self.assumptions),
        }


def plan(demand: QueryDemand, workload: Workload, prices: PriceList | None = None) -> CapacityPlan:
    """Plan each role for a workload.

    Raises InvalidInput if no number of machines answers it: the network alone takes longer than the latency, clients
    cannot ask so much one query after the other, or the hours of the store bring more queries than a day has.
    """
    runs = -(-workload.texts_per_query // demand.batch)
    rates = _Rates.of(workload, runs)
    least = runs * demand.waiting
    if workload.latency is not None and least > workload.latency:
        raise InvalidInput(
            f"the network alone takes {least:.3g} s of a query ({runs * demand.cost.rounds} rounds on "
            f"{demand.network.name}); the latency asked for is {workload.latency:g} s",
            "a network with a shorter round trip, a Program compiled for this one (--network), or fewer texts a query",
        )
    client, *hosted = demand.roles
    pools = {role.role: _pool(demand, role, workload, rates) for role in hosted}
    alone = _response(demand, workload, runs, {})
    if workload.latency is not None:
        if alone is None:
            raise InvalidInput("nothing predicts how long a query takes here", "leave the latency out")
        if alone > workload.latency:
            raise InvalidInput(
                f"a query takes {alone:.3g} s on idle machines, {least:.3g} s of it on the network alone "
                f"({demand.network.name}); the latency asked for is {workload.latency:g} s",
                "faster processors, fewer texts a query, or correlations made ahead (a store)",
            )
        _widen(demand, workload, runs, pools)
    response = _response(demand, workload, runs, pools)
    if response is not None and rates.queries * response > workload.clients:
        raise InvalidInput(
            f"{workload.clients} clients that ask one query at a time, of {response:.3g} s each, ask "
            f"{workload.clients / response:.3g} a second at most; the busiest time has {rates.queries:.3g}",
            "more clients at once, fewer queries a day, or a lower peak",
        )
    plans = [_planned(demand, workload, rates, client, None, response, prices)]
    plans += [_planned(demand, workload, rates, role, pools[role.role], response, prices) for role in hosted]
    bills = [role.month_cost for role in plans[1:]]
    total = None if prices is None or any(b is None for b in bills) else sum(sum(b.values()) for b in bills if b)
    texts = workload.queries_per_day * workload.texts_per_query * DAYS
    return CapacityPlan(
        workload,
        demand,
        tuple(plans),
        response,
        least,
        total,
        None if total is None else total / texts * 1000,
        _assumptions(demand, workload, runs, prices),
    )


@dataclass(frozen=True)
class _Rates:
    """Rates at the busiest time: queries and runs of the Program a second, and runs in other hours, for a store.

    made: correlations made a second in the other hours; without a store they are made with each run.
    """

    queries: float
    runs: float
    other: float
    made: float

    @staticmethod
    def of(workload: Workload, runs: int) -> _Rates:
        busiest = workload.queries_per_day / DAY * workload.peak
        if not (hours := workload.store_hours):
            return _Rates(busiest, busiest * runs, 0.0, 0.0)
        left = workload.queries_per_day - busiest * 3600 * hours
        if left < 0:
            raise InvalidInput(
                f"{hours:g} hours of {workload.peak:g} times the mean rate are more than the whole day",
                f"{24 / workload.peak:g} hours or fewer",
            )
        others = DAY - 3600 * hours
        return _Rates(busiest, busiest * runs, left * runs / others, workload.queries_per_day * runs / others)

    def most(self, online: float, offline: float) -> float:
        """Return the larger of what both times take, by what one run takes of each phase."""
        if not self.made:
            return self.runs * (online + offline)
        return max(self.runs * online, self.other * online + self.made * offline)


@dataclass
class _Pool:
    """The machines of one role; ``count`` of them share its load."""

    count: int
    limit: str
    cores: int
    rate: float  # runs a second that wait here
    service: float  # processor seconds of one

    @property
    def wait(self) -> float:
        """The mean seconds for which a run waits for a processor."""
        return queue_wait(self.cores, self.rate / self.count, self.service)


def _pool(demand: QueryDemand, role: RoleDemand, workload: Workload, rates: _Rates) -> _Pool | None:
    """Return as many machines as a role's processors and links take; None if nothing predicts its work."""
    if role.online is None or role.offline is None:
        return None
    links = (_moved(demand, role.role, way) for way in ("sender", "receiver"))
    carried = max(rates.most(moved[ONLINE], moved[OFFLINE]) for moved in links)
    needed = {
        "cores": rates.most(role.online, role.offline) / workload.cores_per_machine,
        "network": carried / demand.network.bandwidth,
    }
    needed = {name: machines / workload.utilisation for name, machines in needed.items()}
    if workload.sessions_per_machine is not None and role.online:
        needed["sessions"] = workload.clients / workload.sessions_per_machine
    limit = max(needed, key=lambda name: needed[name])
    count = max(1, math.ceil(needed[limit]))
    if count > MAXIMUM_MACHINES:
        raise InvalidInput(f"{count} machines of the {role.role}", "fewer queries, or more cores a machine")
    service = role.online + (0.0 if rates.made else role.offline)
    return _Pool(count, limit if count > 1 else "", workload.cores_per_machine, rates.runs, service)


def queue_wait(servers: int, rate: float, service: float) -> float:
    """Return the mean wait in a queue M/D/c: half of that in M/M/c, by Erlang's formula.

    rate: arrivals a second; service: seconds. Infinite if the servers cannot do it.
    """
    load = rate * service
    if load >= servers:
        return math.inf
    blocked = 1.0
    for n in range(1, servers + 1):  # Erlang B, from which Erlang C follows
        blocked = load * blocked / (n + load * blocked)
    waits = blocked / (1 - load / servers * (1 - blocked))
    return waits * service / (servers - load) / 2


def _response(demand: QueryDemand, workload: Workload, runs: int, pools: Mapping[str, _Pool | None]) -> float | None:
    """Return the mean seconds of a query, of which each run follows the one before."""
    if demand.seconds is None or demand.offline_seconds is None:
        return None
    offline = 0.0 if workload.store_hours else demand.offline_seconds
    return runs * (demand.seconds + offline + sum(pool.wait for pool in pools.values() if pool))


def _widen(demand: QueryDemand, workload: Workload, runs: int, pools: Mapping[str, _Pool | None]) -> None:
    """Add machines where runs wait longest, until the latency is met."""
    assert workload.latency is not None
    known = [pool for pool in pools.values() if pool]
    while (found := _response(demand, workload, runs, pools)) is not None and found > workload.latency:
        longest = max(known, key=lambda pool: pool.wait)
        longest.count, longest.limit = longest.count + 1 + longest.count // 16, "latency"
        if longest.count > MAXIMUM_MACHINES:
            raise InvalidInput(
                f"a query takes {found:.3g} s; the latency asked for is {workload.latency:g} s", "a longer latency"
            )


def _planned(
    demand: QueryDemand,
    workload: Workload,
    rates: _Rates,
    role: RoleDemand,
    pool: _Pool | None,
    response: float | None,
    prices: PriceList | None,
) -> RolePlan:
    client = role is demand.roles[0]
    machines = workload.clients if client else pool.count if pool else None
    both = None if role.online is None or role.offline is None else role.online + role.offline
    busy = None if role.online is None or role.offline is None else rates.most(role.online, role.offline)
    runs = -(-workload.texts_per_query // demand.batch)
    cores = 1 if client else workload.cores_per_machine
    memory = disk = None
    if machines is not None:
        sessions = 1 if client else math.ceil(workload.clients / machines)
        at_once = min(sessions, math.ceil(rates.queries * (response or 0.0) / machines))
        memory = PROCESS + role.held + sessions * role.session + max(1, at_once) * role.running
        kept = 0.0 if client else rates.runs * 3600 * workload.store_hours / machines
        disk = role.files + math.ceil(kept * role.stored)
    moved = {way: _moved(demand, role.role, way) for way in ("receiver", "sender")}
    a_day = workload.queries_per_day * runs
    once = {way: moved[way][ONCE] * workload.clients for way in moved}
    day = {way: a_day * (moved[way][ONLINE] + moved[way][OFFLINE]) + once[way] / DAYS for way in moved}
    peak = {way: 8 * rates.most(moved[way][ONLINE], moved[way][OFFLINE]) for way in moved}
    bill = None
    if prices is not None and not client and machines is not None and memory is not None and disk is not None:
        bill = {
            "cores": machines * cores * MONTH_HOURS * prices.core_hour,
            "memory": machines * memory / 1e9 * MONTH_HOURS * prices.gb_hour,
            "traffic out": day["sender"] * DAYS / 1e9 * prices.gb_out,
            "disk": machines * disk / 1e9 * prices.disk_gb_month,
        }
    return RolePlan(
        role.role,
        None if both is None else both * runs / workload.texts_per_query,
        None if busy is None else busy if client else busy / workload.utilisation,
        machines,
        "" if pool is None else pool.limit,
        None if busy is None or machines is None else busy / machines / cores,
        pool.wait if pool else 0.0,
        memory,
        disk,
        peak["receiver"],
        peak["sender"],
        day["receiver"],
        day["sender"],
        bill,
    )


def _moved(demand: QueryDemand, role: str, way: str) -> dict[str, int]:
    found = {ONCE: 0, OFFLINE: 0, ONLINE: 0}
    for link in demand.cost.traffic:
        if getattr(link, way) == role:
            found[link.phase] += link.bytes
    return found


def _assumptions(demand: QueryDemand, workload: Workload, runs: int, prices: PriceList | None) -> tuple[str, ...]:
    batches = "" if runs == 1 else f", in {runs} runs of the Program, one after the other"
    out = [
        f"all clients together ask {workload.queries_per_day:,.10g} queries a day, of {workload.texts_per_query} "
        f"text(s) each{batches}; a run carries {demand.batch}, whether it is full or not",
        f"the busiest time has {workload.peak:g} times the mean rate; then processors are busy for "
        f"{workload.utilisation:.0%} of the time at most",
        f"every machine has {workload.cores_per_machine} cores like one of this machine, on which kernels and messages "
        "were timed with one thread; a service uses all of them",
        f"between all roles: {demand.network.name}; each machine has its bandwidth, for that part of it at most",
        "waiting for a processor: a queue M/D/c on each machine, half of Erlang's M/M/c; how rounds of several queries "
        "interleave on a core is not modelled",
        f"memory: {PROCESS / 1e6:.0f} MB a process, the model, one prepared query of each connected client, and the "
        "queries that run; one process a machine",
        "bytes are payloads: TCP, TLS and gRPC add some percent; processor time of TLS is not counted",
        "how many sessions a service admits is not looked at"
        if workload.sessions_per_machine is None
        else f"a machine that answers clients admits {workload.sessions_per_machine} of them at once",
        f"a month has {DAYS} days; a client that connects downloads or uploads its files once a month",
    ]
    if workload.store_hours:
        out.append(
            f"the store is full when the busiest {workload.store_hours:g} h begin, and is filled in the other hours; "
            "its disk takes no time"
        )
    else:
        out.append("there is no store: each query's correlations are made just before it")
    if prices is not None:
        out.append("machines are paid for whole months, whatever their load; clients pay for their own")
    return (*out, *demand.remarks)

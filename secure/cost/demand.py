"""The demand of one query on each role of a deployment: processor seconds, memory, files, bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from protocols.matmul import native
from protocols.protocol import CLIENT, SERVER
from protocols.wire import Wire
from secure.cost.count import Memory, profile
from secure.cost.kernel_times import measure
from secure.cost.offline_times import measure_offline
from secure.cost.projection import Transport, project
from secure.cost.runnable import Deployed
from secure.cost.traffic import ONLINE, Cost
from secure.mpc.network import NetworkSpeed
from secure.mpc.program import Program

WORD = 8  # bytes of a ring element in memory
PACKED = 32  # bytes of one in the form of the matrix kernel at most, where that is another
KEPT, TABLE = 2, 4  # bytes of a weight, and of a token table's element, in a kept model

PROCESS = 460_000_000
"""The bytes of memory of a process that has loaded Python, torch, gRPC and the kernels, and no model (measured)."""


@dataclass(frozen=True)
class RoleDemand:
    """The demand of one query on one role, and what the role holds meanwhile.

    online, offline: processor seconds of a query; None if nothing predicts them. Bytes of memory: ``held`` while it
    runs, beside PROCESS; ``session`` for each client that is connected; ``running`` for each query that runs. Bytes on
    disk: ``files`` of the model; ``stored`` for each query whose correlations are kept in a store.
    """

    role: str
    online: float | None = None
    offline: float | None = None
    held: int = 0
    session: int = 0
    running: int = 0
    files: int = 0
    stored: int = 0


@dataclass(frozen=True)
class QueryDemand:
    """The demand of one query, which carries ``batch`` inputs.

    roles: the client first. seconds, offline_seconds: projected for one query on idle machines; None if nothing
    predicts them. network: the one between all roles. remarks: what is left out.
    """

    cost: Cost
    roles: tuple[RoleDemand, ...]
    batch: int
    network: NetworkSpeed
    seconds: float | None = None
    offline_seconds: float | None = None
    remarks: tuple[str, ...] = ()

    @property
    def waiting(self) -> float:
        """The least seconds of a query, whatever the machines: half a round trip a round, and its busiest link."""
        links = [link.bytes for link in self.cost.traffic if link.phase == ONLINE]
        return self.cost.rounds * self.network.round_trip / 2 + max(links, default=0) / self.network.bandwidth


@dataclass(frozen=True)
class Holding:
    """The bytes of a model that a role holds in memory and on disk."""

    memory: int
    files: int = 0


def circuit_demand(
    running: Deployed,
    cost: Cost,
    roles: Sequence[str],
    holds: Mapping[str, Holding],
    batch: int,
    network: NetworkSpeed,
    transport: Transport,
    remarks: Sequence[str],
    *,
    shared: bool = False,
) -> QueryDemand:
    """Measure a circuit's work on this machine; no weights are needed.

    running: the circuit as the deployment runs it. roles: all roles, the client first; of one that does not compute on
    the circuit only ``holds`` is known. transport: measured messages between processes here. shared: one prepared query
    is kept for all clients together, not one for each.
    """
    found, timings, offline = profile(running), measure(running), measure_offline(running)
    first, second = running.names
    between = found.total.to_first + found.total.to_second
    work = {
        name: timings.compute(party) + timings.wire(party) + transport.work(found.total.rounds, between)
        for name, party in ((first, SERVER), (second, CLIENT))
    }
    sending, getting = (found.total.dealt * each for each in (transport.send_work, transport.get_work))
    largest = max((i.protocol.dealt_bytes for i in running.circuit), default=0)
    roles_of = [
        _computing(name, work[name], memory, shared) for name, memory in zip(running.names, found.memory, strict=True)
    ]
    known = {
        first: replace(roles_of[SERVER], offline=getting, stored=found.total.dealt),
        second: replace(roles_of[CLIENT], offline=offline.preparing),
        # while it deals, the masks of results are alive, and corrections of one instruction twice
        running.dealer: RoleDemand(
            running.dealer, 0.0, offline.dealing + sending, running=2 * found.memory[SERVER].live + 2 * largest
        ),
    }
    arriving = found.total.dealt / network.bandwidth
    return QueryDemand(
        cost,
        tuple(_holding(known.get(name, RoleDemand(name)), holds.get(name)) for name in roles),
        batch,
        network,
        project(found, timings, transport, network).seconds,
        network.round_trip + max(offline.dealing + sending, getting, arriving, offline.preparing),
        (*remarks, *busy_machine()),
    )


def _computing(name: str, online: float, memory: Memory, shared: bool) -> RoleDemand:
    """Return the online demand of a role that runs the circuit. Each step needs about as much again as its results."""
    session, held = (0, memory.correlations) if shared else (memory.correlations, 0)
    return RoleDemand(name, online, held=held, session=session, running=memory.correlations + 2 * memory.live)


def _holding(role: RoleDemand, holding: Holding | None) -> RoleDemand:
    return replace(role, held=role.held + holding.memory, files=holding.files) if holding else role


def busy_machine() -> tuple[str, ...]:
    """Say that other work may have made measured times too long, if the machine has more than its processors can do."""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load <= processors:
        return ()
    return (
        f"this machine was busy while times were measured (load average {load:.1f} on {processors} processors): "
        "they may be too long",
    )


def weight_bytes(program: Program, copies: int = 1) -> int:
    """Return the bytes of a Program's weights in memory, in so many copies, ready for products."""
    elements = _elements(program)
    return copies * WORD * elements + (0 if native() else PACKED * elements)


def masked_bytes(program: Program) -> int:
    """Return the bytes of masked weights, as they are sent to clients."""
    return sum(Wire(tuple(program.weight_shapes[n]), bits).size for n, bits in program.weight_rings.items())


def table_elements(program: Program) -> int:
    """Return the number of elements of all token tables that clients hold."""
    return sum(spec.size * spec.shape[-1] for spec in program.client_inputs if spec.encoding == "client-table")


def kept_bytes(program: Program) -> int:
    """Return about the bytes of a compiled model on disk."""
    return KEPT * _elements(program) + TABLE * table_elements(program)


def _elements(program: Program) -> int:
    return sum(math.prod(shape) for shape in program.weight_shapes.values())

"""The base of deployments by secret sharing, which share one compiler and count costs on the Program's circuit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from secure.cost.circuit_profile import Weightless, checks_price, circuit_profile, failure
from secure.cost.demand import Holding, QueryDemand, circuit_demand
from secure.cost.outline import SHAPES, is_shape, outline_shape
from secure.cost.projection import Transport
from secure.cost.report import ProfileReport
from secure.cost.runnable import Deployed
from secure.cost.traffic import Cost, links
from secure.deployments.deployment import CompileOptions, Deployment, ProfileOptions, batch_of
from secure.deployments.in_process import plain_reference
from secure.errors import InvalidInput
from secure.frontend import Size
from secure.lowering.client_inputs import check_tables, table_shapes
from secure.mpc import compile as mpc
from secure.mpc import kept
from secure.mpc.network import LOOPBACK, NETWORKS, NetworkSpeed
from secure.mpc.prices import DEFAULT, Prices
from secure.mpc.program import Program
from secure.polynomial.recipe import Recipe
from secure.progress import Told, silent
from secure.tasks.embed import LENGTH

DEPTH = 3  # parts of a module path that a profile tells apart


@dataclass(frozen=True)
class CircuitDeployment(Deployment):
    """A deployment by secret sharing. Each can run every Program, so that a Program's cost is known in each.

    untimed: what the demand of a query leaves out. shares_correlations: those that are made ahead serve any client.
    """

    untimed: ClassVar[tuple[str, ...]] = ()
    shares_correlations: ClassVar[bool] = False

    @property
    def prices(self) -> Prices:
        """The prices of rounds and bytes, by which the compiler chooses among protocols for this deployment."""
        return DEFAULT

    @abstractmethod
    def deployed(self, program: Program) -> Deployed:
        """Return the circuit that the two computing parties run for a Program, with the names of the roles."""

    def build(
        self,
        model: nn.Module,
        samples: Sequence[Mapping[str, Tensor]],
        options: CompileOptions,
        labels: Mapping[str, str],
        told: Told = silent,
    ) -> mpc.MpcModel:
        return mpc.compile(
            model,
            samples[0],
            calibration=samples[1:],
            labels=labels,
            prices=self.prices,
            told=told,
            **options.given,
        )

    def build_sizes(
        self,
        model: nn.Module,
        sizes: Sequence[tuple[Size, Mapping[str, str] | None]],
        options: CompileOptions,
        told: Told = silent,
        *,
        public_positions: bool = False,
    ) -> Sequence[mpc.MpcModel]:
        """Compile a module for several sizes, see ``secure.mpc.compile.compile_sizes``."""
        return mpc.compile_sizes(
            model, sizes, public_positions=public_positions, prices=self.prices, told=told, **options.given
        )

    def keep(self, model: mpc.MpcModel) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        return kept.keep(model)

    def restore(
        self, program: bytes, tables: Mapping[str, Tensor], facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> mpc.MpcModel:
        public = Program.from_bytes(program)
        held = check_tables(tables, table_shapes(public.client_inputs), public.labels)
        return kept.restore(public, held, facts, tensors)

    def cost(self, model: mpc.MpcModel | Weightless) -> Cost:
        return self.price(model.program)

    def outline(
        self, model: str, length: int, options: CompileOptions, *, polynomial: bool = False, batch: int = 1
    ) -> Weightless | None:
        if is_shape(model):
            given = options.given | {"recipe": Recipe() if polynomial else None, "batch": batch}
            program = outline_shape(model, length or LENGTH, prices=self.prices, **given)
            return Weightless(program)
        if polynomial:
            raise InvalidInput(
                "polynomial is for shapes", f"a trained model's directory, or one of {', '.join(SHAPES)}"
            )
        return None

    def profile(self, model: mpc.MpcModel | Weightless, options: ProfileOptions) -> ProfileReport:
        default = {LOOPBACK: None, **{n.key: n for n in NETWORKS}}
        program, transport = model.program, options.transport and options.transport()
        return circuit_profile(
            self.name,
            program,
            self.deployed(program),
            self.price(program),
            options.networks if options.networks is not None else default,
            transport,
            options.depth or DEPTH,
            (*self.choices(model), *self.remarks(program)),
        )

    def demand(
        self, model: mpc.MpcModel | Weightless, network: NetworkSpeed, transport: Callable[[], Transport]
    ) -> QueryDemand:
        program, roles = model.program, [role.name for role in self.roles()]
        return circuit_demand(
            self.deployed(program),
            self.price(program),
            roles,
            self.holdings(program),
            batch_of(model),
            network,
            transport(),
            self.untimed,
            shared=self.shares_correlations,
        )

    @abstractmethod
    def holdings(self, program: Program) -> Mapping[str, Holding]:
        """Return what each role holds of a model in memory and in files, by role."""

    def choices(self, model: mpc.MpcModel | Weightless) -> tuple[str, ...]:
        choice = getattr(model, "choice", None)
        own = (self.prices.words,) if self.prices != DEFAULT else ()
        return (*own, *((choice.words,) if choice else ()))

    def remarks(self, program: Program) -> tuple[str, ...]:
        return (failure(program), checks_price(program))

    def reference(self, model: mpc.MpcModel, inputs: Mapping[str, Tensor]) -> Any:
        return plain_reference(model, inputs)

    def check_writing(self) -> None:
        """By shares every model that is a decoder writes text."""

    def price(self, program: Program) -> Cost:
        running = self.deployed(program)
        return Cost(running.cost.rounds, links(running.cost, *running.names, running.dealer), program.failure_bound)

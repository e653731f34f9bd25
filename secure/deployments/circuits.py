"""What deployments that run a Program's circuit have in common: the compiler, and costs counted on the circuit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secure.cost.runnable import Deployed
from secure.cost.traffic import Cost, links
from secure.deployments.deployment import CompileOptions, Deployment
from secure.deployments.in_process import plain_reference
from secure.mpc import compile as mpc
from secure.mpc.program import Program


@dataclass(frozen=True)
class CircuitDeployment(Deployment):
    """A deployment by secret sharing. All of them run the same Programs, so a Program can be priced in each."""

    @abstractmethod
    def deployed(self, program: Program) -> Deployed:
        """The circuit that the two computing parties run, and the names of those who take part in it."""

    def build(
        self,
        model: nn.Module,
        samples: Sequence[Mapping[str, Tensor]],
        options: CompileOptions,
        labels: Mapping[str, str],
    ) -> mpc.MpcModel:
        return mpc.compile(model, samples[0], calibration=samples[1:], labels=labels, **options.given)

    def cost(self, model: mpc.MpcModel) -> Cost:
        return self.price(model.program)

    def reference(self, model: mpc.MpcModel, inputs: Mapping[str, Tensor]) -> Any:
        return plain_reference(model, inputs)

    def price(self, program: Program) -> Cost:
        """One query of a Program, with or without its weights."""
        running = self.deployed(program)
        return Cost(running.cost.rounds, links(running.cost, *running.names, running.dealer), program.failure_bound)

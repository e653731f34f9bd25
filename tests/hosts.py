"""A small text model, and the parties of every deployment hosted in this process, with a relay before each service."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

import secure
from parties.three_party.shared_model import share_model
from secure.deployments.compiled import build
from secure.deployments.deployment import CompileOptions, Deployment
from secure.deployments.three_party import PARTIES
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import text_inputs
from secure.tasks.task import Loaded
from tests.relay import Relay
from tests.tiny import LENGTH, sentences


class TinyText(nn.Module):
    """Token ids to four numbers, in polynomial form, so that every deployment takes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, 4)
        self.first, self.last = nn.Linear(4 * LENGTH, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.first(self.table(input_ids).flatten(1))
        out: Tensor = self.last(x + 0.25 * x * x)
        return out


# every deployment, hosted here


Hosts = Callable[[ExitStack, secure.Compiled, Path], tuple[Deployment, dict[str, Relay]]]


def host_two(stack: ExitStack, compiled: secure.Compiled, state: Path) -> tuple[Deployment, dict[str, Relay]]:
    dealer = stack.enter_context(secure.serve(role="dealer", deployment=compiled.deployment))
    relays = {"dealer": stack.enter_context(Relay(dealer.address))}
    peers = {"dealer": relays["dealer"].address}
    server = stack.enter_context(secure.serve(compiled, role="server", peers=peers, state=state, deadline=5.0))
    relays["server"] = stack.enter_context(Relay(server.address))
    return secure.TwoParty(server=relays["server"].address, dealer=relays["dealer"].address), relays


def host_three(stack: ExitStack, compiled: secure.Compiled, state: Path) -> tuple[Deployment, dict[str, Relay]]:
    share_model(compiled, state)
    relays: dict[str, Relay] = {}
    for number, needs in ((2, ()), (0, (2,)), (1, (0, 2))):
        peers = {PARTIES[n]: relays[PARTIES[n]].address for n in needs}
        share, options = state / f"party-{number}", {"ahead": 0} if number == 0 else {}
        party = secure.serve(
            share, role=PARTIES[number], deployment=compiled.deployment, peers=peers, deadline=5.0, **options
        )
        relays[PARTIES[number]] = stack.enter_context(Relay(stack.enter_context(party).address))
    return secure.ThreeParty(parties=tuple(relays[name].address for name in PARTIES)), relays


def host_ckks(stack: ExitStack, compiled: secure.Compiled, state: Path) -> tuple[Deployment, dict[str, Relay]]:
    server = stack.enter_context(secure.serve(compiled, role="server", state=state, deadline=5.0))
    relays = {"server": stack.enter_context(Relay(server.address))}
    return secure.Ckks(server=relays["server"].address), relays


HOSTS: dict[type[Deployment], Hosts] = {
    secure.TwoParty: host_two,
    secure.ThreeParty: host_three,
    secure.Ckks: host_ckks,
}


def compiled_tiny(directory: Path, deployment: Deployment) -> secure.Compiled:
    """The small model with the tokenizer of ``directory``, compiled."""
    tokenizer, raw = load_tokenizer(directory), (directory / "tokenizer.json").read_bytes()
    samples = [text_inputs(tokenizer, text, LENGTH) for text in sentences()]
    loaded = Loaded("tiny", TinyText().eval(), samples, tokenizer, raw, LENGTH)
    return build(loaded, deployment, CompileOptions(embedding="client-table"), {})

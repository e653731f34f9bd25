"""A client's way to connect, as a value that other processes of the same client can be given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from parties import deployments
from parties.net.caller import CLIENT
from parties.tls.choice import network_of
from secure.deployments.deployment import Deployment, find
from secure.progress import Told
from secure.session.session import Session


@dataclass(frozen=True, repr=False)  # holds a token
class Connection:
    """The arguments of ``connect`` as a command line has them.

    tls, insecure: see ``network_of``. options: the others of ``connect``, of the types that JSON has.
    """

    deployment: Deployment
    tls: Path | None
    insecure: bool
    options: Mapping[str, Any]

    def open(self, told: Told | None = None) -> Session:
        """Connect. Raises what ``connect`` and ``network_of`` raise."""
        network = network_of(CLIENT, directory=self.tls, insecure=self.insecure)
        return deployments.connect(self.deployment, network=network, told=told, **self.options)

    @property
    def encoded(self) -> str:
        """The connection as text, with the token in it."""
        return json.dumps(
            {
                "deployment": self.deployment.name,
                "own": {name: getattr(self.deployment, name) for name in self.deployment.options()},
                "tls": None if self.tls is None else str(self.tls.absolute()),
                "insecure": self.insecure,
                "options": dict(self.options),
            }
        )

    @classmethod
    def decoded(cls, text: str) -> Self:
        """Return the connection of ``encoded``, which must come from this client's own processes."""
        found = json.loads(text)
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in found["own"].items()}
        tls = None if found["tls"] is None else Path(found["tls"])
        return cls(find(found["deployment"])(**own), tls, found["insecure"], found["options"])

"""The services of this deployment, and its link."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parties.net.hosting import HostOptions, Parts
from parties.served.described import ConnectOptions
from secure.deployments.ckks import Ckks
from secure.deployments.deployment import Deployment
from secure.session import Link


class CkksHosted:
    deployment: type[Deployment] = Ckks
    takes: Mapping[str, frozenset[str]] = {}

    def connect(self, deployment: Deployment, options: ConnectOptions) -> Link:
        raise NotImplementedError

    def parts(
        self, role: str, held: Any, deployment: Deployment, peers: Mapping[str, str], options: HostOptions
    ) -> Parts:
        raise NotImplementedError

"""Joining a Ray cluster, and the checks that it is closed to strangers.

Ray has two protections, and both are off unless its operator sets variables on every machine before Ray starts. With
``RAY_AUTH_MODE=token``, callers need a secret token. With ``RAY_USE_TLS=1`` and certificates, channels are encrypted
and callers need a certificate. Whoever calls a cluster that has neither runs code in it and reads its memory.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from parties.net.endpoints import Endpoint
from secure.errors import EndpointError, Error, InvalidInput, MissingPackage, PeerLost

LOCAL = "local"
"""The address that stands for a cluster on this machine alone, which ends with this process."""

TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
DEFAULTS = {
    "RAY_AUTH_MODE": "token",  # callers need one
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to Ray's makers
    "RAY_worker_niceness": "0",  # by default 15: whatever else the machine does would come before
}
ANSWERING = 5.0  # seconds in which a cluster answers a stranger
STORE = 1 << 29  # bytes of shared memory of a cluster that is begun here
MOST = 1024  # workers

log = logging.getLogger("unseen.cluster")


def import_ray() -> Any:
    """Return the package ``ray``, told by its variables what to do where it starts, unless they are set: see DEFAULTS.

    Raises MissingPackage.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import ray as found
    except ImportError:
        raise MissingPackage("ray is not installed", "pip install 'unseen[ray]'") from None
    return found


class Cluster:
    """A Ray cluster that this process has joined.

    address: host:port of the head of a cluster that runs on this machine too (``ray start --address``), or "local".
    insecure: accept one that answers strangers, or whose machines talk without encryption. Raises EndpointError
    otherwise, before any key or text is given to it; PeerLost if there is none at the address.

    The check is of the moment of joining. A machine that joins later is admitted by the cluster alone.
    """

    def __init__(self, address: str, *, insecure: bool = False) -> None:
        self._ray, local = import_ray(), address == LOCAL
        if not local:
            at = str(Endpoint.parse(address, what="--ray"))
            if answers_strangers(at) and not insecure:
                raise open_to_strangers(at)
        options: dict[str, Any] = {"num_cpus": os.cpu_count(), "include_dashboard": False, "object_store_memory": STORE}
        try:
            self._ray.init(address=address, log_to_driver=False, configure_logging=False, **(options if local else {}))
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise PeerLost(
                f"Ray at {address} cannot be joined ({type(error).__name__})",
                "start it on this machine too, with the same token and certificates: ray start --address HOST:PORT",
            ) from None
        try:
            self.address = str(self._ray.get_runtime_context().gcs_address)
            self._nodes = [node["NodeManagerAddress"] for node in self._ray.nodes() if node["Alive"]]
            if not insecure:
                self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        if answers_strangers(self.address):
            raise open_to_strangers(self.address)
        elsewhere = [node for node in self._nodes if not is_ours(node)]
        if elsewhere and not uses_tls(os.environ):
            raise EndpointError(
                f"Ray at {self.address} has other machines ({elsewhere[0]}), and its channels are not encrypted",
                f"set RAY_USE_TLS=1, {', '.join(TLS_FILES)} wherever Ray starts and here; or --ray-insecure where "
                "nobody else can read the network",
            )

    @property
    def processors(self) -> int:
        """The processors that the cluster counts."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def workers(self, kind: type[Any], count: int | None) -> list[Any]:
        """Start actors of a class, one processor each. count: by default one for each processor.

        Their constructor takes nothing: Ray keeps its arguments. Raises InvalidInput for more than there are.
        """
        found = self.processors
        wanted = found if count is None else count
        if not 1 <= wanted <= min(found, MOST):
            raise InvalidInput(f"{wanted} workers", f"this cluster has {found} processors; at least one is needed")
        made = self._ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(kind)
        return [made.remote() for _ in range(wanted)]

    def get(self, references: Any) -> Any:
        """Return what workers computed; an error of Ray, or of a worker, becomes PeerLost, without its text."""
        try:
            return self._ray.get(references)
        except Exception as error:
            raise lost(error) from None

    def stream(self, method: Any, ahead: int, *given: Any) -> Any:
        """Call a method that is a generator; return Ray's references to what it yields.

        ahead: how many it may make before they are taken.
        """
        return method.options(num_returns="streaming", _generator_backpressure_num_objects=ahead).remote(*given)

    def taken(self, stream: Any) -> Iterator[Any]:
        """Yield what a ``stream`` brings, until it ends or its worker fails; the log says so then."""
        try:
            for reference in stream:
                yield self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            lost(error)

    def cancel(self, stream: Any) -> None:
        """End the work behind a ``stream``."""
        self._ray.cancel(stream)

    def about(self) -> tuple[str, ...]:
        return (f"Ray at {self.address}, {len(self._nodes)} machines: who runs it learns all that its workers hold",)

    def close(self) -> None:
        self._ray.shutdown()


def answers_strangers(at: str) -> bool:
    """Tell whether a cluster's head answers somebody who has neither token nor certificate. Raises PeerLost.

    With certificates configured here, the stranger knows the authority, but has no certificate of his own.
    """
    options = (("grpc.enable_http_proxy", 0),)
    if uses_tls(os.environ):
        authority = Path(os.environ["RAY_TLS_CA_CERT"]).read_bytes()
        stranger = grpc.secure_channel(at, grpc.ssl_channel_credentials(authority), options)
    else:
        stranger = grpc.insecure_channel(at, options)
    with stranger as channel:
        try:
            ask: Any = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
            ask(b"", timeout=ANSWERING)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED or uses_tls(os.environ):
                return False
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise PeerLost(f"Ray at {at} cannot be reached", "start it with: ray start --head") from None
    return True


def open_to_strangers(at: str) -> EndpointError:
    return EndpointError(
        f"Ray at {at} answers callers without token or certificate: they can read all that its workers hold",
        "set RAY_AUTH_MODE=token or RAY_USE_TLS=1 wherever Ray starts; --ray-insecure accepts it as it is",
    )


def lost(error: Exception) -> Error:
    """Return the error for a failure of a worker. The text of Ray's errors is left out: it may hold values."""
    if isinstance(error, Error):
        return error
    cause = getattr(error, "cause", None) or error
    log.warning("a worker of the cluster failed: %s", type(cause).__name__)
    return PeerLost(f"a worker of the cluster failed ({type(cause).__name__})", "see the logs of Ray")


def uses_tls(environment: Mapping[str, str]) -> bool:
    """Tell whether Ray encrypts its channels and asks callers for certificates, by this process's environment."""
    on = environment.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    return on and all(environment.get(name) for name in TLS_FILES)


def is_ours(address: str) -> bool:
    """Tell whether an IP address belongs to this machine: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def same_versions(found: Sequence[str], ours: str) -> None:
    """Raise InvalidInput unless all workers run this version of the package."""
    for each in found:
        if each != ours:
            raise InvalidInput(f"a worker of the cluster has unseen {each}, this is {ours}", "install the same")

"""The price of a call of nobody known, to a service under TLS: processor seconds, memory and what it answers.

    python -m benchmarks.strangers [--calls 300] [--write]

A dealer runs as a process of its own. Each kind of call is repeated, a connection each time; its processor time and the
growth of its memory, by call, are those of the dealer's whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import ssl
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from benchmarks import common
from benchmarks.common import RESULTS, Service
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import DealerStub
from parties.tls.authority import Authority
from parties.tls.naming import dns_of

TICK = os.sysconf("SC_CLK_TCK")


def used(pid: int) -> tuple[float, float]:
    """Processor seconds and resident memory in MB of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return (int(fields[11]) + int(fields[12])) / TICK, resident / 1e6


def plain_bytes(at: tuple[str, int]) -> None:
    """A peer without TLS that sends a megabyte."""
    with socket.create_connection(at, timeout=5) as found, suppress(OSError):
        found.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(1 << 20))
        found.recv(1)


def silent(at: tuple[str, int]) -> None:
    """A connection that says nothing, and is closed."""
    socket.create_connection(at, timeout=5).close()


def handshake(certificate: Path | None) -> Callable[[tuple[str, int]], None]:
    """A handshake with no certificate, or with one that another authority made."""

    def call(at: tuple[str, int]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        if certificate:
            context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
        with suppress(OSError), socket.create_connection(at, timeout=5) as raw, context.wrap_socket(raw) as found:
            found.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(1 << 20))
            found.recv(1)

    return call


def not_allowed(directory: Path) -> Callable[[tuple[str, int]], None]:
    """A known client that calls what only a server may, with the largest request."""
    ca, cert, key = ((directory / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem"))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)

    def call(at: tuple[str, int]) -> None:
        options = [("grpc.ssl_target_name_override", dns_of("dealer")), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(f"{at[0]}:{at[1]}", credentials, options) as channel, suppress(grpc.RpcError):
            DealerStub(channel).Register(pb.RegisterRequest(program=bytes(1 << 20)), timeout=5)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--write", action="store_true", help="write a results file")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": common.machine("benchmarks.strangers"), "calls": options.calls, "kinds": {}}
    with tempfile.TemporaryDirectory() as made:
        os.environ["XDG_STATE_HOME"] = os.environ["XDG_CONFIG_HOME"] = made
        ours, other = (Authority.make(Path(made) / name) for name in ("ours", "other"))
        dealer_files, client = ours.issue("dealer", "dealer"), ours.issue("client", "client")
        stranger = other.issue("client", "client")
        dealer = Service("parties.cli", "dealer", "--listen", "127.0.0.1:0", "--announce", "--tls", str(dealer_files))
        try:
            host, _, port = dealer.address.rpartition(":")
            kinds: dict[str, Callable[[tuple[str, int]], None]] = {
                "says nothing": silent,
                "speaks no TLS": plain_bytes,
                "no certificate": handshake(None),
                "certificate of another authority": handshake(stranger),
                "a client calls Register with 1 MiB": not_allowed(client),
            }
            for name, call in kinds.items():
                for _ in range(20):  # warms up
                    call((host, int(port)))
                time.sleep(0.5)
                before = used(dealer.pid)
                for _ in range(options.calls):
                    call((host, int(port)))
                time.sleep(0.5)
                seconds, memory = (b - a for a, b in zip(before, used(dealer.pid), strict=True))
                report["kinds"][name] = {
                    "processor ms a call": round(1000 * seconds / options.calls, 3),
                    "memory kB a call": round(1000 * memory / options.calls, 2),
                }
        finally:
            dealer.stop()
    print(json.dumps(report, indent=2))
    if options.write:
        (RESULTS / "strangers.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

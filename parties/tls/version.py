"""TLS 1.3 alone, for all that uses gRPC in this process.

gRPC has no option for the versions of TLS, only an environment variable for the suites of TLS 1.2 and older, which it
reads once, when it is imported. So the variable is set when ``parties`` is imported, before. One suite is left, for
pre-shared keys; nobody has such a key, so no older version than 1.3, which has suites of its own, can be agreed on.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

VARIABLE, NONE_OF_OLD = "GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-CHACHA20-POLY1305"

# Whoever has imported gRPC before was too early for what is set here.
_UNSURE = "grpc" in sys.modules and os.environ.get(VARIABLE) != NONE_OF_OLD
os.environ[VARIABLE] = NONE_OF_OLD


@cache
def require_newest(key: bytes, chain: bytes) -> None:
    """Raise TlsError if a service of this process would agree on TLS 1.2. key, chain: any certificate, in PEM form.

    Where that is not certain, it starts a service on this machine for a moment and tries.
    """
    if not _UNSURE:
        return
    import grpc

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    server.start()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.maximum_version, old.check_hostname, old.verify_mode = ssl.TLSVersion.TLSv1_2, False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw, old.wrap_socket(raw):
            pass
    except OSError:
        return
    finally:
        server.stop(None)
    from secure.errors import TlsError  # not above: it loads torch, before which commands set the allocator

    raise TlsError(
        "gRPC was imported in this process before unseen's services, and would accept TLS 1.2",
        f"import parties before grpc, or set {VARIABLE}={NONE_OF_OLD} in the environment",
    )

"""A word to the manager of services that this one is ready, as sd_notify says it: one datagram to a socket.

systemd (Type=notify) sets NOTIFY_SOCKET. Without it nothing is said.
"""

from __future__ import annotations

import logging
import os
import socket

READY = b"READY=1"

log = logging.getLogger("unseen.hosting")


def tell_ready() -> None:
    """Tell whoever started this process that it serves from now on; a manager that does not hear it is logged."""
    if not (address := os.environ.get("NOTIFY_SOCKET")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as telling:
            telling.settimeout(5.0)
            telling.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            telling.send(READY)
    except (OSError, AttributeError) as error:
        log.warning("the manager of services did not hear that this one is ready: %s", error)

"""Lines that gRPC's C core writes about refused handshakes, in words: one line of our log for each.

The core writes to file descriptor 2 and offers no hook. So descriptor 2 becomes a pipe, whose other end a thread copies
to the real one, line by line. Python's own error output goes to the real one directly, so it does not pass the thread.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import re
import sys
import threading
from contextlib import suppress

log = logging.getLogger("unseen.tls")

_CORE = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ ssl_transport_security\.cc:\d+\] (.*)", re.DOTALL)
_BEGUN = re.compile(rb"[IWEF](\d|$)")
_SAID = {
    "certificate has expired": "the caller's certificate has expired",
    "certificate is not yet valid": "the caller's certificate is not valid yet; compare the clocks of both machines",
    "unable to get local issuer": "the caller's certificate is signed by an authority that ca.pem does not hold",
    "self signed": "the caller's certificate is signed by itself",
    "self-signed": "the caller's certificate is signed by itself",
    "unsupported certificate purpose": "the caller's certificate is not made for calling others",
    "CERTIFICATE_VERIFY_FAILED": "the caller's certificate is refused",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the caller shows no certificate",
    "WRONG_VERSION_NUMBER": "the caller does not speak TLS; it needs --tls DIRECTORY",
    "HTTP_REQUEST": "the caller does not speak TLS; it needs --tls DIRECTORY",
    "NO_SHARED_CIPHER": "the caller does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "the caller does not speak TLS 1.3",
    "ALERT_CERTIFICATE_EXPIRED": "the caller says that the certificate of this service has expired; compare the clocks",
    "ALERT_BAD_CERTIFICATE": "the caller refuses the certificate of this service, as not valid yet or as malformed",
    "ALERT_UNKNOWN_CA": "the caller does not know the authority of this service's certificate",
    "ALERT_": "the caller refuses the certificate of this service",
    "BAD_PACKET_LENGTH": "the caller broke off; it may not trust the certificate of this service",
}


def in_words(line: bytes) -> str | None:
    """Return what a line of the core says about a refused handshake; None for every other line."""
    match = _CORE.match(line)
    if match is None:
        return None
    said = match[1].decode(errors="replace").strip()
    if "No match found for server name" in said:
        return f"a caller looks for {said.rpartition(' ')[2]!r} here, which is another role's name"
    if "Handshake failed" not in said:
        return None
    found = next((words for key, words in _SAID.items() if key in said), None)
    return f"refused a connection: {found or said.rpartition('OPENSSL_internal:')[2]}"


class CoreLog:
    """A copy of file descriptor 2 to the real one, in which lines about refused handshakes become log lines."""

    def __init__(self) -> None:
        sys.stderr.flush()
        self._real = os.dup(2)
        self._reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        # Python's own output does not pass the pipe: it stays in order, and a terminal stays a terminal
        real = io.FileIO(self._real, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(real, "utf-8", "backslashreplace", line_buffering=True, write_through=True)
        self._thread = threading.Thread(target=self._copy, name="unseen-core-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _copy(self) -> None:
        rest = b""
        while chunk := os.read(self._reading, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._pass(line + b"\n")
            if not _BEGUN.match(rest):  # what cannot become a line of the core does not wait for its end
                rest = self._pass(rest)
        self._pass(rest)

    def _pass(self, line: bytes) -> bytes:
        if (said := in_words(line)) is not None:
            log.warning("%s", said)
            return b""
        with suppress(OSError):  # if nobody reads it any more, go on reading: the core must not wait
            while line:
                line = line[os.write(self._real, line) :]
        return b""

    def close(self) -> None:
        """Give descriptor 2 back, and copy what is left.

        The pipe has its end then, unless a process that was started meanwhile still writes to it.
        """
        atexit.unregister(self.close)
        os.dup2(self._real, 2)
        self._thread.join(timeout=1)

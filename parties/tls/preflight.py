"""A handshake before the channel: it finds out who answers, and whether they accept us, and sends nothing else.

gRPC says only that a connection failed. This handshake says why, in one line, and it checks what gRPC cannot: whether
the peer's certificate was revoked. The channel is then pinned to the certificate that was found here.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from parties.net.endpoints import Endpoint
from parties.tls.certificates import CLOCKS, Certificate
from parties.tls.credentials import Credentials
from secure.errors import PeerLost, TlsError

CONNECTING, HANDSHAKE = 10.0, 10.0  # seconds
_SETTINGS = 4  # the type of the frame with which an HTTP/2 server begins
_HEADER = 9  # bytes of a frame's header; the type is the fourth

# OpenSSL's codes of a certificate that is refused, and of the alerts with which a peer refuses ours
_NOT_YET, _EXPIRED, _UNKNOWN = (9,), (10,), (2, 18, 19, 20, 21)
_PLAINTEXT = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNEXPECTED_")
_OLD = ("UNSUPPORTED_PROTOCOL", "PROTOCOL_VERSION", "NO_PROTOCOLS_AVAILABLE", "HANDSHAKE_FAILURE", "INSUFFICIENT")
_REFUSES = {
    "UNKNOWN_CA": "it does not know the authority that signed it",
    "CERTIFICATE_EXPIRED": "to its clock, it has expired",
    "CERTIFICATE_REVOKED": "it was revoked",
    "BAD_CERTIFICATE": "to its clock, it is not valid yet; or it is malformed",
    "CERTIFICATE_UNKNOWN": "it gives no reason",
    "CERTIFICATE_REQUIRED": "it got none",
    "UNSUPPORTED_CERTIFICATE": "it is not made for calling others",
}


@dataclass(frozen=True)
class Pinned:
    """The peer that was found: its IP address, resolved once, and its certificate."""

    address: str
    certificate: Certificate


def preflight(endpoint: Endpoint, ours: Credentials, *, who: str, role: str) -> Pinned:
    """Connect to a service, and check that it is ``role`` and accepts our certificate.

    who: its name, for messages. Raises PeerLost if nobody answers, TlsError if it is not who it should be, or refuses
    us. Nothing but a handshake is sent.
    """
    where = f"{who} at {endpoint}"
    ours.certificate.require_valid(f"the certificate {ours.certificate} of this side", "renew it: unseen certs --renew")
    with _connect(endpoint, where) as connection:
        host = connection.getpeername()[0]
        connection.settimeout(HANDSHAKE)
        try:
            with ours.context.wrap_socket(connection, server_hostname=ours.naming.sni(role)) as secured:
                found = Certificate(x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b""))
                ours.require_not_revoked(found, f"the certificate of {where}")
                ours.naming.require(found, role, where)
                _require_welcome(secured, ours, where)
        except ssl.SSLCertVerificationError as error:
            raise untrusted(error, where) from None
        except TimeoutError:
            raise TlsError(
                f"{where} did not finish the TLS handshake within {HANDSHAKE:g} s", "does it use TLS? see its log"
            ) from None
        except (ssl.SSLError, OSError) as error:
            raise failed_handshake(error, where) from None
        return Pinned(host, found)


def _connect(endpoint: Endpoint, where: str) -> socket.socket:
    """Connect to the first address of the endpoint that answers."""
    for host in endpoint.resolved():
        try:
            return socket.create_connection((host, endpoint.port), timeout=CONNECTING)
        except OSError:
            continue
    raise PeerLost(f"{where} cannot be reached", "is it running, and is the port open?")


def _require_welcome(secured: ssl.SSLSocket, ours: Credentials, where: str) -> None:
    """Read the first bytes of the peer: an HTTP/2 server sends its settings at once, after it has accepted us."""
    begin, reason = b"", ""
    with suppress(ConnectionError):
        try:
            begin = secured.recv(_HEADER)
        except ssl.SSLError as error:
            reason = error.reason or ""
    if not begin:
        said = next((words for alert, words in _REFUSES.items() if alert in reason), _guess(ours))
        raise TlsError(
            f"{where} refuses our certificate {ours.certificate}: {said}",
            "both sides need a certificate of the same authority, a correct clock, and the same ca.pem; see its log",
        )
    if len(begin) < 4 or begin[3] != _SETTINGS:
        raise TlsError(f"{where} is no service of unseen: it speaks TLS, but no HTTP/2", "check the address")


def _guess(ours: Credentials) -> str:
    """Say why a peer may refuse our certificate. gRPC's services close the connection and give no reason."""
    if not ours.certificate.calls:
        return "it is not made for calling others"
    if not ours.signed_here:
        return "its authority is not the one of our ca.pem"
    return "it closed the connection"


def untrusted(error: ssl.SSLCertVerificationError, where: str) -> TlsError:
    now = datetime.now(UTC)
    if error.verify_code in _EXPIRED:
        return TlsError(
            f"the certificate of {where} has expired",
            f"its operator renews it; this machine's clock says {now:%Y-%m-%d %H:%M} UTC",
        )
    if error.verify_code in _NOT_YET:
        return TlsError(f"the certificate of {where} is not valid yet", CLOCKS.format(now=now))
    if error.verify_code in _UNKNOWN:
        return TlsError(
            f"the certificate of {where} is signed by an authority that ca.pem does not hold",
            "both sides need the same ca.pem; if somebody else answers there, check the address",
        )
    return TlsError(f"the certificate of {where} is refused: {error.verify_message}", "make it anew with: unseen certs")


def failed_handshake(error: OSError, where: str) -> TlsError:
    reason = getattr(error, "reason", None) or ""
    if any(word in reason for word in _PLAINTEXT) and "EOF" not in reason:
        return TlsError(f"{where} does not speak TLS", "start it with --tls DIRECTORY; nothing was sent to it")
    if any(word in reason for word in _OLD):
        return TlsError(f"{where} does not speak TLS 1.3", "no older version is used; update it")
    said = reason.replace("_", " ").lower() or error.strerror or type(error).__name__
    return TlsError(f"the TLS handshake with {where} failed: {said}", "does it use TLS? see its log")

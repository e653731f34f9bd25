"""Certificates of all kinds for tests: of several authorities, expired, of other names; and fake peers."""

from __future__ import annotations

import secrets
import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parties.tls.naming import dns_of, uri_of

PEM = serialization.Encoding.PEM
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # an HTTP/2 server's first frame


@dataclass(frozen=True, eq=False)
class Signer:
    """An authority, root or intermediate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(PEM)

    @classmethod
    def make(cls, name: str, by: Signer | None = None, *, days: float = 100) -> Signer:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        signed_by, issuer = (by.key, by.certificate.subject) if by else (key, _named(name))
        made = _builder(_named(name), issuer, key.public_key(), now - timedelta(days=50), now + timedelta(days=days))
        made = made.add_extension(x509.BasicConstraints(True, None if by is None else 0), True)
        return cls(key, made.sign(signed_by, hashes.SHA256()))

    def holder(
        self,
        where: Path,
        names: Sequence[x509.GeneralName],
        *,
        starts: timedelta = timedelta(days=-1),
        ends: timedelta = timedelta(days=30),
        trusted: Sequence[Signer] = (),
        between: Sequence[Signer] = (),
        common_name: str = "x",
    ) -> Path:
        """Write a directory with a key, a certificate of these names, and the authorities that its holder trusts."""
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        made = _builder(_named(common_name), self.certificate.subject, key.public_key(), now + starts, now + ends)
        made = made.add_extension(x509.BasicConstraints(False, None), True)
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), False)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        made = made.add_extension(x509.ExtendedKeyUsage(usages), False)
        where.mkdir(parents=True, exist_ok=True)
        chain = [made.sign(self.key, hashes.SHA256()).public_bytes(PEM), *(each.pem for each in between)]
        (where / "cert.pem").write_bytes(b"".join(chain))
        (where / "ca.pem").write_bytes(b"".join(each.pem for each in trusted or (self,)))
        secret = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (where / "key.pem").write_bytes(secret)
        (where / "key.pem").chmod(0o600)
        return where

    def ours(self, where: Path, role: str, **options: object) -> Path:
        """The same with the names of ``unseen certs``."""
        uri = x509.UniformResourceIdentifier(uri_of("unseen.internal", role, "x"))
        return self.holder(where, [x509.DNSName(dns_of(role)), uri], **options)  # type: ignore[arg-type]

    def revoke(self, where: Path, *directories: Path) -> None:
        """Write a list with the certificate in ``where`` into other directories."""
        now = datetime.now(UTC)
        number = x509.load_pem_x509_certificate((where / "cert.pem").read_bytes()).serial_number
        entry = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now).build()
        listed = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        listed = listed.last_update(now).next_update(now + timedelta(days=1)).add_revoked_certificate(entry)
        for each in directories:
            (each / "revoked.pem").write_bytes(listed.sign(self.key, hashes.SHA256()).public_bytes(PEM))


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return made.serial_number(secrets.randbits(128)).not_valid_before(begins).not_valid_after(ends)


def _context(directory: Path, newest: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    context.set_alpn_protocols(["h2"])
    if not newest:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


class FakePeer:
    """A service that takes connections, says ``greeting``, and records every byte that its callers send to it.

    directory: its certificates; None: it does not use TLS. then: those that it shows from its second connection on.
    refused: what went wrong in handshakes.
    """

    def __init__(
        self, directory: Path | None, *, greeting: bytes = SETTINGS, newest: bool = True, then: Path | None = None
    ) -> None:
        self.received, self.refused, self.connections = bytearray(), list[str](), 0
        self._contexts = [None if each is None else _context(each, newest) for each in (directory, then or directory)]
        self._greeting = greeting
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.settimeout(3)
            try:
                if (context := self._contexts[min(self.connections, 2) - 1]) is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                connection.sendall(self._greeting)
                while data := connection.recv(1 << 16):
                    self.received += data
            except OSError as error:
                self.refused.append(str(error))
            finally:
                connection.close()

    def __enter__(self) -> FakePeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=5)

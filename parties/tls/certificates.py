"""Certificates of peers, and lists of revoked ones: read, and checked against the clock."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from secure.errors import TlsError, printable

WARNING = timedelta(days=14)  # before a certificate ends; a third of its life if that is shorter
CLOCKS = "compare the clocks of both machines; this one says {now:%Y-%m-%d %H:%M} UTC"


@dataclass(frozen=True, eq=False)
class Certificate:
    """A certificate of a peer, of this party or of an authority. Everything in it is public."""

    parsed: x509.Certificate

    def read_all(self) -> None:
        """Read what the package reads only when it is asked. Raises one of _MALFORMED."""
        (
            self.issued,
            self.begins,
            self.ends,
            self.common_names,
            self.uris,
            self.dns,
            self.calls,
            self.parsed.public_key(),
        )

    @property
    def pem(self) -> bytes:
        return self.parsed.public_bytes(Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the certificate (DER), in hexadecimal digits, as ``openssl x509 -fingerprint`` shows it."""
        return self.parsed.fingerprint(hashes.SHA256()).hex()

    @property
    def begins(self) -> datetime:
        return self.parsed.not_valid_before_utc

    @property
    def ends(self) -> datetime:
        return self.parsed.not_valid_after_utc

    @property
    def uris(self) -> tuple[str, ...]:
        return self._alternative(x509.UniformResourceIdentifier)

    @property
    def dns(self) -> tuple[str, ...]:
        return self._alternative(x509.DNSName)

    def _alternative(self, kind: Any) -> tuple[str, ...]:
        try:
            found = self.parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            return ()
        return tuple(found.value.get_values_for_type(kind))

    @property
    def common_names(self) -> tuple[str, ...]:
        return tuple(str(each.value) for each in self.parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME))

    @property
    def calls(self) -> bool:
        """Tell whether it may be used by the side that connects."""
        try:
            found = self.parsed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            return True
        return ExtendedKeyUsageOID.CLIENT_AUTH in found

    def constrains(self, pattern: str) -> bool:
        """Tell whether, as an authority, it may issue only some of the names that are of the kind of a pattern."""
        try:
            found = self.parsed.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or ()
        except x509.ExtensionNotFound:
            return False
        kind = x509.UniformResourceIdentifier if "://" in pattern else x509.DNSName
        return any(isinstance(each, kind) for each in found)

    @property
    def issued(self) -> Issued:
        return Issued(self.parsed.issuer.public_bytes(), self.parsed.serial_number)

    @property
    def serial(self) -> str:
        """The serial number as ``unseen certs`` shows it, in hexadecimal digits."""
        return f"{self.parsed.serial_number:x}"

    def __str__(self) -> str:
        named = (*self.uris, *self.dns, *self.common_names)
        return f"{printable(named[0])!r}" if named else f"number {self.serial}"

    def require_valid(self, who: str, hint: str) -> None:
        """Raise TlsError if it has ended or has not begun. who: the holder, for the message."""
        now = datetime.now(UTC)
        if now > self.ends:
            raise TlsError(f"{who} has expired ({self.ends:%Y-%m-%d %H:%M} UTC)", hint)
        if now < self.begins:
            begins = f"{self.begins:%Y-%m-%d %H:%M} UTC"
            raise TlsError(f"{who} is not valid yet, but from {begins} on", CLOCKS.format(now=now))

    def left(self) -> tuple[timedelta, bool]:
        """Return how long it is still valid, and whether that is so short that it should be renewed."""
        left = self.ends - datetime.now(UTC)
        return left, left < min(WARNING, (self.ends - self.begins) / 3)


@dataclass(frozen=True)
class Issued:
    """A certificate's issuer (its encoded name) and number, by which it is revoked."""

    issuer: bytes
    number: int


def read_certificates(pem: bytes, what: str) -> tuple[Certificate, ...]:
    """Read one certificate or more; raises TlsError if there is none. what: the file, for the message."""
    try:
        found = tuple(Certificate(each) for each in x509.load_pem_x509_certificates(pem))
        for each in found:
            each.read_all()
    except Exception:  # the package raises many kinds, some of them Exception's own children
        raise TlsError(f"{what} holds no certificate in PEM form, or one that is malformed") from None
    return found


@lru_cache(maxsize=256)
def of_connection(pem: bytes) -> Certificate:
    """Return the certificate that gRPC's core has verified on a connection; kept, because every call asks for it."""
    (found,) = read_certificates(pem, "the peer")
    return found


def read_revoked(pem: bytes, authorities: Sequence[Certificate], what: str) -> frozenset[Issued]:
    """Read revocation lists, which one of the authorities must have signed each.

    Raises TlsError if a list is malformed, signed by nobody known, or out of date: then a newer one exists.
    """
    found = set[Issued]()
    for block in re.findall(b"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", pem, re.DOTALL):
        try:
            listed = x509.load_pem_x509_crl(block)
            issuer, due, numbers = listed.issuer, listed.next_update_utc, [each.serial_number for each in listed]
            is_signed = any(_signed(listed, a.parsed) for a in authorities if a.parsed.subject == issuer)
        except Exception:  # the package raises many kinds, some of them Exception's own children
            raise TlsError(f"{what} holds a revocation list that cannot be read") from None
        if not is_signed:
            raise TlsError(
                f"{what} holds a revocation list that no authority of ca.pem has signed",
                "take the list of the same authority, or add the certificate of its issuer to ca.pem",
            )
        if due is not None and due < datetime.now(UTC):
            raise TlsError(
                f"{what} holds a revocation list that was to be replaced by {due:%Y-%m-%d %H:%M} UTC",
                "fetch the newer list from the authority",
            )
        found |= {Issued(issuer.public_bytes(), number) for number in numbers}
    if not found and b"BEGIN X509 CRL" not in pem:
        raise TlsError(f"{what} holds no revocation list in PEM form")
    return frozenset(found)


def _signed(listed: x509.CertificateRevocationList, signer: x509.Certificate) -> bool:
    key: Any = signer.public_key()
    return bool(listed.is_signature_valid(key))


def validity(named: Iterable[tuple[str, Certificate]]) -> tuple[str, bool]:
    """Return in words how long certificates are valid, and whether one of them ends soon."""
    out, warned = [], False
    for what, each in named:
        left, soon = each.left()
        days = f"{left.days} days" if left >= timedelta(days=2) else f"{left.total_seconds() / 3600:.1f} hours"
        out.append(f"{what} is valid until {each.ends:%Y-%m-%d %H:%M} UTC ({days}{', renew it' if soon else ''})")
        warned = warned or soon
    return ", ".join(out), warned

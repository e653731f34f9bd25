"""A certificate authority in a directory: it makes certificates for roles, renews them and revokes them.

    DIRECTORY/authority/    the authority's key, its certificate, its list of revoked certificates, all that it issued
    DIRECTORY/client/       cert.pem, key.pem, ca.pem, revoked.pem: to be given to the client, and to nobody else
    DIRECTORY/server/       the same for the server; and so on

Whoever holds authority/ca-key.pem can make a certificate for every role. It need not be on any machine that runs a
role.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parties.tls.certificates import Certificate, Issued, read_certificates, read_revoked
from parties.tls.credentials import Files, read_key
from parties.tls.naming import DOMAIN, Naming, dashed, dns_of, uri_of
from secure.errors import InvalidInput, TlsError

DAYS, AUTHORITY_DAYS = 365, 3650
BACKDATED = timedelta(minutes=5)  # so that a clock that is a little slow does not refuse a fresh certificate
ONLY_CALLS, ONLY_ANSWERS = ("client",), ("dealer",)  # every other role does both


@dataclass(frozen=True)
class Listed:
    """A certificate that the authority issued. name: that in its URI; revoked: its holder is refused."""

    certificate: Certificate
    name: str
    role: str
    revoked: bool


class Authority:
    """The authority of a directory. domain: in the URIs of its certificates; only those may it issue."""

    def __init__(self, directory: Path) -> None:
        """Open an authority. Raises TlsError if there is none, or if its key can be read by others."""
        self.directory, self._own = directory, directory / "authority"
        if not self.exists(directory):
            raise TlsError(f"there is no authority in {directory}", f"make one with: unseen certs {directory}")
        self._key = read_key(self._own / "ca-key.pem")
        self._pem = (self._own / "ca.pem").read_bytes()
        (self.certificate,) = read_certificates(self._pem, str(self._own / "ca.pem"))
        constraints = self.certificate.parsed.extensions.get_extension_for_class(x509.NameConstraints).value
        permitted = constraints.permitted_subtrees or []
        (self.domain,) = (each.value for each in permitted if isinstance(each, x509.UniformResourceIdentifier))

    @staticmethod
    def exists(directory: Path) -> bool:
        return (directory / "authority" / "ca.pem").exists()

    @classmethod
    def make(cls, directory: Path, *, domain: str = DOMAIN, days: int = AUTHORITY_DAYS) -> Authority:
        """Make an authority with a key of its own. Raises InvalidInput if there is one, and for a bad domain."""
        if cls.exists(directory):
            raise InvalidInput(f"there is an authority in {directory} already", "give another directory")
        if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*", domain):
            raise InvalidInput(f"{domain!r} is not a domain", "for example unseen.example")
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        name = _subject(f"unseen authority of {domain}")
        permitted = [x509.DNSName(DOMAIN), x509.UniformResourceIdentifier(domain)]
        made = (
            _builder(name, name, key.public_key(), now, timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.NameConstraints(permitted, None), critical=True)
            .sign(key, hashes.SHA256())
        )
        own = directory / "authority"
        for each in (directory, own, own / "issued"):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(own / "ca-key.pem", _pem(key), private=True)
        write(own / "ca.pem", made.public_bytes(serialization.Encoding.PEM))
        authority = cls(directory)
        authority._write_revoked()
        return authority

    def issue(self, role: str, name: str, *, days: int = DAYS) -> Path:
        """Make a key and a certificate for a role, and return their directory. Raises InvalidInput for a bad name."""
        if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name):
            raise InvalidInput(f"{name!r} is not a name", "letters, digits, dots, dashes and @; at most 64")
        where = self.directory / (dashed(role) if name == dashed(role) else f"{dashed(role)}-{name}")
        if (where / "cert.pem").exists():
            raise InvalidInput(f"{where} holds a certificate already", "give another --name, or --renew it")
        self._issue(where, role, name, days)
        return where

    def renew(self, where: Path, *, days: int = DAYS) -> None:
        """Make a new key and certificate for the holder of those in a directory.

        The old certificate stays valid until it ends or is revoked. Raises InvalidInput for one that this authority
        has not issued: whoever made it chose the role in it.
        """
        files = Files.of(where)
        old, *_ = read_certificates(files.certificate.read_bytes(), str(files.certificate))
        issued = self._own / "issued" / f"{old.serial}.pem"
        if not issued.is_file() or issued.read_bytes() != old.pem:
            raise InvalidInput(f"{where} holds a certificate that the authority in {self.directory} has not issued")
        name, role = Naming().identity(old)
        self._issue(where, role, name, days)

    def is_revoked(self, where: Path) -> bool:
        """Tell whether the certificate in a directory was revoked."""
        found, *_ = read_certificates((where / "cert.pem").read_bytes(), str(where))
        return found.issued in self._revoked()

    def _issue(self, where: Path, role: str, name: str, days: int) -> None:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        alternative = [x509.DNSName(dns_of(role)), x509.UniformResourceIdentifier(uri_of(self.domain, role, name))]
        calls = [] if role in ONLY_ANSWERS else [ExtendedKeyUsageOID.CLIENT_AUTH]
        answers = [] if role in ONLY_CALLS else [ExtendedKeyUsageOID.SERVER_AUTH]
        life = min(timedelta(days=days), self.certificate.ends - now)
        made = (
            _builder(_subject(where.name), self.certificate.parsed.subject, key.public_key(), now, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([*calls, *answers]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = made.public_bytes(serialization.Encoding.PEM)
        files = Files.of(where)
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(self._own / "issued" / f"{made.serial_number:x}.pem", pem)
        write(files.authority, self._pem)
        write(files.revoked, self._revoked_path.read_bytes())
        write(files.key, _pem(key), private=True)
        write(files.certificate, pem)

    def listed(self) -> list[Listed]:
        """Return all certificates that were issued, by role and name, the newest of each first."""
        revoked, out = self._revoked(), []
        for path in (self._own / "issued").glob("*.pem"):
            (found,) = read_certificates(path.read_bytes(), str(path))
            name, role = Naming().identity(found)
            out.append(Listed(found, name, role, found.issued in revoked))
        newest = sorted(out, key=lambda each: each.certificate.begins, reverse=True)
        return sorted(newest, key=lambda each: (each.role, each.name))

    def revoke(self, which: str) -> Listed:
        """Revoke a certificate, and write the new list into all directories here.

        which: its file, the directory that it is in, or its number. Raises InvalidInput if it was not issued here.
        """
        path = Path(which)
        path = path / "cert.pem" if path.is_dir() else path
        number = f"{read_certificates(path.read_bytes(), which)[0].parsed.serial_number:x}" if path.is_file() else which
        chosen = [each for each in self.listed() if each.certificate.serial == number.lower().replace(":", "")]
        if not chosen:
            raise InvalidInput(f"{which} was not issued by the authority in {self.directory}", "see --list")
        self._write_revoked(chosen[0].certificate.parsed.serial_number)
        return chosen[0]

    @property
    def _revoked_path(self) -> Path:
        return self._own / "revoked.pem"

    def _revoked(self) -> frozenset[Issued]:
        return read_revoked(self._revoked_path.read_bytes(), [self.certificate], str(self._revoked_path))

    def _write_revoked(self, *numbers: int) -> None:
        """Sign the list with more numbers on it, and put it into every directory beside the authority's own."""
        now = datetime.now(UTC)
        listed = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.parsed.subject)
            .last_update(now - BACKDATED)
            .next_update(self.certificate.ends)  # it is replaced when something is revoked, not by date
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1e6)), critical=False)
        )
        before = x509.load_pem_x509_crl(self._revoked_path.read_bytes()) if self._revoked_path.exists() else ()
        for each in before:
            listed = listed.add_revoked_certificate(each)
        for number in set(numbers) - {each.serial_number for each in before}:
            entry = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now)
            listed = listed.add_revoked_certificate(entry.build())
        pem = listed.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        write(self._revoked_path, pem)
        for beside in self.holders():
            write(beside / "revoked.pem", pem)

    def holders(self) -> list[Path]:
        """Return the directories of certificates here."""
        return sorted(path.parent for path in self.directory.glob("*/cert.pem"))


def write(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file as a whole or not at all; a private one is never readable by others, not for a moment."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(**given: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    more = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{**dict.fromkeys((*names, *more), False), **given})


def _pem(key: Any) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))

"""The roles that certificates name.

A certificate of ``unseen certs`` names its role in a URI, ``spiffe://<domain>/unseen/<role>/<name>``. A file tls.toml
maps the names of other certificates to roles, so that those of a corporate authority serve too.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, ValidationError

from parties.tls.certificates import Certificate
from secure.deployments.deployment import deployments
from secure.errors import TlsError, printable

DOMAIN = "unseen.internal"
_OURS = re.compile(r"spiffe://[a-z0-9._-]+/unseen/([a-z0-9-]+)/([A-Za-z0-9._@-]+)")
CN = "cn:"


def dashed(role: str) -> str:
    """Return a role as certificates and directories have it: ``party-0`` for "party 0"."""
    return role.replace(" ", "-")


def uri_of(domain: str, role: str, name: str) -> str:
    """Return the URI of a certificate of ours."""
    return f"spiffe://{domain}/unseen/{dashed(role)}/{name}"


def dns_of(role: str) -> str:
    """Return the DNS name of a certificate of ours."""
    return f"{dashed(role)}.{DOMAIN}"


class _NamingFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    names: dict[str, str] = {}
    roles: dict[str, str] = {}


@dataclass(frozen=True)
class Naming:
    """The rules that give a certificate its role.

    roles: the role of a peer by a pattern of its names: a URI, a DNS name, or ``cn:`` and a common name. A ``*`` stands
    for one part between slashes of a URI, or between dots of a DNS name. Without any, the URIs of ``unseen certs`` say
    the role. names: by role, a pattern that the peer must have where this party connects to that role; without one, the
    peer's role is read like that of a caller.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str, what: str) -> Naming:
        """Read tls.toml, with its tables ``names`` and ``roles``. Raises TlsError."""
        try:
            found = _NamingFile.model_validate(tomllib.loads(text.removeprefix("\ufeff")))
        except (tomllib.TOMLDecodeError, ValidationError) as error:
            said = str(error)
            if isinstance(error, ValidationError):
                first = error.errors(include_url=False, include_context=False)[0]
                place, unknown = printable(".".join(map(str, first["loc"]))), first["type"] == "extra_forbidden"
                said = f"{place}: {'unknown' if unknown else first['msg'][0].lower() + first['msg'][1:]}"
            hint = '[names] has lines such as server = "unseen.example", [roles] such as "spiffe://a/c" = "client"'
            raise TlsError(f"{what} cannot be read: {said}", hint) from None
        known = {dashed(role.name) for deployment in deployments() for role in deployment().roles()}
        for role in (*found.names, *found.roles.values()):
            if dashed(role) not in known:
                raise TlsError(f"{what}: there is no role {printable(role)!r}", f"one of {', '.join(sorted(known))}")
        return cls(found.names, found.roles)

    def identity(self, certificate: Certificate) -> tuple[str, str]:
        """Return the name and the role of a certificate; raises TlsError if it has none, or two."""
        found = set(self._identities(certificate))
        roles = {role for _, role in found}
        if len(roles) != 1:
            said = f"names {len(roles)} roles" if roles else "names no role"
            hint = "make it with: unseen certs; or say its role in tls.toml, [roles]"
            raise TlsError(f"the certificate {certificate} {said}", hint)
        return min(name for name, _ in found), roles.pop()

    def _identities(self, certificate: Certificate) -> Iterator[tuple[str, str]]:
        if not self.roles:
            for uri in certificate.uris:
                if match := _OURS.fullmatch(uri):
                    yield match[2], match[1].replace("-", " ")
            return
        for pattern, role in self.roles.items():
            for name in _matching(pattern, certificate):
                yield printable(name), role.replace("-", " ")

    def require(self, certificate: Certificate, role: str, who: str) -> None:
        """Raise TlsError unless a peer's certificate is that of ``role``. who: the peer, for the message."""
        expected = self._expected(role)
        if expected is not None:
            if not any(_matching(expected, certificate)):
                raise TlsError(
                    f"{who} shows the certificate {certificate}, where {expected!r} is expected",
                    f"check the address, and {dashed(role)} in tls.toml, [names]",
                )
            return
        try:
            _, found = self.identity(certificate)
        except TlsError as error:
            raise TlsError(f"{who}: {error}") from None
        if found != role:
            raise TlsError(
                f"{who} shows the certificate of a {found} ({certificate}), not of a {role}",
                "check the address; every service needs the certificate of its own role",
            )

    def _expected(self, role: str) -> str | None:
        """Return the pattern that a service of a role must have, whether it stands for "party 0" or "party-0"."""
        return next((pattern for named, pattern in self.names.items() if dashed(named) == dashed(role)), None)

    def sni(self, role: str) -> str | None:
        """Return the DNS name to ask a service of ``role`` for in its handshake, if it must have one."""
        expected = self._expected(role) or ""
        if re.fullmatch(r"[A-Za-z0-9.-]+", expected):
            return expected
        return None if self.names or self.roles else dns_of(role)


def _matching(pattern: str, certificate: Certificate) -> Iterator[str]:
    if pattern.startswith(CN):
        yield from (name for name in certificate.common_names if name == pattern.removeprefix(CN))
        return
    uri = "://" in pattern
    part = "[^/]+" if uri else "[^.]+"
    expression = re.compile(part.join(map(re.escape, pattern.split("*"))), 0 if uri else re.IGNORECASE)
    yield from (name for name in (certificate.uris if uri else certificate.dns) if expression.fullmatch(name))

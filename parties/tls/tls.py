"""Mutual TLS 1.3: both ends of every channel show a certificate that says which role they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import grpc

from parties.net.caller import Caller, address
from parties.net.endpoints import CLIENT_LIMIT, OPTIONS, Endpoint
from parties.net.network import Network, bound
from parties.net.summed import SummedChannel
from parties.tls.certificates import Certificate, of_connection
from parties.tls.channel import TlsChannel
from parties.tls.credentials import Credentials, Files, Reloading
from parties.tls.naming import Naming
from parties.tls.preflight import preflight
from parties.tls.version import require_newest
from secure.errors import TlsError


class Tls(Network):
    """A network of mutual TLS 1.3, of the files in ``directory``: cert.pem, key.pem, ca.pem, revoked.pem, tls.toml.

    certificate, key, authority, revoked: paths of single files, in place of those in the directory. names: by role, the
    DNS name or URI that a service of that role must have. roles: by pattern of URI, DNS name or ``cn:NAME``, the role
    of a caller; see ``parties.tls.naming``. Both replace tls.toml.

    Whoever connects makes a handshake first, in which nothing but certificates is sent; it finds every fault and names
    it. Then a channel is opened that only the holder of the certificate found there can answer. Whoever listens refuses
    certificates of other authorities in the handshake; a guard refuses the next call of whoever was revoked, has
    expired, or may not call a method. Changed files are read at their next use. Only the certificates of peers
    themselves are looked up in the revocation lists, not those of intermediate authorities.

    Older versions than TLS 1.3 are off for all that uses gRPC in this process; see ``parties.tls.version``. Raises
    TlsError for files that are missing, do not fit together or have expired, and for a key that others
    can read.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        authority: str | Path | None = None,
        revoked: str | Path | None = None,
        names: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        if directory is None and None in (certificate, key, authority):
            raise TlsError("TLS needs a certificate, its key and an authority", "give a directory, or all three files")
        found, given = Files.of(Path(directory or ".")), (certificate, key, authority, revoked)
        paths = [Path(path or usual) for path, usual in zip((*given, None), found.all(), strict=True)]
        self.files = Files(*paths)
        if directory is not None and not Path(directory).is_dir():
            raise TlsError(f"{directory} is no directory", "make it with: unseen certs DIRECTORY")
        naming = None if names is None and roles is None and directory else Naming(names or {}, roles or {})
        self._reloading = Reloading(self.files, naming)

    @property
    def proves_roles(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Tls({str(self.files.certificate)!r})"

    @property
    def credentials(self) -> Credentials:
        """The content of the files, as they are now. Its repr shows no key."""
        return self._reloading.now()

    def about(self) -> tuple[str, ...]:
        line, soon = self.credentials.about()
        return (f"{'warning: ' if soon else ''}TLS 1.3: {line}",)

    def ends(self) -> Mapping[str, float]:
        ours = self.credentials
        authority = min(each.ends for each in ours.authorities)
        return {"own": ours.certificate.ends.timestamp(), "authority": authority.timestamp()}

    def check(self, endpoint: Endpoint, *, what: str) -> None:
        """Do nothing: an encrypted channel may go anywhere."""

    def probe(self, endpoint: Endpoint, *, what: str, role: str) -> None:
        preflight(endpoint, self.credentials, who=what, role=role)

    def channel(
        self, endpoint: Endpoint, *, what: str, role: str, met: Callable[[str], None] | None = None
    ) -> grpc.Channel:
        def dial(ours: Credentials) -> tuple[grpc.Channel, Certificate]:
            found = preflight(endpoint, ours, who=what, role=role)
            if met is not None:
                met(found.certificate.fingerprint)
            options = (
                *OPTIONS,
                ("grpc.max_receive_message_length", CLIENT_LIMIT),
                ("grpc.ssl_target_name_override", _name_for_grpc(found.certificate, what)),
                ("grpc.use_local_subchannel_pool", 1),  # no connection of another channel, which has another pin
            )
            # The peer's certificate is the only root: nobody else can answer.
            pinned = grpc.ssl_channel_credentials(found.certificate.pem, ours.key_pem, ours.chain_pem)
            return grpc.secure_channel(endpoint.at(found.address), pinned, options=options), found.certificate

        return SummedChannel(TlsChannel(dial, lambda: self.credentials), f"{what} at {endpoint}")

    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str, role: str) -> int:
        ours = self.credentials
        self._require_own(ours, what, role)
        require_newest(ours.key_pem, ours.chain_pem)
        _name_for_grpc(ours.certificate, f"{what} itself")

        def configuration() -> grpc.ServerCertificateConfiguration:
            now = self.credentials
            return grpc.ssl_server_certificate_configuration([(now.key_pem, now.chain_pem)], now.authority_pem)

        credentials = grpc.dynamic_ssl_server_credentials(
            configuration(), configuration, require_client_authentication=True
        )
        return bound(endpoint, endpoint.resolved(), lambda at: server.add_secure_port(at, credentials))

    @staticmethod
    def _require_own(ours: Credentials, what: str, role: str) -> None:
        """Raise TlsError if our own certificate is that of another role, as far as we can tell."""
        if not ours.naming.roles and not ours.naming.names:
            ours.naming.require(ours.certificate, role, f"{what} itself")

    def caller(self, context: grpc.ServicerContext) -> Caller:
        (pem,) = context.auth_context().get("x509_pem_cert", [b""])
        certificate, ours = of_connection(bytes(pem)), self.credentials
        certificate.require_valid("the certificate of the caller", "renew it: unseen certs DIRECTORY --renew")
        ours.require_not_revoked(certificate, "the certificate of the caller")
        name, role = ours.naming.identity(certificate)
        return Caller(name, role, address(context))


def _name_for_grpc(certificate: Certificate, who: str) -> str:
    """Return a name of a service's certificate for gRPC, which compares one though the certificate itself is pinned."""
    for name in (*certificate.dns, *(() if certificate.uris or certificate.dns else certificate.common_names)):
        return name.replace("*", "any")
    raise TlsError(
        f"the certificate {certificate} of {who} has no DNS name", "gRPC needs one in the certificate of every service"
    )

"""Mutual TLS 1.3: certificates, the roles that they name, and channels that are pinned to them.

version      TLS 1.3 alone, in the whole process
certificates certificates and lists of revoked ones, read and checked
naming       the roles that certificates name
credentials  the files of TLS, read and read again when they change
preflight    a handshake before a channel, which names every fault
channel      a channel that is pinned to its peer's certificate
tls          the protection of channels by mutual TLS 1.3
choice       the network of a role that is told nothing else
authority    makes certificates, renews and revokes them
"""

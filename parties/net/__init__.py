"""The transport of bytes between parties: addresses, channels, frames, deadlines, services.

endpoints    host:port, options of channels
caller       the caller of a service, and the roles that may call a method
network      the protection of channels: its interface, and plaintext
tls_version  TLS 1.3 alone, in the whole process
tls          the protection of channels by mutual TLS 1.3
certificates certificates and lists of revoked ones, read and checked
naming       the roles that certificates name
credentials  the files of TLS, read and read again when they change
preflight    a handshake before a channel, which names every fault
tls_channel  a channel that is pinned to its peer's certificate
authority    makes certificates, renews and revokes them
choice       the network of a role that is told nothing else
guard        refuses calls before their handlers read anything
quotas       how much each caller may use in a day
tokens       bearer tokens, which name callers behind one certificate
status       what a service says about itself, and whose process it is
meter        counts calls, sessions and bytes, and asks for tokens
calls        errors of gRPC calls, explained on both ends
peer         a service at the other end of a channel
frames       byte strings as parts of about 1 MB
waiting      places for calls: while a request comes, and for work
watchdog     deadlines for waits
seats        a service's tables, in which the idle give way
repeating    work that is repeated in the background
secret_files files that nobody else can have read or put there
hosting      start a service: port, shutdown, memory
measure      the time of a round between two processes of this machine
"""

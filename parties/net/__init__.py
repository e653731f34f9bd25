"""The transport of bytes between parties: addresses, channels, frames, deadlines, services.

endpoints    host:port, options of channels
caller       the caller of a service, and the roles that may call a method
network      the protection of channels: its interface, and plaintext
guard        refuses calls before their handlers read anything
calls        errors of gRPC calls, explained on both ends
peer         a service at the other end of a channel
frames       byte strings as parts of about 1 MB
waiting      places for calls: while a request comes, and for work
watchdog     deadlines for waits
hosting      start a service: port, shutdown, memory
measure      the time of a round between two processes of this machine
"""

"""The transport of bytes between parties: addresses, channels, frames, deadlines.

endpoints    host:port, options of channels
caller       the caller of a service, and the roles that may call a method
network      the protection of channels: its interface, and plaintext
calls        errors of gRPC calls, explained on both ends
recorded     a record of what leaves through channels
peer         a service at the other end of a channel
forked       processes that were forked after gRPC was used
wrapped      a channel around another one
versions     peers of another version, and who is to be updated
summed       a sum behind every message, so that changed bytes are noticed
frames       byte strings as parts of about 1 MB
watchdog     deadlines for waits
directories  the user's directories, and whether they can be written
secret_files files that nobody else can have read or put there
"""

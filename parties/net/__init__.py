"""Bytes between parties: addresses, channels, frames, deadlines, services.

endpoints    host:port, options of channels
network      how channels are protected: plaintext, and the place of TLS
calls        errors of gRPC calls, in words on both ends
peer         somebody at the other end of a channel
frames       byte strings as parts of about 1 MB
watchdog     deadlines for waits
hosting      starting a service: port, start-up line, shutdown
measure      what a round takes between two processes of this machine
"""

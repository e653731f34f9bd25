"""Bytes between parties: addresses, channels, frames, deadlines, services.

endpoints    host:port, the loopback rule, channels
calls        errors of gRPC calls, in words on both ends
frames       byte strings as parts of about 1 MB
watchdog     deadlines for waits
hosting      starting a service: port, start-up line, shutdown
measure      what a round takes between two processes of this machine
"""

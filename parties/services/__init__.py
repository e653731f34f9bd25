"""The hosting of services: they start, guard their methods, tell their status, and end.

guard     refuses calls before their handlers read anything
health    the same for standard probes of gRPC
status    what a service says about itself, and whose process it is
dealing   where a dealer's corrections are computed
repeating work that is repeated in the background
draining  the end of a service that lets its work end first
allocator the settings of memory for a process of queries
hosting   start a service: port, shutdown
ready     a word to systemd that a service is ready
signals   signals as a queue that the main thread reads
workers   several processes that serve at one address
measure   the time of a round between two processes of this machine
"""

"""Three servers of which at most one is corrupted, and a client that sends shares.

dpf       distributed point functions: a secret index as two short keys
lookup    rows of a shared table at the client's secret indices, without a round between the servers
"""

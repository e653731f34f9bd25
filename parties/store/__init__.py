"""Stores of one-time entries: whatever is put in comes out once, or is lost, but never comes out twice.

entries  the interface, and what is the same for every store
keys     the key under which entries lie on a disk
sealed   the format of an entry on a disk
memory   a store in memory
place    where a store was made: a restored one is told from the one that went on
files    a store of large entries, a file each
database a store of small entries, in SQLite
spool    bytes of one process, on a disk
filler   a thread that keeps a store full
"""

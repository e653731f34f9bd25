"""Receipts: records of what left a client's machine, and their comparison with what Programs prescribe.

receipt   the record of a session as a document
walk      the messages of one connection, compared one after the other
described the messages with which every client asks a service what it serves
"""

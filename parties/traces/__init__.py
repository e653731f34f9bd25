"""Timelines of queries, as files.

trace_file   one party's timeline of a query
merge        two parties' traces on one time line
measured     a client's queries as they ran, next to what was predicted
"""

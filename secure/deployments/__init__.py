"""Who computes on what.

three_party  a Program as one deployment runs it
in_process   all parties in one process: insecure, by name
compare      variants of a model side by side
"""

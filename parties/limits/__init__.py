"""The limits of what one caller may take of a service: places, seats, quotas, tokens.

waiting places for calls: while a request comes, and for work
seats   a service's tables, in which the idle give way
memory  a budget of bytes for what sessions keep prepared
turns   who computes next, by the time that each has had
quotas  how much each caller may use in a day
tokens  bearer tokens, which name callers behind one certificate
meter   counts calls, sessions and bytes, and asks for tokens
"""

"""Deployments: who computes on what. Each is said once, in its own file.

deployment   what a deployment is: name, roles, what each learns, options, compiler, cost; the registry
in_process   all parties in one process: insecure, by name
circuits     what deployments by secret sharing have in common
two_party    a server and a dealer
three_party  three servers that share a model
ckks         one server, on ciphertexts
compiled     ``secure.compile``
compare      variants of a model side by side
"""

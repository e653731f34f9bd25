"""Deployments: the roles that take part in a query, and what each computes and learns. Each has its own file.

deployment   the base of deployments (name, roles, what each learns, options, compiler, cost), and the registry
in_process   all parties in one process, which is insecure and says so
circuits     the base of deployments by secret sharing
two_party    a server and a dealer
three_party  three servers that share a model
ckks         one server, on ciphertexts
compiled     ``secure.compile``
generator    ``secure.compile_generator``
kept         a compiled model as files
compilation  everything that a compiled model depends on, and a key over it
self_test    a compiled model's answers against the original's
compare      variants of a model side by side
"""

from secure.deployments import ckks, three_party, two_party  # noqa: F401  (registers them)

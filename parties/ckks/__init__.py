"""The CKKS deployment: a server that computes on a client's ciphertexts.

evaluators   processes that evaluate
keystore     clients' evaluation keys on the server's disk
server       the server's service
client       the client
hosted       what the commands do for this deployment
"""

"""The CKKS deployment: a server computes on ciphertexts that only the client can decrypt.

pipe         messages between the processes of one server
limits       memory and time of a process
host         the processes that evaluate
evaluators   the server's handle for these processes
room         places and room that callers share
keystore     clients' evaluation keys on the server's disk
server       the server's service
client       the client
prescribed    the messages that a client may send, for its receipt
hosted        the service and the link, as ``parties.deployments`` starts them
"""

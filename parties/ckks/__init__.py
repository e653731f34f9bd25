"""The CKKS deployment: a server computes on ciphertexts that only the client can decrypt.

key_file     evaluation keys in a file
pipe         messages between the processes of one server
host         the process that evaluates, and its children
evaluators   the server's handle for that process
keystore     clients' evaluation keys on the server's disk
server       the server's service
client       the client
hosted       the service and the link, as ``parties.deployments`` starts them
"""

"""The CKKS deployment: a server that computes on a client's ciphertexts.

key_file     evaluation keys in a file
pipe         messages between the processes of one server
host         the process that evaluates, and its children
evaluators   the server's handle of that process
keystore     clients' evaluation keys on the server's disk
server       the server's service
client       the client
hosted       the service and the link, as ``parties.deployments`` starts them
"""

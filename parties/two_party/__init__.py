"""Client, server and dealer.

keys         seeds, query keys, and what a session has burnt
dealer       the dealer's service
masked_model what a server serves; the weight-mask seed
server       the server's service
client       the client
hosted       services and link, as deployments start them
"""

"""The two-party deployment: client, server and dealer.

keys         seeds, query keys, and the query numbers that a session has burnt
dealer       the dealer's service
masked_model the server's model with its masked weights; the weight-mask seed
server       the server's service
client       the client
hosted       services and link, as ``parties.deployments`` starts them
"""

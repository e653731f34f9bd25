"""The two-party deployment: client, server and dealer.

conversations the places of queries in texts, and what each party keeps of them
keys         query keys, the ratchet of a session's seed, and proofs
sealing      seeds that are sealed to the dealer's key, and that key
dealer       the dealer's service
assigned     the clients' keys of queries that the dealer deals ahead
dealer_peer  the dealer as server and client see it
masked_model the server's model with its masked weights; the weight-mask seed
stocked      the server's store of queries that are dealt ahead
server       the server's service
client       the client
prescribed   the messages that a client may send, for its receipt
hosted       services and link, as ``parties.deployments`` starts them
"""

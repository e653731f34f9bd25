"""A model shared among three servers, clients that are none of them.

pair_keys      a pair's seed: proofs, tags over what both hold
shared_model   a model's three shares on disk
asked          a client's query at one party
supply         corrections that arrive while they are used; a stock of them
sealed_rounds  one party's rounds as frames, under tags
party          the part of a query that all three do for clients
party_2        deals ahead
party_0        computes with party 1
party_1        computes with party 0
client         shares an input, puts the answer together
hosted         the services and the link, as ``parties.deployments`` starts them
"""

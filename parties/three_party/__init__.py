"""The three-party deployment: a model shared among three servers, and clients that are none of them.

pair_keys      the seeds and keys of a pair of parties: proofs, and tags over bytes that both hold
agreement      two parties agree on their key
shared_model   a model's three shares on disk
conversations  what one party keeps between queries of a text
asked          a client's query at one party
supply         corrections that arrive while they are used; a stock of them
sealed_rounds  one party's rounds as frames, authenticated by tags
party          the base class of the three parties' services
party_2        the service of party 2, which deals ahead
party_0        the service of party 0, which computes with party 1
party_1        the service of party 1, which computes with party 0
client         the client, which shares its input and adds up the answer
prescribed     the messages that a client may send, for its receipt
hosted         the services and the link, as ``parties.deployments`` starts them
"""

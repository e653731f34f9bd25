"""The three-party deployment over gRPC: a model shared among three servers, clients that are none of them.

In dependency order, one line a module:

links        a pair's seed: proofs, tags over what both hold
shares       a model's three shares on disk
supply       corrections that arrive while they are used; a stock of them
rounds       one party's rounds as frames, under tags
service      what all three answer to clients
helper       party 2: deals ahead
zero, one    parties 0 and 1: compute
client       shares an input, puts the answer together
hosting      what the commands do for this deployment
commands     ``unseen share-model`` and ``unseen party``
"""

"""Work on the machines of a Ray cluster (the extra ``ray``): the dealer's computing, and bulk embedding.

Ray serializes with pickle, and whoever may call a cluster runs code in it. So a cluster belongs to the trust domain of
whoever uses it: the dealer's to the dealer, the client's to the client. What leaves and enters it crosses our own
services and sessions alone, and only keys, texts, numbers and encoded Programs, as bytes, text and integers, are given
to it; nothing from outside the trust domain is unpickled.

joined       joining a cluster, and the checks that it is closed to strangers
dealing      corrections that a cluster's workers compute
embedding    texts that a cluster's workers embed, each with a session of its own
"""

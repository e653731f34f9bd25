"""Replicated sharing: x = x_0 + x_1 + x_2 modulo 2^64 (or by XOR), where party i holds (x_i, x_(i+1)).

Any two parties know x; what one of them holds is uniform and says nothing of it. Each summand has two holders, which
is what lets them notice that one of the copies was changed. Nothing computes on such pairs as they are: an opening is
one (see ``protocols.three_party``), and weights are shared so (see ``weights``).
"""

PARTIES = 3
PARTY_2 = 2  # the party whose share of everything comes from seeds
HOLDERS = ((PARTY_2, 0), (0, 1), (1, PARTY_2))  # who holds summand j: party j - 1 as its second, party j as its first

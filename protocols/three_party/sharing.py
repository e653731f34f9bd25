"""Replicated sharing: x = x_0 + x_1 + x_2 modulo 2^64 (or by XOR), where party i holds (x_i, x_(i+1)).

Any two parties together know x; one party's summands are uniform and say nothing about x. Each summand has two holders,
so they can notice that one of the copies was changed. No protocol takes such pairs directly: an opening is one (see
``protocols.three_party``), and weights are shared in this form (see ``weights``).
"""

PARTIES = 3
PARTY_2 = 2  # the party whose share of everything comes from seeds
HOLDERS = ((PARTY_2, 0), (0, 1), (1, PARTY_2))  # of summand j: party j - 1 (as its second) and party j (as its first)

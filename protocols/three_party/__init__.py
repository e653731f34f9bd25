"""Three servers with an honest majority, no dealer: replicated sharing on Z_2^64, one file each, in dependency order.

Every opened value, and every weight, is held in replicated form x = x_0 + x_1 + x_2 modulo 2^k, where party i holds
(x_i, x_(i+1)) (Araki et al., CCS 2016; ABY3; PUMA). The outer summands x_0 (parties 2 and 0) and x_2 (parties 1 and 2)
come from pairwise seeds, so one summand is all that is ever sent, and party 2 holds of every value what it could write
down before the query: its part of all products, comparisons and selections needs no message from anybody. It runs
ahead (ASTRA, Chaudhari et al., CCSW 2019).

That makes the protocols of ``two_party`` those of three servers: an ``Opening(z, r)`` *is* a replicated value with
x_1 = z, x_0 = -r_0, x_2 = -r_1 (bits likewise, by XOR), and what a dealer gives is the summand of party 2,
re-randomized by a zero share of parties 1 and 2. What is left to be said is what differs, because nobody knows the
weights:

sharing       replicated sharing itself: who holds which summand
weights       what each party holds of the model's weights
linear        products with shared weights, and with public ones
endpoints     an input that the client shares
dpf           point functions in two short keys
lookup        rows of a shared table at a place that only the client knows
translate     a Program's circuit as one for three servers

Costs of a product, an elementwise or a matrix one, however long its inner dimension: a ring element an output and
party (2 to 0 ahead; 0 and 1 to each other when the result is next used, by then truncated, so shorter). Truncation is
``local.Truncate``, which cannot fail at the top; comparison, bit times value, selection, maximum, reciprocal and
inverse square root are the Program's own circuits of ``Compare``, ``OpenBits``, ``Select``, ``Polynomial``, ``Extend``.
Bits become numbers by ``Select``; numbers become bits by ``Compare``.
"""

from protocols.three_party.endpoints import LookedUp, SharedInput
from protocols.three_party.linear import PublicLinear, SharedLinear
from protocols.three_party.translate import Translated, translate

__all__ = ["LookedUp", "PublicLinear", "SharedInput", "SharedLinear", "Translated", "translate"]

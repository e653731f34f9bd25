"""The protocols of three servers with an honest majority and no dealer: replicated sharing modulo 2^64.

Every opened value, and every weight, is held in replicated form x = x_0 + x_1 + x_2 modulo 2^k, where party i holds
(x_i, x_(i+1)) (Araki et al., CCS 2016; ABY3; PUMA). The outer summands x_0 (parties 2 and 0) and x_2 (parties 1 and 2)
come from pairwise seeds, so only one summand is ever sent. Party 2 knows its part of every value before the query, so
its part of all products, comparisons and selections needs no message from anybody, and it computes that part ahead of
the query (ASTRA, Chaudhari et al., CCSW 2019).

Therefore three servers can use the protocols of ``two_party``. An ``Opening(z, r)`` *is* a replicated value with
x_1 = z, x_0 = -r_0, x_2 = -r_1 (likewise for bits, by XOR), and the dealer's correction is the summand of party 2,
re-randomized by a zero share of parties 1 and 2. The modules here, in dependency order, define what differs, because
nobody knows the weights:

sharing       replicated sharing: who holds which summand
weights       each party's part of the model's weights
linear        products with shared weights and with public weights
endpoints     inputs that the client shares
dpf           point functions in two short keys
sketch        shows whether keys evaluate to unit vectors
lookup        rows of a shared table at an index that only the client knows
checks        refuse look-up keys and inputs that no honest client sends
translate     turns a Program's circuit into one for three servers

A product, elementwise or matrix, costs one ring element for each output element and party, however long its inner
dimension: party 2 sends to party 0 ahead, and parties 0 and 1 send to each other when the result is next used (by then
it is truncated, so shorter). Truncation is ``local.Truncate``, which is never wrong in the high bits. Comparison, bit
times value, selection, maximum, reciprocal and inverse square root are the Program's own circuits of ``Compare``,
``Tabulated``, ``TabulatedBands``, ``OpenBits``, ``Select``, ``SelectEach``, ``Polynomials``, ``Extend``. ``Select``
turns bits into numbers, and ``Compare`` turns numbers into bits.
"""

from protocols.three_party.endpoints import LookedUp, SharedInput
from protocols.three_party.linear import OpenedPatches, PublicLinear, SharedLinear
from protocols.three_party.translate import Translated, translate

__all__ = ["LookedUp", "OpenedPatches", "PublicLinear", "SharedInput", "SharedLinear", "Translated", "translate"]

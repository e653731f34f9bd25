"""The protocols of two parties (server and client) with a dealer, one file each, in dependency order.

opening       open a secret under a fresh mask; sums of openings; open bits
linear        products with weights that the server holds: deliver, linear
extension     extend shares from a narrow ring to a wider one
lift          the same opening in a wider ring, for elementwise products and powers
product       elementwise and matrix products of opened secrets
polynomial    powers and public polynomials of one opened secret, and their products with another
bitproducts   (helper) products of up to four secret bits in one round
comparison    compare an opened secret with public thresholds
selection     secret bits times an opened secret: piecewise linear functions; bits to numbers
exponential   e^-x of an opened secret
intervals     (helper) inverse powers in intervals whose places a mask moves
tabulated     1 / x and 1 / sqrt(x) of an opened secret, by dealt polynomials
digits        bits and histograms of an opened secret's coarse digit, for the maxima of rows
ranking       ranks within a row, and its first entries by rank
keeping       openings that later queries read: the keys and values of a decoder
units         unit vectors of secret positions, by which tables are looked up
rounding      exact division by a power of two, from one opening
conditions    one number that tells whether all of many secret bits are one
noise         Gumbel noise that nobody knows, for samples from a softmax
endpoints     the client's input, the revealed output
"""

from protocols.two_party.comparison import Compare
from protocols.two_party.conditions import Alarm, Unmet
from protocols.two_party.digits import DigitIn, DigitsIn, Histogram
from protocols.two_party.endpoints import Input, Publish, Reveal
from protocols.two_party.exponential import Exponential
from protocols.two_party.extension import Extend
from protocols.two_party.keeping import (
    Keep,
    KeptRows,
    OpenedConcat,
    OpenedExpand,
    OpenedPermute,
    OpenedReshape,
    Recall,
    keepers,
)
from protocols.two_party.lift import Lift, LiftedPowers, LiftedProduct
from protocols.two_party.linear import Deliver, DeliveredPatches, Linear
from protocols.two_party.noise import Gumbel, ScaledGumbel
from protocols.two_party.opening import Open, OpenBits, OpenedSum
from protocols.two_party.polynomial import Polynomial, PolynomialProduct, Polynomials, Powers
from protocols.two_party.product import Product
from protocols.two_party.ranking import OpenedPairs, Placed, PlacedPositions, Ranks
from protocols.two_party.rounding import Quotient
from protocols.two_party.selection import Select, SelectEach
from protocols.two_party.tabulated import Tabulated, TabulatedBands
from protocols.two_party.units import Units

__all__ = [
    "Alarm",
    "Compare",
    "Deliver",
    "DeliveredPatches",
    "DigitIn",
    "DigitsIn",
    "Exponential",
    "Extend",
    "Gumbel",
    "Histogram",
    "Input",
    "Keep",
    "KeptRows",
    "Lift",
    "LiftedPowers",
    "LiftedProduct",
    "Linear",
    "Open",
    "OpenBits",
    "OpenedConcat",
    "OpenedExpand",
    "OpenedPairs",
    "OpenedPermute",
    "OpenedReshape",
    "OpenedSum",
    "Placed",
    "PlacedPositions",
    "Polynomial",
    "PolynomialProduct",
    "Polynomials",
    "Powers",
    "Product",
    "Publish",
    "Quotient",
    "Ranks",
    "Recall",
    "Reveal",
    "ScaledGumbel",
    "Select",
    "SelectEach",
    "Tabulated",
    "TabulatedBands",
    "Units",
    "Unmet",
    "keepers",
]

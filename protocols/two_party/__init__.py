"""The protocols of two parties (server and client) with a dealer, one file each, in dependency order.

opening       open a secret under a fresh mask; open bits
linear        products with weights that the server holds: deliver, linear
extension     extend shares from a narrow ring to a wider one
lift          the same opening in a wider ring, for elementwise products and powers
product       elementwise and matrix products of opened secrets
polynomial    powers and public polynomials of one opened secret
bitproducts   (helper) products of up to four secret bits in one round
comparison    compare an opened secret with public thresholds
selection     secret bits times an opened secret: piecewise linear functions; bits to numbers
exponential   e^-x of an opened secret
endpoints     the client's input, the revealed output
"""

from protocols.two_party.comparison import Compare
from protocols.two_party.endpoints import Input, Reveal
from protocols.two_party.exponential import Exponential
from protocols.two_party.extension import Extend
from protocols.two_party.lift import Lift, LiftedPowers, LiftedProduct
from protocols.two_party.linear import Deliver, Linear
from protocols.two_party.opening import Open, OpenBits
from protocols.two_party.polynomial import Polynomial, Powers
from protocols.two_party.product import Product
from protocols.two_party.selection import Select

__all__ = [
    "Compare",
    "Deliver",
    "Exponential",
    "Extend",
    "Input",
    "Lift",
    "LiftedPowers",
    "LiftedProduct",
    "Linear",
    "Open",
    "OpenBits",
    "Polynomial",
    "Powers",
    "Product",
    "Reveal",
    "Select",
]

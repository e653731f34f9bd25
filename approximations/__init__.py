"""Approximations of softmax, GeLU, LayerNorm and similar functions by operations that protocols can compute.

Each function is written once. Called with a ``torch.Tensor``, it computes the plaintext reference; called with a
symbolic value that has the same operators, it records the primitive operations that protocols carry out. This package
needs torch alone.

primitives    the operations that values must offer: piecewise polynomials, exponential, row maximum
fits          minimax polynomials (Remez exchange), least squares
division      reciprocal and inverse square root by range reduction
powers        forms without comparisons: polynomials, inverse powers, Power-Softmax
power_blocks  the sums of Power-Softmax for training, block by block
norms         layer_norm, rms_norm, l2_normalize
puma          the published forms of PUMA, for comparison
activations   relu, gelu, tanh, sigmoid, silu, abs
softmax       softmax and attention, below an upper bound of the row maximum
choice        sets of approximations for a model's operations, by name
"""

from approximations.activations import absolute, gelu, relu, sigmoid, silu, tanh
from approximations.choice import APPROXIMATIONS, Function, Functions, choose
from approximations.division import reciprocal, rsqrt
from approximations.norms import (
    l2_normalize,
    layer_norm,
    polynomial_layer_norm,
    polynomial_layer_norm_factors,
    polynomial_rms_norm,
    polynomial_rms_norm_factors,
    rms_norm,
    rms_norm_factors,
)
from approximations.power_blocks import power_sums
from approximations.powers import polynomial, power, power_attend, power_scores
from approximations.primitives import Piece, exp_below, maximum, piecewise, row_bound
from approximations.softmax import attend, softmax

__unseen__ = True  # the mark that unseen_start looks for

__all__ = [
    "APPROXIMATIONS",
    "Function",
    "Functions",
    "Piece",
    "absolute",
    "attend",
    "choose",
    "exp_below",
    "gelu",
    "l2_normalize",
    "layer_norm",
    "maximum",
    "piecewise",
    "polynomial",
    "polynomial_layer_norm",
    "polynomial_layer_norm_factors",
    "polynomial_rms_norm",
    "polynomial_rms_norm_factors",
    "power",
    "power_attend",
    "power_scores",
    "power_sums",
    "reciprocal",
    "relu",
    "rms_norm",
    "rms_norm_factors",
    "row_bound",
    "rsqrt",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]

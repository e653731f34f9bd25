"""The operations on shared values, a file for each family; importing this package registers them.

All about an operation stands in one file: meaning, rule of translation, approximation, and what calibration must find.

shapes              shapes, pieces and concatenation
arithmetic          sums, products, quotients and powers
linear              products with matrices; embeddings
attention           softmax, masks and attention
activations         functions of one value
normalizations      norms and inverse roots
polynomial_forms    what models in polynomial form are made of
"""

from secure.operations import (  # noqa: F401  (they register)
    activations,
    arithmetic,
    attention,
    linear,
    normalizations,
    polynomial_forms,
    shapes,
)

"""The operations on shared values, in one file for each family. Importing this package registers them.

Everything about an operation is in one file: its meaning, its translation from torch, its approximation, and the range
that calibration must find.

shapes              shapes, pieces and concatenation
arithmetic          sums, products, quotients and powers
moves               entries in other places: every copy, pad and selection by a public index
linear              products with matrices; embeddings
convolutions        convolutions and pooling
attention           softmax, masks and attention
activations         functions of one value
choices             arg-max, and the k largest
generation          keys and values that later steps read
sampling            samples from a softmax
normalizations      norms and inverse roots
polynomial_forms    polynomials and powers of models in polynomial form
"""

from secure.operations import (  # noqa: F401  (they register)
    activations,
    arithmetic,
    attention,
    choices,
    convolutions,
    generation,
    linear,
    moves,
    normalizations,
    polynomial_forms,
    sampling,
    shapes,
)

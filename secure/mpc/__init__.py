"""The compiler for secret sharing: from a trace to a Program, which two and three parties run.

network      networks by name, and the seconds of waiting on them
comparing    the cheapest comparison of an opened value
watch        checks that values lie in their ranges
prices       the worth of rounds and bytes, and the choice for a network
share        a shared value: its place, ring and scale
plan         the rings and openings that the readers of every value need
emitter      the circuit in the making
arithmetic   inputs, products, sums, shapes
nonlinear    piecewise polynomials, comparisons, maxima
pieces       their curved pieces: lines taken from them, fraction bits, rings
fused        products with polynomials that nobody opens
powers       inverse powers, by dealt tables
noise        values plus noise that nobody knows, for samples
ranking      the largest entries of rows, and where they stand
lookup       unit vectors of secret positions
rounding     answers of few fraction bits
softmax      bounds of rows, and exponentials below them
emit         the record of every primitive; from a trace to a circuit
program      Programs: circuit, digest, canonical encoding
budget       what one Program may take of a dealer or a client
compile      all of it in one call
kept         a compiled model as facts and tensors, for a file
"""

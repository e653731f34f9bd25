"""The cryptographic protocols: rings, secret sharing, randomness, and circuits made of protocols.

This package knows circuits of protocols, not models. Nothing here moves bytes between processes.

In dependency order, one line a module:

errors       the base class of all errors, and those that protocols raise
ring         arithmetic in Z_2^k on int64 tensors
bits         bits of many elements, packed
kept_kernels the cache of what is compiled, in files that nobody else can write
kernels      hot loops over elements and packed bits, compiled
wire         tensors as bytes
fields       the types of protocols' fields, with their bounds
windows      entries taken in runs, and patches under a moving window
fixedpoint   the fixed-point encoding of real numbers
limbs        exact matrix products through float64
narrow       integers in the narrowest type that holds them, and products that read them so
madd52       exact matrix products by an instruction for 52-bit integers
matmul       the fastest of these kernels and torch's own
prg          AES-CTR streams, keys
protocol     the base class of protocols; exchanges, openings, draws, costs
ahead        streams of many instructions, made together
flow         a circuit, and what follows from it alone: its schedule, who reads what
steps        merging steps and running them: the loop of every party
local        steps without messages: sums, shapes, truncation
ckks/        homomorphic evaluation: the server computes on ciphertexts
two_party/   the protocols between client and server, with a dealer
three_party/ the protocols between three servers of which at most one is corrupted
warm         all that is compiled, before a query waits for it
weights      each party's part of the server's weights
circuit      running circuits: execute, prepare, deal, reference
"""

__unseen__ = True  # the mark that unseen_start looks for

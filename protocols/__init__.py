"""Rings, sharing, randomness and protocols: knows circuits of protocols, not models. Nothing here moves bytes.

In dependency order, one line a module:

errors       the base of all errors, and those of protocols
ring         arithmetic in Z_2^k on int64 tensors
bits         bits of many elements, packed
wire         tensors as bytes
kernels      hot loops over elements and packed bits, compiled
fixedpoint   how real numbers stand in the ring
limbs        exact matrix products through float64
matmul       the faster of two exact kernels
prg          AES-CTR streams, keys
protocol     what a protocol is; exchanges, openings, draws, costs
steps        merging steps and running them: the loop of every party
local        steps without messages: sums, shapes, truncation
ckks/        homomorphic evaluation: the server computes on ciphertexts
two_party/   the protocols between client and server with a dealer
three_party/ the protocols between three servers of which at most one is corrupted
weights      what each party holds of the server's weights
circuit      lists of protocols: execute, prepare, deal, reference
"""

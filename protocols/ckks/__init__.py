"""Homomorphic encryption with CKKS: the server computes on ciphertexts that the client alone can decrypt.

In dependency order, one line a module:

parameters   ring degree, primes and scales at 128-bit security
canonical    the one form in which ciphertexts and keys travel; SEAL's files around it
circuit      a computation on ciphertexts, and its evaluation on plain vectors
diagonals    linear maps of slots in baby and giant steps; sums along an axis
polynomial   polynomials in logarithmic depth
schedule     the level of every value, and the places of the client's refreshes
seal         the backend: keys, encoding, ciphertexts as bytes
codec        plaintexts as integer coefficients
refresh      masks for ciphertexts that the client re-encrypts
evaluate     the server's evaluation of a schedule
noise        predicted errors of a schedule
cost         predicted time, memory and bytes of a schedule
"""

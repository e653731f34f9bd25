"""CKKS: the server computes on ciphertexts that the client alone can decrypt.

In dependency order, one line a module:

parameters   ring degree, primes and scales at 128-bit security
circuit      a computation on ciphertexts, and its meaning on plain vectors
diagonals    linear maps of slots in baby and giant steps; sums along an axis
polynomial   polynomials in logarithmic depth
schedule     levels of every value, and where the client refreshes
seal         the backend: keys, encoding, ciphertexts as bytes
codec        plaintexts as integer coefficients
refresh      masks for ciphertexts that the client re-encrypts
evaluate     the server's evaluation of a schedule
noise        errors of a schedule, before it runs
cost         time, memory and bytes of a schedule, before it runs
"""

"""The compiler for ciphertexts: from a trace to a CKKS Program.

linear_maps  what is linear in a trace, as sparse matrices
rules        the record of every primitive
polynomials  polynomials of one value, composed
pack_batch   many inputs at once, one ciphertext an element
layout       which element stands in which slot
pack         a trace as a circuit of ciphertexts
program      what client and server agree on
compile      from a module to such a Program: parameters derived, errors predicted
client       the client's side of a query
profile      what a model costs, before anything runs
"""

"""The compiler for ciphertexts: from a trace to a CKKS Program.

linear_maps  the linear parts of a trace, as sparse matrices
rules        the record of every primitive
polynomials  polynomials of one value, composed
pack_batch   many inputs at once, with one ciphertext per element
layout       the elements that each slot holds
pack         a trace as a circuit of ciphertexts
program      the Program on which client and server agree
kept         a compiled model as facts and tensors, for a file
compile      from a module to such a Program, with derived parameters and predicted errors
client       the client's side of a query
profile      the cost of a model, before anything runs
"""

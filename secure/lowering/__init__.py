"""From a graph to a trace of primitives: every operation becomes its approximation.

primitives      the primitives that a trace consists of, one record each
trace           symbolic values that record primitives
ranges          the range of every traced value
client_inputs   how a client makes the inputs of a circuit
parts           parts of a model that change while the rest stays
made            tensors that are made when they are read
observe         the ranges that approximations ask for
rows            the part of a value that sets ranges
lower           running a graph through the approximations
"""

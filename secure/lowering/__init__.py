"""From a graph to a trace of primitives: every operation becomes its approximation.

trace        symbolic values that record primitives
ranges       the range of every traced value
client_inputs    how a client makes the inputs of a circuit
observe      the ranges that approximations ask for
lower        a graph through the approximations
client_inputs   how a client makes the inputs of a circuit
observe      ranges that approximations ask for
"""

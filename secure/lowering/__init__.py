"""From a graph to a trace of primitives: every operation becomes its approximation.

primitives   what a trace is made of: the record of every primitive
trace        symbolic values that record primitives
ranges       the range of every traced value
client_inputs    how a client makes the inputs of a circuit
observe      the ranges that approximations ask for
lower        a graph through the approximations
client_inputs   how a client makes the inputs of a circuit
observe      ranges that approximations ask for
"""

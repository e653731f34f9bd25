"""The cost of a Program, known before anything runs: rounds, bytes, memory and time.

timeline     when a party did what in one query, measured or predicted
count        rounds, bytes and memory
outline      a Program of a model without its weights
kernel_times    what this machine takes for each step of a Program
projection   how long a query takes on a network
runnable     what a cost can be counted of
traffic      bytes by link; costs
report       a profile as every deployment gives it
circuit_profile the profile of a circuit
"""

"""The cost of a Program, known before anything runs: rounds, bytes, memory and time.

timeline          when a party did what in one query, measured or predicted
count             rounds, bytes and memory
outline           a Program of a model without its weights
kernel_times      the time that each step of a Program takes on this machine
offline_times     the time of the offline phase on this machine
projection        how long a query takes on a network
runnable          the circuits whose cost can be counted
traffic           bytes by link; costs
report            the form of a profile, the same for every deployment
circuit_profile   the profile of a circuit
demand            what one query takes of each role
passes            the price of a token where one query checks several of them
plan              what a number of clients takes of each role, and what that costs
"""

"""Client and servers as processes over gRPC: the only place where bytes move.

In dependency order, one line a wing:

net/         addresses, channels, frames, deadlines, services
served/      what a service publishes
two_party/   client, server and dealer
traces/      timelines of queries, as files
reports/     what commands print
three_party/ three servers that share a model
ckks/        a server that computes on ciphertexts
cli/         the command ``unseen``
"""

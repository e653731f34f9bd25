"""Client and servers as processes over gRPC: the only place where bytes move.

In dependency order, one line a wing:

net/         addresses, channels, frames, deadlines, services
served/      what a service publishes
traces/      timelines of queries, as files
two_party/   client, server and dealer
three_party/ three servers that share a model
ckks/        a server that computes on ciphertexts
deployments  all of them by name: serve and connect
reports/     what commands print
cli/         the command ``unseen``
"""

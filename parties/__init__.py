"""Clients and servers as processes that talk over gRPC. Only this package moves bytes between processes.

In dependency order, one line a wing:

proto/       stubs generated from the wire format
net/         addresses, channels, frames, deadlines
telemetry/   numbers, log lines and traces for whoever runs a role
tls/         certificates, roles, pinned channels
limits/      places, quotas and tokens of callers
services/    services that start, guard their methods and end
served/      the public description and files of a service
traces/      timelines of queries, as files
store/       one-time entries that are kept ready
receipts/    records of what left a client, compared with Programs
two_party/   client, server and dealer
three_party/ three servers that share a model
ckks/        a server that computes on ciphertexts
deployments  all deployments by name: serve and connect
bulk/        texts of a file, and their embeddings in another
reports/     the output of commands
cluster/     work on the machines of a Ray cluster
shapes/      sessions in the shapes of libraries that people know
proxy/       an endpoint in OpenAI's form on the client's machine
cli/         the command ``unseen``
"""

import parties.tls.version  # noqa: F401  (gRPC reads its settings when it is imported, so this comes before)

__unseen__ = True  # the mark that unseen_start looks for

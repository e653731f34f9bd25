"""Clusters of an index's rows: equal numbers of neighbouring vectors, made in the clear by the index's owner.

Rows are halved again and again, until at most ``CLUSTER`` are left: by two means that are refined as in k-means, and by
the median of how much nearer a row is to one of them. So clusters are as large as each other, within one row, and what
a query takes does not tell how the documents lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLUSTER = 64
"""The most rows of a cluster."""

_REFINED = 8  # times that two means are found anew


def cluster_sizes(rows: int) -> list[int]:
    """Return the sizes of the clusters of so many rows: as few clusters as there can be, equal within one row."""
    clusters = -(-rows // CLUSTER)
    return [rows * (i + 1) // clusters - rows * i // clusters for i in range(clusters)]


def clustered(vectors: Tensor) -> Tensor:
    """Return an order of float vectors, (rows, width), in which consecutive ones are clusters: (rows,).

    The clusters' sizes are those of ``cluster_sizes``. The same vectors get the same order.
    """
    sizes = cluster_sizes(len(vectors))
    order = torch.empty(len(vectors), dtype=torch.int64)
    waiting = [(torch.arange(len(vectors)), sizes, 0)]
    while waiting:
        rows, parts, start = waiting.pop()
        if len(parts) <= 1:
            order[start : start + len(rows)] = rows
            continue
        first = parts[: len(parts) // 2]
        one, other = _halves(vectors, rows, sum(first))
        waiting += [(one, first, start), (other, parts[len(first) :], start + len(one))]
    return order


def _halves(vectors: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Divide rows into the ``count`` that are nearer to one of two means, and the others; each in ascending order."""
    x = vectors[rows]
    x = x - x.mean(0)
    along = x[x.square().sum(-1).argmax()]  # from the mean to the row that is farthest from it
    for _ in range(_REFINED):
        order = (x @ along).argsort(descending=True, stable=True)
        along = x[order[:count]].mean(0) - x[order[count:]].mean(0)
    order = (x @ along).argsort(descending=True, stable=True)
    return rows[order[:count].sort().values], rows[order[count:].sort().values]

"""Clusters of an index's rows: their sizes, that no row is lost, and that neighbours stand together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from secure.models import clusters as clusters_module
from secure.models.clusters import CLUSTER, cluster_sizes, clustered


@given(st.integers(1, 5000))
def test_sizes(rows: int) -> None:
    sizes = cluster_sizes(rows)
    assert sum(sizes) == rows
    assert len(sizes) == -(-rows // CLUSTER)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= CLUSTER


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 400), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_every_row_stands_somewhere(rows: int, width: int, equal: bool, seed: int) -> None:
    vectors = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    vectors = torch.ones_like(vectors) if equal else vectors
    order = clustered(vectors)
    assert order.sort().values.tolist() == list(range(rows))
    assert torch.equal(order, clustered(vectors))


def test_neighbours_stand_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows around centres that are far apart, in any order: each cluster has those of one centre."""
    monkeypatch.setattr(clusters_module, "CLUSTER", 16)
    generator = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(8, 32, generator=generator), dim=-1)
    belongs = torch.arange(8).repeat_interleave(16)[torch.randperm(128, generator=generator)]
    vectors = F.normalize(centres[belongs] + torch.randn(128, 32, generator=generator) * 0.05, dim=-1)
    for cluster in belongs[clustered(vectors)].split(cluster_sizes(128)):
        assert len(set(cluster.tolist())) == 1

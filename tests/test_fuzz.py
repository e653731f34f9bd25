"""Every parser of bytes from outside, on changed real files: it refuses them with its own error, or it accepts them."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tests.fuzz import attempt, mutant
from tests.fuzz_targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_real_files_are_accepted(name: str) -> None:
    for data in TARGETS[name].seeds():
        assert attempt(TARGETS[name], data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_changed_files_are_refused_or_accepted(name: str, seed: int) -> None:
    attempt(TARGETS[name], mutant(TARGETS[name].seeds(), random.Random(seed)))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_or_accepted(name: str, data: bytes) -> None:
    attempt(TARGETS[name], data)

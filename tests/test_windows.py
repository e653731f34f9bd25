"""Runs of positions, and patches under a moving window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import local, windows
from protocols import two_party as tp
from protocols.flow import Instruction
from protocols.windows import CACHED, Window, check_runs, runs_of, take
from secure.mpc.budget import load_of


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=40))
def test_runs_say_the_positions(positions: list[int]) -> None:
    runs = runs_of(positions)
    assert check_runs(runs, 10) == len(positions)
    x = torch.arange(1, 11)
    assert take(x, 0, runs).tolist() == [p + 1 for p in positions]


@pytest.mark.parametrize(
    ("positions", "count"),
    [(range(100), 1), (range(99, -1, -1), 1), ([3] * 50, 1), ([-1] * 4 + [*range(7)] + [-1] * 4, 3), ([0, 2, 3, 4], 2)],
)
def test_regular_positions_are_few_runs(positions: list[int], count: int) -> None:
    assert len(runs_of(list(positions))) == count


@pytest.mark.parametrize("runs", [[(0, 1, 11)], [(9, 1, 2)], [(1, -1, 3)], [(-1, 1, 2)], [(0, 1, 0)], [(0, 99, 2)]])
def test_runs_beyond_what_they_are_taken_of_are_refused(runs: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match=r"entries|run"):
        check_runs(runs, 10)


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Window((5,), (1,), (0,), (1,)).shape((1, 2, 4))
    with pytest.raises(ValueError, match="does not fit"):
        Window((3,), (1,), (0,), (2,)).shape((1, 2, 4))
    with pytest.raises(ValueError, match="different dimensions"):
        Window((3,), (1, 1), (0,), (2,))
    with pytest.raises(ValueError, match="dimensions in a tensor"):
        Window((3, 3), (1, 1), (0, 0), (1, 1)).shape((1, 2, 4))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))
def test_patches_make_convolutions(kernel: int, stride: int, padding: int, dilation: int) -> None:
    x, w = torch.randn(2, 3, 9, 8).double(), torch.randn(5, 3, kernel, kernel).double()
    window = Window(*((v, v) for v in (kernel, stride, padding, dilation)))
    ours = (window.patches(x) @ w.reshape(5, -1).T).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, torch.conv2d(x, w, None, stride, padding, dilation))


def test_padding_is_bounded_and_counted_before_it_is_made() -> None:
    """A window of little output may be taken of anything, with its padding."""
    wide = {"kernel": (1,) * 3, "stride": (4096,) * 3, "padding": (4096,) * 3, "dilation": (1,) * 3}
    with pytest.raises(ValueError, match="with padding, more than"):
        local.Patches((1, 3, 3, 3, 1), 32, **wide).shape_of([(1, 1, 1, 1, 1)], {})
    flat = {"kernel": (1,) * 2, "stride": (4096,) * 2, "padding": (4096,) * 2, "dilation": (1,) * 2}
    patches = local.Patches((1, 3, 3, 1), 32, **flat)
    assert patches.shape_of([(1, 1, 1, 1)], {}) == (1, 3, 3, 1)
    assert patches.scratch() >= 8 * (1 + 2 * 4096) ** 2


def test_large_indices_are_not_kept() -> None:
    before = windows._kept_index.cache_info().currsize
    runs = tuple((i, 1, CACHED // 4) for i in range(8))
    assert take(torch.arange(CACHED), 0, runs).shape == (2 * CACHED,)
    assert windows._kept_index.cache_info().currsize == before
    assert local.Take((2 * CACHED,), 32, 0, runs).scratch() >= 8 * 2 * CACHED


def test_a_budget_counts_what_a_window_is_taken_of() -> None:
    """A Program of little output that pads without end takes too much, before anything is made."""
    flat = {"kernel": (1,) * 2, "stride": (4096,) * 2, "padding": (4096,) * 2, "dilation": (1,) * 2}
    circuit = [
        Instruction(tp.Input((1, 1, 1, 1), 32, "x", 0, -1.0, 1.0)),
        Instruction(local.Patches((1, 3, 3, 1), 32, **flat), (0,)),
    ]
    assert load_of(circuit, {}).memory >= 8 * (1 + 2 * 4096) ** 2

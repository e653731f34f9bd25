"""A tiny model and its three parties, made once for all tests that ask for them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import parties  # noqa: F401  (before gRPC, which takes settings for TLS when it is imported)
from parties.served.files import state_directory
from tests.dealer_key import KEY

if TYPE_CHECKING:
    from tests.tiny import Ready, Served

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a process a core. More threads of torch, and of what tests start, would spin while they wait for one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)  # which has read that variable by now


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, then those with many, so that all processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path], item.path))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The threads of torch that tests had before: commands that run in this process set them."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """State and cache directories of the tests' own, with the key of their dealers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg-cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("xdg-state")))
        KEY.save(state_directory())
        yield


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a random text encoder."""
    for module in ("transformers", "tokenizers"):
        pytest.importorskip(module)
    from tests.tiny import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where its server keeps the seed of its masks."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def model(directory: Path, state: Path) -> Ready:
    """The encoder, compiled."""
    from tests.tiny import ready

    return ready(directory, state)


@pytest.fixture(scope="session")
def dealer() -> Iterator[Served]:
    """A dealer in this process."""
    from tests.tiny import dealing

    with dealing() as served:
        yield served


@pytest.fixture(scope="session")
def server(model: Ready, dealer: Served) -> Iterator[Served]:
    """A server of the encoder in this process."""
    from tests.tiny import serving

    with serving(model, dealer.address) as served:
        yield served

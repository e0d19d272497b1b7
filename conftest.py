"""What every test shares: one thread, no network, a random state of its own, and a processor that is hard to please."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: tests must not depend on a network

import pytest
import torch

from tests.processors import other_sums

pytest_plugins = ["tests.fixtures"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny networks are faster on one thread, and sums come out in the same order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def any_processor() -> Iterator[None]:
    """Tensors that are not aligned are added up in another order, as some processors do: see tests/processors.py."""
    with other_sums():
        yield


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test starts from the same random numbers, whatever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield

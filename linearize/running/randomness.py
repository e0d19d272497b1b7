"""The global random generators: Python's, NumPy's, and PyTorch's on each device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["is_random_state", "random_state", "randomness_kept", "seed_everything", "set_random_state"]


def seed_everything(seed: int) -> None:
    """Seed all global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of all global generators, as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    return {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the result of `random_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - the global one
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def is_random_state(state: Any) -> bool:
    """True if `set_random_state` would accept it. Nothing is set.

    Examples:
        >>> is_random_state(random_state()), is_random_state({"python": (3, (1, 2), None)})
        (True, False)
    """
    try:
        random.Random().setstate(state["python"])  # noqa: S311 - to see whether it fits
        name, keys, *rest = state["numpy"]
        np.random.RandomState().set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.Generator().set_state(state["torch"])
        return all(isinstance(each, torch.Tensor) for each in state["cuda"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError):
        return False


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Inside this context random numbers can be drawn; afterwards all generators are restored."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)

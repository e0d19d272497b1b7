"""Inputs of a cell: a batch on the device, in the type of the cell, with sequences as long as it says."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from linearize.errors import UsageError
from linearize.export.batches import batch_tensors, length_axes
from linearize.graph.capture import Inputs, normalize_inputs
from linearize.nest import mapped
from linearize.running.models import move
from linearize.suite.matrix import DTYPES, Cell

__all__ = ["Inputting", "batch_of"]


class Inputting(Protocol):
    """A function that makes a batch of some samples; of a shape, if one is named."""

    def __call__(self, batch: int, shape: str | None) -> Any:
        """A tensor, a tuple, or a dict of keyword arguments."""


def batch_of(cell: Cell, inputs: Inputting, place: torch.device) -> Inputs:
    """The inputs of a cell.

    Raises:
        LinearizeError: they cannot be made, or hold no sequences.
    """
    batch = normalize_inputs(inputs(cell.batch, cell.shape or None))
    if cell.length:
        batch = _lengthened(batch, cell.length)
    return move(batch, place, DTYPES[cell.dtype])


def _lengthened(batch: Inputs, length: int) -> Inputs:
    """Sequences repeated or cut to a length."""
    wanted = {id(t) for t, axis in zip(batch_tensors(batch), length_axes(batch), strict=True) if axis is not None}
    if not wanted:
        raise UsageError("lengths", "found no sequences of tokens in the model's inputs", "Use shapes instead.")

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) not in wanted:
            return value
        return value[:, torch.arange(length) % value.shape[1]]

    made: Inputs = mapped(batch, one)
    return made

"""One convention for batches, wherever linearize runs a model over data.

A batch is a tensor (the input), a tuple or list of positional inputs whose last entry may be the labels, or a
dict of keyword arguments, of which "labels" may be one. The last entry of a tuple is taken as labels if there
are at least two entries and more than `forward` requires; a dict's labels are passed on to a `forward` that
takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from linearize.errors import DataError

__all__ = ["Batch", "padding_mask", "read_batch", "to_device"]


@dataclass
class Batch:
    """What a model is called with, and the labels to compare its output with (None: there are none)."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Any = None

    @property
    def size(self) -> int:
        """Number of samples: the length of the first tensor."""
        tensors = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]
        return int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1


def read_batch(model: nn.Module, batch: Any) -> Batch:
    """Sort a batch into inputs and labels.

    Raises:
        DataError: the batch is none of the forms above.

    Example:
        >>> read_batch(nn.Linear(2, 2), (torch.zeros(3, 2), torch.zeros(3))).labels
        tensor([0., 0., 0.])
    """
    if isinstance(batch, torch.Tensor):
        return Batch((batch,))
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        takes_labels = "labels" in batch and _takes(model, "labels")
        return Batch((), {key: batch[key] for key in batch if key != "labels" or takes_labels}, labels)
    if isinstance(batch, tuple | list) and batch:
        if len(batch) > 1 and len(batch) > _required(model):
            return Batch(tuple(batch[:-1]), {}, batch[-1])
        return Batch(tuple(batch))
    found = f"found a batch of type {type(batch).__name__}" + (" without entries" if batch == () else "")
    raise DataError("data", found, "Yield tensors, tuples (inputs, labels), or dicts of keyword arguments.")


def to_device(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(entry, device) for entry in value)
    return value


def padding_mask(model: nn.Module, name: str, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The padding mask that belongs to a site, if the batch has one."""
    key = "attention_mask"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in name.split("."):
        key = "decoder_attention_mask"  # the two sequences may be of the same length by chance
    mask = kwargs.get(key)
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _takes(model: nn.Module, name: str) -> bool:
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in _parameters(model))


def _required(model: nn.Module) -> int:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in _parameters(model))

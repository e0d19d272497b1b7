"""The memory that a model which generates takes: its weights, and its cache at a batch size and a context. Exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.graph.protect import untouched
from linearize.running.models import device_of, evaluating
from linearize.serving.decoder import prompt
from linearize.serving.point import Point
from linearize.zoo.caches import bytes_by_layer, cache_in, reading

__all__ = ["Memory", "memory", "weight_bytes"]


@dataclass(frozen=True)
class Memory:
    """Bytes of a model.

    Attributes:
        weights: of parameters and buffers; shared ones count once.
        layers: of the cache of each layer, at one point.
    """

    weights: int
    layers: tuple[int, ...]

    @property
    def cache(self) -> int:
        """Bytes of the whole cache."""
        return sum(self.layers)

    @property
    def total(self) -> int:
        """Weights and cache."""
        return self.weights + self.cache


def memory(model: nn.Module, point: Point) -> Memory:
    """Count the bytes of the weights, and of the cache when so many texts of so many tokens have been read.

    The model reads them without values, so nothing is computed; where it cannot, it reads them for real.

    Args:
        model: one that generates.
        point: batch size and context.
    """
    return Memory(weight_bytes(model), tuple(bytes_by_layer(_cache(model, point))))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once.

    Examples:
        >>> weight_bytes(nn.Linear(3, 5))
        80
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _cache(model: nn.Module, point: Point) -> object:
    """What a model keeps behind a prompt; its tensors may be without values."""
    kwargs = reading(model, prompt(model, point))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    with evaluating(model), untouched(model):
        try:
            hollow = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
            ids = {"input_ids": kwargs["input_ids"].to("meta")}
            return cache_in(torch.func.functional_call(model, hollow, (), {**kwargs, **ids}, tie_weights=False))
        except Exception:  # whatever a model does with the values in its tensors, it can do only for real
            device = device_of(model)
            moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
            return cache_in(model(**moved))

"""A mixture without some of its experts, which borrows all its tensors: it costs no memory, and no hook sees it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.families.experts.apply import slice_experts
from linearize.families.experts.place import ArgumentKey, Experts
from linearize.gating.gate import ChannelGate
from linearize.surgery.specs import replace_module

__all__ = ["Renumbered", "borrowed", "call_argument", "first_tensor", "inside", "without_experts"]


class Renumbered(nn.Module):
    """All experts of a bank, called by those who know only some of them, under new numbers.

    Attributes:
        bank: that holds them.
        kept: their old numbers.
        key: which argument says by number which experts a token picks.
    """

    kept: Tensor

    def __init__(self, bank: nn.Module, kept: Tensor, key: ArgumentKey) -> None:
        super().__init__()
        self.bank, self.key = bank, key
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the bank gives."""
        if isinstance(self.key, int):
            args = tuple(self.kept[value] if place == self.key else value for place, value in enumerate(args))
        else:
            kwargs[self.key] = self.kept[kwargs[self.key]]
        return self.bank(*args, **kwargs)


def borrowed(module: nn.Module) -> nn.Module:
    """A copy that shares all tensors with the original, without its hooks; what is put into it stays there.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> twin = borrowed(layer)
        >>> twin is layer, twin.weight is layer.weight
        (False, True)
    """
    parts = list(module.modules())
    values = [
        value for part in parts for held in (part._parameters, part._buffers, vars(part)) for value in held.values()
    ]
    memo: dict[int, Any] = {id(value): value for value in values if isinstance(value, Tensor)}
    made = copy.deepcopy(module, memo)
    for part in made.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return made


def inside(place: Experts) -> Experts:
    """The same place, with paths as seen from the mixture itself."""
    start = len(place.path) + 1 if place.path else 0

    def inner(path: str) -> str:
        return path[start:]

    made = copy.copy(place)
    made.path, made.bank, made.router = "", inner(place.bank), inner(place.router)
    made.rows = {inner(path): names for path, names in place.rows.items()}
    made.attributes = {(inner(path), name): meaning for (path, name), meaning in place.attributes.items()}
    return made


def without_experts(mixture: nn.Module, place: Experts, gone: Sequence[int]) -> nn.Module:
    """A twin of a mixture without some experts. It gives what the sliced mixture would.

    Args:
        mixture: the module at the path of the place.
        place: as it is known in the model.
        gone: numbers of experts.
    """
    own = inside(place)
    made = borrowed(mixture)
    for path, gate in [(path, part) for path, part in made.named_modules() if isinstance(part, ChannelGate)]:
        replace_module(made, path, gate.activation)
    if not place.listed:  # the router alone becomes smaller: slicing all matrices would be a copy of most of them
        own.rows = {path: names for path, names in own.rows.items() if path != own.bank}
        own.attributes = {key: what for key, what in own.attributes.items() if key[0] != own.bank}
    slice_experts(made, own, gone)
    if not place.listed:
        weight = next(mixture.get_submodule(own.bank).parameters())
        kept = torch.tensor(place.kept(gone), device=weight.device)
        replace_module(made, own.bank, Renumbered(made.get_submodule(own.bank), kept, place.given[1]))
    return made.eval()


def call_argument(args: tuple[Any, ...], kwargs: dict[str, Any], key: ArgumentKey) -> Any:
    """One argument of a call; None if it is not there."""
    if isinstance(key, int):
        return args[key] if key < len(args) else None
    return kwargs.get(key)


def first_tensor(output: Any) -> Tensor | None:
    """What a module gives, or the first of what it gives."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None

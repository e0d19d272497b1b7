"""Routers that never pick some experts: their logits are minus infinity. What taking experts away is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Unpicked"]


class Unpicked(TorchFunctionMode):
    """Inside this context, products with a router's matrix give minus infinity for some experts.

    Args:
        routers: matrices (E, D) with a row for each expert, each with the numbers of its experts that are gone.

    Examples:
        >>> router = torch.nn.Linear(2, 3)
        >>> with Unpicked([(router.weight, [1])]):
        ...     logits = router(torch.ones(1, 2))
        >>> logits.isinf().tolist()
        [[False, True, False]]
    """

    def __init__(self, routers: Sequence[tuple[Tensor, Sequence[int]]]) -> None:
        super().__init__()
        # By number of a tensor, which is held, so that the number does not come again: what it was made of.
        self.known = {id(weight): (weight, weight, list(gone)) for weight, gone in routers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Follow the matrices through casts and transpositions, and mask what is multiplied by them."""
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = next((self.known[id(value)] for value in given if id(value) in self.known), None)
        if found is None or not isinstance(out, Tensor):
            return out
        _, weight, gone = found
        if len(given) > 1 and out.dim() > 1 and out.shape[-1] == len(weight):
            return out.index_fill(-1, torch.tensor(gone, device=out.device), float("-inf"))
        if out.numel() == weight.numel():
            self.known[id(out)] = out, weight, gone
        return out

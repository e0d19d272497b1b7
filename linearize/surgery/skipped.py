"""Layers that are gone: what stands in their place until the list that held them closes up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import CheckpointError

__all__ = ["SHORTENED", "Silent", "Skipped", "shorten", "shortened_step", "skipped"]

SHORTENED = "Shortened"
_PLAIN = (bool, int, float, str)


class Skipped(nn.Module):
    """Gives what it is given: a residual layer without its branches.

    Attributes:
        keyword: the name by which its input may come.
        nones: how many None stand behind the result.
        rows: True if the result stands in a tuple.
        indices: the numbers under which the layer kept keys and values.

    Examples:
        >>> import torch
        >>> Skipped()(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, keyword: str = "", nones: int = 0, *, rows: bool = False, indices: Sequence[int] = ()) -> None:
        super().__init__()
        self.keyword, self.nones, self.rows, self.indices = keyword, nones, rows, tuple(indices)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        x: Tensor = args[0] if args else kwargs[self.keyword]
        return (x, *(None,) * self.nones) if self.rows or self.nones else x


class Silent(nn.Module):
    """Gives zeros of the shape of its input: a branch that adds nothing.

    Attributes:
        keyword: the name by which its input may come.
        nones: how many None stand behind the result.

    Examples:
        >>> import torch
        >>> Silent(nones=1)(torch.ones(2))
        (tensor([0., 0.]), None)
    """

    def __init__(self, keyword: str = "", nones: int = 0) -> None:
        super().__init__()
        self.keyword, self.nones = keyword, nones

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shape that the layer gave."""
        out = torch.zeros_like(args[0] if args else kwargs[self.keyword])
        return (out, *(None,) * self.nones) if self.nones else out


def skipped(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The layer that stands in the place of another; it keeps the plain attributes that the code around may read."""
    made = Skipped(**options)
    for name, value in vars(current).items():
        if type(value) in _PLAIN and not name.startswith("_") and name not in vars(made):
            vars(made)[name] = value
    return made


def shorten(container: nn.Module, keep: Sequence[int]) -> None:
    """Leave only some of the children of a list, by index, in place; numbers as names run from 0 again.

    Raises:
        CheckpointError: it has no such children.

    Examples:
        >>> layers = nn.ModuleList([nn.Linear(1, n) for n in (1, 2, 3)])
        >>> shorten(layers, [0, 2])
        >>> [layer.out_features for layer in layers]
        [1, 3]
    """
    children = [(name, child) for name, child in container._modules.items() if child is not None]
    there = all(0 <= index < len(children) for index in keep) and list(keep) == sorted(set(keep))
    if not isinstance(container, (nn.ModuleList, nn.Sequential)) or not there:
        found = f"has no layers {list(keep)!s:.80} to keep"
        raise CheckpointError(type(container).__name__, found, "Load it onto the model that it was made from.")
    kept = [children[index] for index in keep]
    if all(name == str(index) for index, (name, _) in enumerate(children)):
        kept = [(str(index), child) for index, (_, child) in enumerate(kept)]
    container._modules = OrderedDict(kept)


def shortened_step(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Shorten a list as a stored step says, when a file is loaded."""
    shorten(current, options["keep"])
    return current

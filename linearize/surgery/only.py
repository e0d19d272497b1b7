"""A linear map in the place of a module that received several arguments, or returned several results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from linearize.errors import UsageError
from linearize.surgery.carriers import AroundConv, AroundLinear

_TOLD = (
    Tensor, fx.Proxy, type(None), bool, int, float, str, tuple, list, dict, torch.SymInt, torch.SymFloat, torch.SymBool,
)  # fmt: skip


class _Only(nn.Module):
    """Stands where a module was called with more than one argument, or gave more: the first of each alone counts.

    Attributes:
        keyword: the name by which the first argument may come.
        nones: how many None stand behind the result, as attention gives them where its weights are not asked for.
        caches: whether it may be told caches of keys and values: they stay as they are.

    Raises:
        UsageError: it is told something that is neither a tensor nor plain.
    """

    keyword: str
    nones: int
    caches: bool = False
    inner: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for value in () if self.caches else (*args, *kwargs.values()):
            if not isinstance(value, _TOLD):  # a cache of keys and values, say, that would stay empty
                found = f"stands for a module that was told no {type(value).__name__} when it was replaced, and is now"
                raise UsageError(type(self).__name__, found, "Without caches: pass use_cache=False, or modules=False.")
        out = self.inner(args[0] if args else kwargs[self.keyword])
        return (out, *(None,) * self.nones) if self.nones else out


class OnlyLinear(_Only, AroundLinear):
    """A matrix in the place of a module with several arguments or results."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        keyword: str = "",
        nones: int = 0,
        *,
        caches: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.keyword, self.nones, self.caches = keyword, nones, caches


class OnlyConv(_Only, AroundConv):
    """A convolution in the place of a module with several arguments or results."""

    def __init__(self, dims: int, keyword: str = "", nones: int = 0, **geometry: Any) -> None:
        super().__init__(dims, **geometry)
        self.keyword, self.nones = keyword, nones

"""What is true on every processor, not only on this one.

Some processors pick another kernel for tensors that do not start at a multiple of 64 bytes, and that kernel adds up in
another order. Tensors of a fresh allocation are aligned; tensors mapped from a file, and parts of larger tensors, are
mostly not. `other_sums` brings that behaviour to every processor, so that a test that relies on alignment fails
everywhere. What may be promised:

- tensors are bitwise what was saved;
- outputs are bitwise equal between models whose tensors lie in memory of the same alignment (`aligned` moves them);
- outputs of mapped tensors differ by no more than sums in another order can (`reordering`).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library

ALIGNMENT = 64  # bytes: a cache line, and what torch's allocator gives
_aten = torch.ops.aten


def _unaligned(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.is_floating_point() and t.data_ptr() % ALIGNMENT for t in tensors)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _unaligned(a, b):
        a, b = a.flip(1), b.flip(0)
    return _aten.mm.out(a, b, out=a.new_empty(0))


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if _unaligned(c, a, b):
        a, b = a.flip(1), b.flip(0)
    return _aten.addmm.out(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if _unaligned(a, b):
        a, b = a.flip(2), b.flip(1)
    return _aten.bmm.out(a, b, out=a.new_empty(0))


def _baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if _unaligned(c, a, b):
        a, b = a.flip(2), b.flip(1)
    return _aten.baddbmm.out(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *_, transposed, _, groups = rest
    if groups == 1 and x.dim() == weight.dim() and _unaligned(x, weight, bias):
        axis = 0 if transposed else 1
        strides = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else None
        x, weight = x.flip(1), weight.flip(axis)
        weight = weight.contiguous(memory_format=strides) if strides and weight.dim() == 4 else weight
    flags = torch.backends.cudnn
    return _aten._convolution(
        x, weight, bias, *rest, flags.benchmark, flags.deterministic, flags.enabled, flags.allow_tf32
    )


KERNELS: dict[str, Callable[..., Tensor]] = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "convolution": _convolution,
}


@contextlib.contextmanager
def other_sums() -> Iterator[None]:
    """A processor on which matrix products and convolutions of unaligned tensors add up from the other end."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding kernels is the purpose
        for name, kernel in KERNELS.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """The same values at an address that is ``offset`` bytes behind a multiple of 64."""
    size = tensor.numel() * tensor.element_size()
    room = torch.empty(size + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT + offset
    found = room[start : start + size].view(tensor.dtype).view(tensor.shape)
    return found.copy_(tensor)


@torch.no_grad()
def moved(model: nn.Module, offset: int = 0) -> nn.Module:
    """A copy whose parameters and buffers start ``offset`` bytes behind a multiple of 64."""
    model = copy.deepcopy(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        dense = tensor.is_contiguous() and offset
        tensor.data = at_offset(tensor, offset) if dense else tensor.clone()
    return model


def terms(model: nn.Module) -> int:
    """How many summands an output has behind it at most: those of every layer on a way through all of them."""
    return sum(p.numel() // p.shape[0] for p in model.parameters() if p.dim() > 1)


def reordering(model: nn.Module, dtype: torch.dtype) -> float:
    """Largest relative difference (to the largest output) that sums in another order can make.

    A sum of n products, in any order, is off by at most n u times the sum of their absolute values, where u is half the
    distance from 1 to the next number (Higham, Accuracy and Stability, 3.1). Two orders differ by twice that. Errors of
    layers that follow each other add up. Summands of both signs make the sum smaller than the sum of absolute values
    by about sqrt(n), and make errors cancel by as much: the bound holds relative to the values themselves.
    Half-precision products are added up in float32 and rounded once a layer.
    """
    layers = sum(p.dim() > 1 for p in model.parameters())
    if dtype in (torch.float16, torch.bfloat16):
        return torch.finfo(dtype).eps * layers + torch.finfo(torch.float32).eps * terms(model)
    return torch.finfo(dtype).eps * terms(model)


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    """Both hold the same tensors, bit for bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


@torch.no_grad()
def assert_same_outputs(model: nn.Module, mapped: nn.Module, call: Callable[[nn.Module], Sequence[Tensor]]) -> None:
    """The same function: bitwise once both lie in aligned memory, within rounding where they lie now."""
    ours, theirs = call(moved(model)), call(moved(mapped))
    assert len(ours) == len(theirs) > 0
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(call(model), call(mapped), strict=True):
        if a.is_floating_point():
            infinite = ~a.isfinite()
            assert torch.equal(infinite, ~b.isfinite())
            a, b = a.double().masked_fill(infinite, 0), b.double().masked_fill(infinite, 0)  # noqa: PLW2901
            assert float((a - b).abs().max()) <= reordering(model, ours[0].dtype) * float(a.abs().max())
        else:
            assert torch.equal(a, b)

"""Inputs of several shapes from one example: what may be larger or smaller is found by running the model.

Shape letters: B batch, T length of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.errors import CaptureError
from linearize.graph.capture import Inputs, normalize_inputs
from linearize.nest import copied
from linearize.sites.record import record_of
from linearize.zoo.inputs import example_inputs as known_inputs

__all__ = ["batch_tensors", "batches_for", "cache_off", "length_axes"]


def batches_for(model: nn.Module, example: Any, *, fixed: bool = False) -> list[Inputs]:
    """Three batches: of at least two samples, of one more sample, and of another length, or of one sample.

    Where the model does not run on another number of samples or another length, the values differ instead.

    Args:
        model: a model in eval mode.
        example: inputs as for `linearize.convert`; None asks the model's library, or its record.
        fixed: all three of the example's own sizes, with other values.

    Raises:
        CaptureError: inputs must be given, or the model does not run on them.

    Examples:
        >>> [args[0].shape[0] for args, _ in batches_for(nn.Linear(4, 2), torch.randn(1, 4))]
        [2, 3, 1]
    """
    args, kwargs = _example(model, example)
    kwargs = {**kwargs, **cache_off(model, kwargs)}
    first: Inputs = (args, kwargs)
    if not batch_tensors(first):
        raise CaptureError(type(model).__name__, "found no tensor in its inputs", "Pass example_inputs=.")
    _run(model, first)
    if fixed:
        return [first, _shuffled(first, 1), _shuffled(first, 2)]
    doubled = _resized(first, [*range(_samples(first)), *range(_samples(first))][: max(2, _samples(first))])
    base = doubled if _runs(model, doubled) else first
    n = _samples(base)
    more = _resized(base, [*range(n), 0])
    shorter = _shortened(base)
    last = shorter if shorter is not None and _runs(model, shorter) else _resized(base, [0])
    found = [base]
    for other in (more, last):
        found.append(other if _runs(model, other) else _shuffled(base, len(found)))
    return found


def batch_tensors(batch: Inputs) -> list[Tensor]:
    """The tensors of a batch, in order."""
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def length_axes(batch: Inputs) -> list[int | None]:
    """For each tensor of a batch, the axis that counts positions of a sequence: the second of (B, T) ids and masks."""
    lengths = {t.shape[1] for t in batch_tensors(batch) if _is_sequence(t)}
    return [1 if _is_sequence(t) and len(lengths) == 1 else None for t in batch_tensors(batch)]


def _is_sequence(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] > 1


def _example(model: nn.Module, example: Any) -> Inputs:
    if example is not None:
        return copied(normalize_inputs(example))  # type: ignore[no-any-return]
    try:
        return known_inputs(model)
    except CaptureError:
        record = record_of(model)
        if record is None or record.inputs is None:
            raise
    like = next(model.parameters(), torch.empty(0))

    def filled(t: Tensor) -> Tensor:
        return (torch.randn(t.shape) if t.is_floating_point() else torch.ones(t.shape)).to(like.device, t.dtype)

    with torch.random.fork_rng(devices=[]):
        made: Inputs = pytree.tree_map_only(Tensor, filled, tuple(record.inputs))
    return made


def cache_off(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward beside those given: a graph of one forward has no cache of earlier ones."""
    config = getattr(model, "config", None)
    asks = "use_cache" not in kwargs and getattr(config, "use_cache", None) and hasattr(config, "to_dict")
    return {"use_cache": False} if asks else {}


def _samples(batch: Inputs) -> int:
    return next((t.shape[0] for t in batch_tensors(batch) if t.dim()), 1)


def _resized(batch: Inputs, rows: list[int]) -> Inputs:
    """Other rows of everything that has as many as the first tensor."""
    n = _samples(batch)

    def one(t: Tensor) -> Tensor:
        return t[torch.tensor(rows, device=t.device)] if t.dim() and t.shape[0] == n else t

    made: Inputs = pytree.tree_map_only(Tensor, one, batch)
    return made


def _shuffled(batch: Inputs, by: int) -> Inputs:
    """Other values of the same shapes: rolled along the last axis, those of sequences along both."""
    made: Inputs = pytree.tree_map_only(Tensor, lambda t: t.roll(by, -1) if t.dim() > 1 else t, batch)
    return made


def _shortened(batch: Inputs) -> Inputs | None:
    lengths = {t.shape[1] for t, axis in zip(batch_tensors(batch), length_axes(batch), strict=True) if axis}
    if len(lengths) != 1:
        return None
    keep = max(1, (lengths.pop() + 1) // 2)

    def one(t: Tensor) -> Tensor:
        return t[:, :keep] if _is_sequence(t) else t

    made: Inputs = pytree.tree_map_only(Tensor, one, batch)
    return made


@torch.no_grad()
def _run(model: nn.Module, batch: Inputs) -> None:
    args, kwargs = copied(batch)
    try:
        model(*args, **kwargs)
    except Exception as error:  # whatever a model's own code raises
        line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
        found = f"does not run on the example inputs ({type(error).__name__}: {line.strip()})"
        remedy = "Pass example_inputs= that the model's forward takes."
        raise CaptureError(type(model).__name__, found, remedy) from error


def _runs(model: nn.Module, batch: Inputs) -> bool:
    try:
        _run(model, batch)
    except CaptureError:
        return False
    return True

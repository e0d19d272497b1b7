"""What several families ask of a model's graph: read once."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.errors import CaptureError
from linearize.graph.attention import Attention, attentions_of
from linearize.graph.capture import Capture, Inputs
from linearize.graph.protect import untouched
from linearize.running.models import batches_of, device_of, eagerly, evaluating, move

__all__ = ["CapturedAttention", "one_sample", "read", "weighs"]

_NAME = "reading"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedAttention:
    """A captured model and its attentions.

    Attributes:
        attentions: in order of execution.
        captured: the graph; None if the model cannot be captured.
        inputs: what it was captured for: the first sample of a batch, which tells the heads' axis from the batch's.
        times: how many samples the batch has.
    """

    attentions: tuple[Attention, ...]
    captured: Capture | None
    inputs: Inputs
    times: float


def read(model: nn.Module, batch: Any, memory: MutableMapping[str, Any] | None = None) -> CapturedAttention:
    """The graph of a gated model; remembered, if there is anywhere to."""
    if memory is not None and _NAME in memory:
        known: CapturedAttention = memory[_NAME]
        return known
    whole = batches_of(batch)[0]
    found = CapturedAttention((), None, whole, 1.0)
    tries = (one_sample(whole), (whole, 1.0)) if weighs(model, batch) else ()
    for inputs, times in tries:
        try:
            attentions, captured = attentions_of(model, inputs)
        except CaptureError:
            continue
        found = CapturedAttention(tuple(attentions), captured, inputs, times)
        break
    if memory is not None:
        memory[_NAME] = found
    return found


class _Names(TorchDispatchMode):
    """Notes the names of ops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def weighs(model: nn.Module, batch: Any) -> bool:
    """Whether a model takes a softmax of anything, as attention does: seen in a run, which is cheaper than a capture.

    Examples:
        >>> import torch
        >>> [weighs(m, torch.ones(2, 3)) for m in (nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Softmax(-1)))]
        [False, True]
    """
    inputs, _ = one_sample(batches_of(batch)[0])
    for some in (inputs, batches_of(batch)[0]):
        try:
            with eagerly(), evaluating(model), untouched(model), _Names() as names:
                args, kwargs = move(some, device_of(model))
                model(*args, **kwargs)
        except Exception as error:  # whatever a model has against a single sample
            _log.debug("no run to see its ops: %s", error)
            continue
        return any("softmax" in name or "attention" in name for name in names.seen)
    return True


def one_sample(batch: Inputs) -> tuple[Inputs, float]:
    """The first sample of a batch, and how many there are."""
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    size = sizes[0] if sizes else 1
    if size < 2:
        return batch, 1.0

    def first(tensor: Tensor) -> Tensor:
        return tensor[:1] if tensor.dim() and tensor.shape[0] == size else tensor

    cut: Inputs = pytree.tree_map_only(Tensor, first, batch)
    return cut, float(size)

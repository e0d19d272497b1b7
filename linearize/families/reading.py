"""What several families ask of a model's graph: read once."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.errors import CaptureError
from linearize.graph.attention import Attention, attentions_of
from linearize.graph.capture import Capture, Inputs
from linearize.running.models import batches_of

__all__ = ["Reading", "one_sample", "read"]

_NAME = "reading"


@dataclass(frozen=True)
class Reading:
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


def read(model: nn.Module, batch: Any, memory: MutableMapping[str, Any] | None = None) -> Reading:
    """The graph of a gated model; remembered, if there is anywhere to."""
    if memory is not None and _NAME in memory:
        known: Reading = memory[_NAME]
        return known
    whole = batches_of(batch)[0]
    found = Reading((), None, whole, 1.0)
    for inputs, times in (one_sample(whole), (whole, 1.0)):
        try:
            attentions, captured = attentions_of(model, inputs)
        except CaptureError:
            continue
        found = Reading(tuple(attentions), captured, inputs, times)
        break
    if memory is not None:
        memory[_NAME] = found
    return found


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

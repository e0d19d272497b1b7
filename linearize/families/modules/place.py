"""The place of a whole module that one linear map could replace.

This is attention, a residual block, or any module that maps one tensor to one tensor. A residual block often changes
its input only a little. A matrix, fitted by least squares and applied at every position, can then replace all of it,
including attention, norms and depthwise maps, where no activation could be collapsed. The replacement is approximate,
and its loss is predicted as for every other option.

Source of the idea: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization", 2025.

Shape letters: I inputs and O outputs of the module, R rows (positions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.algebra.covariance import Covariance
from linearize.surgery.specs import Spec

__all__ = ["Whole"]


@dataclass
class Whole:
    """A module that one linear map could replace, and its statistics.

    Attributes:
        path: of the module.
        sites: names of the gated sites inside.
        inside: path of the smallest other whole module around it; "" for none.
        inputs, outputs: I and O.
        axis: of the channels, counted from the end.
        alone: True if the module is called with one argument only, and gives nothing but a tensor.
        flops, params: of the module, for the example batch.
        shape: of the input in the example batch.
        behind: path of the module whose output is its input, and goes nowhere else; "" if none is known.
        keyword: by which it is given its input; "" if by position.
        nones: how many None it gives behind its output.
        bias: whether the map may have one.
        caches: whether the module is told caches of keys and values, which the map leaves alone.
        rows: covariance of (input, output).
        sensitivity: G of the output, (O, O).
        samples: what the sensitivity is a sum over.
    """

    path: str
    sites: tuple[str, ...]
    inside: str
    inputs: int
    outputs: int
    axis: int
    alone: bool
    flops: float
    params: float
    shape: tuple[int, ...]
    behind: str = ""
    keyword: str = ""
    nones: int = 0
    bias: bool = True
    caches: bool = False
    rows: Covariance | None = None
    sensitivity: Tensor | None = None
    samples: float = 0.0

    def state(self) -> dict[str, Any]:
        """The sums, as plain values and tensors. `restore` reads them back."""
        rows = None if self.rows is None else self.rows.state()
        return {"samples": self.samples, "rows": rows, "sensitivity": self.sensitivity}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the result of `state`."""
        self.rows = None if state["rows"] is None else Covariance.of(state["rows"], device)
        sensitivity: Tensor | None = state["sensitivity"]
        self.sensitivity = None if sensitivity is None else sensitivity.to(device)
        self.samples = state["samples"]

    def merge(self, other: Whole) -> None:
        """Add the sums of another one, from other batches."""
        if other.rows is not None:
            if self.rows is None:
                self.rows = other.rows
            else:
                self.rows.merge(other.rows)
        if other.sensitivity is not None:
            mine = 0.0 if self.sensitivity is None else self.sensitivity
            self.sensitivity = other.sensitivity + mine
        self.samples += other.samples

    @property
    def spec(self) -> Spec:
        """The description of the layer that would replace the module."""
        kind, more = ("", {}) if self.alone else ("Only", {"keyword": self.keyword, "nones": self.nones})
        more = {**more, "caches": True} if self.caches else more
        if self.axis == -1:
            sizes = {"in_features": self.inputs, "out_features": self.outputs}
            return {"type": f"{kind}Linear", **sizes, "bias": self.bias, **more}
        n = -1 - self.axis
        channels = {"in_channels": self.inputs, "out_channels": self.outputs, "kernel_size": [1] * n}
        rest = {"stride": [1] * n, "padding": [0] * n, "dilation": [1] * n, "groups": 1, "bias": True}
        return {"type": f"{kind}Conv{n}d", **channels, **rest, **more}

    @property
    def least(self) -> float:
        """FLOPs of that layer, for the example batch."""
        return 2.0 * math.prod(self.shape) * self.outputs

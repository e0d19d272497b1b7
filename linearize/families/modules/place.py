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
from dataclasses import dataclass

from linearize.families.gathered import Gathered
from linearize.surgery.specs import Spec

__all__ = ["Whole"]


@dataclass
class Whole(Gathered):
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
        rows, sensitivity, samples: the covariance of (input, output), and how much the output matters (`Gathered`).
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

"""The empirical neural tangent kernel, its rank, and how far it has moved.

Shape letters: N samples, O outputs of a sample, R = N * O rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.analysis.canvas import FIRST, SECOND, head, new_figure, write_picture
from linearize.analysis.dimension import gram
from linearize.analysis.jacobian import Differentiable
from linearize.errors import UsageError
from linearize.text_table import render

__all__ = ["TangentRecorder", "effective_rank", "kernel_distance", "kernel_rank", "tangent_kernel"]


def tangent_kernel(model: nn.Module, inputs: Any, *, memory: float = 2**30) -> Tensor:
    """`K = J J^T`, float64 (R, R), with the Jacobian J of `functional_dimension` on all inputs.

    Raises:
        UsageError: the inputs do not fit the model, or the kernel does not fit in `memory` (bytes).
        DataError: the kernel holds NaN or infinity.

    Examples:
        >>> net = nn.Linear(3, 1)
        >>> x = torch.eye(3)
        >>> tangent_kernel(net, x).tolist()
        [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]
    """
    lens = Differentiable.of(model, inputs)
    outputs = lens.outputs(lens.sample(0, 1)).shape[1]
    return gram(lens, lens.samples, outputs, memory, kernel=True)


def kernel_rank(kernel: Tensor, tolerance: float = 1e-7) -> int:
    """The number of singular values of the kernel's Jacobian that are above `tolerance` times the largest."""
    values = torch.linalg.eigvalsh(kernel.double()).clamp_min(0).sqrt()
    return int((values > tolerance * values.max()).sum()) if values.numel() else 0


def effective_rank(kernel: Tensor) -> float:
    """The number of directions over which a kernel is spread: `exp(-sum p log p)` of its eigenvalues scaled to sum 1.

    It is R if all eigenvalues are equal, and 1 if there is only one. `kernel_rank`, in contrast, counts small and large
    eigenvalues alike.
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Examples:
        >>> round(effective_rank(torch.eye(4)), 6), round(effective_rank(torch.ones(4, 4)), 6)
        (4.0, 1.0)
    """
    values = torch.linalg.eigvalsh(kernel.double()).clamp_min(0)
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp()) if bool((values > 0).any()) else 0.0


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """`1 - <A, B> / (|A| |B|)`: 0 for kernels that are multiples of one another, at most 1.

    Source: Fort et al., "Deep learning versus kernel learning", NeurIPS 2020.

    Raises:
        UsageError: the kernels have different shapes.

    Examples:
        >>> round(kernel_distance(torch.eye(2), torch.ones(2, 2)), 3)
        0.293
    """
    if a.shape != b.shape:
        raise UsageError("kernel", f"found {tuple(a.shape)} and {tuple(b.shape)}", "Use the same inputs for both.")
    x, y = a.double().flatten(), b.double().flatten()
    scale = float(x.norm() * y.norm())
    return max(0.0, 1 - float(x @ y) / scale) if scale else 0.0


@dataclass
class TangentRecorder:
    """Records the rank of the tangent kernel, and its distance from the first record, while a model is trained.

    Attributes:
        inputs: the samples that the kernel is computed on.
        reference: the kernel at the first record.
        curve: a row of plain data for each record.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> recorder = TangentRecorder(torch.randn(6, 2))
        >>> recorder.record(net)["distance"] < 1e-12
        True
    """

    inputs: Any
    memory: float = 2**30
    reference: Tensor | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)

    def record(self, model: nn.Module, step: float | None = None, **more: Any) -> dict[str, Any]:
        """Add a row: the step (by default the number of rows so far), ranks, distance from the start, and size."""
        kernel = tangent_kernel(model, self.inputs, memory=self.memory)
        self.reference = kernel if self.reference is None else self.reference
        row = {
            "step": len(self.curve) if step is None else step,
            "rank": kernel_rank(kernel),
            "effective_rank": effective_rank(kernel),
            "distance": kernel_distance(self.reference, kernel),
            "norm": float(kernel.norm()),
            **more,
        }
        self.curve.append(row)
        return row

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {"curve": self.curve}

    def draw(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Write a picture of distance and ranks over the steps."""
        draw_kernel(self.curve, path, title)

    def __str__(self) -> str:
        rows = [
            (row["step"], row["rank"], f"{row['effective_rank']:.1f}", f"{row['distance']:.4f}", f"{row['norm']:.3g}")
            for row in self.curve
        ]
        return render(("step", "rank", "effective rank", "distance", "norm"), rows)


def draw_kernel(curve: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw distance and ranks of a tangent kernel over the steps of a `TangentRecorder`.

    Raises:
        UsageError: nothing was recorded, matplotlib is not installed, or the file cannot be written.
    """
    if not curve:
        raise UsageError("curve", "found no row", "Call record() at least once.")
    figure, (left, right) = new_figure((9, 3), 2)
    steps = [row["step"] for row in curve]
    left.plot(steps, [row["distance"] for row in curve], color=FIRST, marker="o", markersize=4)
    left.set_ylim(bottom=0)
    left.set_ylabel("distance from the start")
    right.plot(steps, [row["rank"] for row in curve], color=FIRST, marker="o", markersize=4, label="rank")
    effective = [row["effective_rank"] for row in curve]
    right.plot(steps, effective, color=SECOND, marker="s", markersize=4, linestyle="--", label="effective rank")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xlabel("step")
    head(left, title, f"tangent kernel, distance {curve[-1]['distance']:.2f} at the end")
    head(right, "", "")
    write_picture(figure, path)

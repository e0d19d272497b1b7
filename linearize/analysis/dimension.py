"""Functional dimension: how many directions in parameter space change the function, on a batch of inputs.

Source: Grigsby, Lindsey and Rolnick, "Hidden Symmetries of ReLU Networks", ICML 2023. Shape letters: N samples, O
outputs of a sample, R = N * O rows of the Jacobian, P parameters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linearize import checks
from linearize.analysis.canvas import FIRST, SECOND, head, new_figure, write_picture
from linearize.analysis.jacobian import BYTES, Differentiable, chunks, human
from linearize.analysis.units import inputs_of
from linearize.errors import CaptureError, UsageError
from linearize.gating.gate import gates
from linearize.graph.discover import discover
from linearize.sites.record import record_of
from linearize.sites.site import Site
from linearize.text_table import render

__all__ = ["FunctionalDimension", "functional_dimension", "scaling_bound"]

HOMOGENEOUS = frozenset({"relu", "leakyrelu", "leaky_relu", "prelu"})
_PATIENCE = 2  # a rank that stands still over one doubling may grow again
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class FunctionalDimension:
    """The rank of a model's Jacobian. `int()` of it is the rank. It prints as a table.

    Attributes:
        rank: numerical rank on the largest batch that was needed.
        parameters: P.
        bound: the largest rank that the architecture allows: parameters minus positive rescalings.
        batches: the number of samples and the rank of every batch, in order of size.
        saturated: True if the rank stopped growing, or reached the bound, before the samples ran out.
        spectrum: singular values of the Jacobian on the last batch, float64, largest first.
        tolerance: singular values up to this value count as zero.
        method: "jacobian" if the Jacobian itself was decomposed, "gram" if its Gram matrix was.
    """

    rank: int
    parameters: int
    bound: int
    batches: tuple[tuple[int, int], ...]
    saturated: bool
    spectrum: Tensor
    tolerance: float
    method: str

    @property
    def gap(self) -> tuple[float, float]:
        """The last singular value that counts and the first that does not (0 if there is none)."""
        values = self.spectrum.tolist()
        last = values[self.rank - 1] if self.rank else float("inf")
        return last, values[self.rank] if self.rank < len(values) else 0.0

    @property
    def clear(self) -> bool:
        """True if the gap is at least a factor of 1000, so that the rank does not depend on the exact limit."""
        last, first = self.gap
        return first == 0 or last / first >= 1000

    def __int__(self) -> int:
        return self.rank

    __index__ = __int__

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {
            "rank": self.rank,
            "parameters": self.parameters,
            "bound": self.bound,
            "hidden": self.bound - self.rank,
            "batches": [{"samples": n, "rank": rank} for n, rank in self.batches],
            "saturated": self.saturated,
            "gap": [None if value == float("inf") else value for value in self.gap],
            "clear": self.clear,
            "tolerance": self.tolerance,
            "method": self.method,
            "spectrum": self.spectrum.tolist(),
        }

    def draw(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Write a picture of the rank over the samples and of the singular values."""
        draw_dimension(self, path, title)

    def __str__(self) -> str:
        table = render(("samples", "rank"), self.batches)
        last, first = self.gap
        note = "" if self.saturated else "; still growing: pass more samples"
        return (
            f"{table}\nfunctional dimension {self.rank} of {self.parameters} parameters, at most {self.bound}{note}\n"
            f"singular values around the cut: {last:.2e}, {first:.2e} ({self.method}, cut at {self.tolerance:.1e})"
        )


def functional_dimension(
    model: nn.Module,
    inputs: Any,
    *,
    method: Literal["auto", "jacobian", "gram"] = "auto",
    tolerance: float | None = None,
    memory: float = 2**30,
) -> FunctionalDimension:
    """The rank of the Jacobian of the outputs on a batch with respect to the parameters.

    This is `rank [d f(x_n; w)_o / d w_p]`, with a row for each sample n and output o. The batch starts with the first
    samples of `inputs` and doubles until the rank has not grown over two doublings. Everything is computed in float64,
    in eval mode, on a copy of the model. The `alpha` of gates does not count as a parameter.

    The numerical rank counts singular values above `tolerance`. By default the limit is `max(R, P) * eps` times the
    largest one for the Jacobian. For the Gram matrix `J J^T` (the empirical neural tangent kernel) or `J^T J` it is
    higher, the square root of that, because eigenvalues are squares: small singular values are lost in rounding.

    Args:
        model: a model that computes each sample separately.
        inputs: the samples: a tensor, a tuple, or a dict of keyword arguments, with N on the first axis of each tensor.
        method: "jacobian", "gram", or "auto": the Jacobian if it fits in `memory`, else the Gram matrix.
        tolerance: singular values up to this share of the largest count as zero; None for the default above.
        memory: the largest size of a matrix in bytes.

    Raises:
        UsageError: the inputs do not fit the model, or the matrix does not fit in memory (the message says how large).
        DataError: the Jacobian holds NaN or infinity.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> found = functional_dimension(net, torch.randn(400, 2))
        >>> int(found), found.bound, found.parameters
        (13, 13, 17)
    """
    checks.module("model", model)
    checks.choice("method", method, ("auto", "jacobian", "gram"))
    memory = checks.number("memory", memory, above=0)
    if tolerance is not None:
        checks.number("tolerance", tolerance, least=0)
    lens = Differentiable.of(model, inputs)
    outputs = lens.outputs(lens.sample(0, 1)).shape[1]
    bound = scaling_bound(model, inputs)
    samples = min(lens.samples, max(1, -(-lens.size // (4 * outputs))))
    batches: list[tuple[int, int]] = []
    while True:
        values, used = _spectrum(lens, samples, outputs, method, memory)
        cut = _cut(values, max(samples * outputs, lens.size), used, tolerance)
        rank = int((values > cut).sum())
        batches.append((samples, rank))
        latest = [found for _, found in batches[-1 - _PATIENCE :]]
        stopped = len(latest) > _PATIENCE and latest[0] == rank < batches[-1 - _PATIENCE][0] * outputs
        if stopped or rank >= bound or samples == lens.samples:
            done = stopped or rank >= bound
            return FunctionalDimension(rank, lens.size, bound, tuple(batches), done, values, cut, used)
        samples = min(lens.samples, 2 * samples)


def _cut(values: Tensor, size: int, method: str, tolerance: float | None) -> float:
    if not values.numel():
        return 0.0
    relative = tolerance
    if relative is None:
        relative = size * _EPS if method == "jacobian" else (size * _EPS) ** 0.5
    return float(values[0]) * relative


def _spectrum(lens: Differentiable, samples: int, outputs: int, method: str, memory: float) -> tuple[Tensor, str]:
    """Singular values of the Jacobian on the first samples, and how they were found."""
    rows, size = samples * outputs, lens.size
    whole = BYTES * rows * size
    if method == "jacobian" and whole > memory:
        found = f"its Jacobian of {rows} x {size} numbers takes {human(whole)}, more than memory={human(memory)}"
        raise UsageError(type(lens.model).__name__, found, 'Pass method="gram", fewer samples, or more memory=.')
    if method != "gram" and whole <= memory:
        parts = [lens.rows(*part) for part in chunks(samples, outputs * size, memory)]
        return torch.linalg.svdvals(torch.cat(parts)), "jacobian"
    values = torch.linalg.eigvalsh(gram(lens, samples, outputs, memory)).flip(0)
    return values.clamp_min(0).sqrt(), "gram"


def gram(lens: Differentiable, samples: int, outputs: int, memory: float, *, kernel: bool = False) -> Tensor:
    """`J J^T` (R, R) or, if that is smaller and not `kernel`, `J^T J` (P, P), without storing J.

    Raises:
        UsageError: the matrix, or the rows of one sample, do not fit in memory.
    """
    rows, size = samples * outputs, lens.size
    side = rows if kernel else min(rows, size)
    needed = BYTES * max(side * side, 4 * outputs * size)
    if needed > memory:
        whole = human(BYTES * rows * size)
        found = (
            f"its Jacobian of {rows} x {size} numbers takes {whole}, and even its Gram matrix of {side} x {side}, "
            f"or the {outputs} rows of a sample, {human(needed)}: more than memory={human(memory)}"
        )
        raise UsageError(type(lens.model).__name__, found, "Pass fewer samples, fewer outputs, or more memory=.")
    parts = list(chunks(samples, outputs * size, memory))
    if side != rows or (size < rows and not kernel):
        total = torch.zeros(size, size, dtype=torch.float64)
        for part in parts:
            block = lens.rows(*part)
            total += block.T @ block
        return total
    total = torch.zeros(rows, rows, dtype=torch.float64)
    for start, stop in parts:
        left = lens.rows(start, stop)
        for first, last in parts:
            if first > start:
                continue
            right = left if first == start else lens.rows(first, last)
            block = left @ right.T
            total[start * outputs : stop * outputs, first * outputs : last * outputs] = block
            total[first * outputs : last * outputs, start * outputs : stop * outputs] = block.T
    return total


def scaling_bound(model: nn.Module, inputs: Any) -> int:
    """Parameters minus one for each hidden channel that can be scaled up before and down after its activation.

    Every channel of a positively homogeneous activation (ReLU, leaky ReLU) directly between linear maps with weights of
    their own has that symmetry. For fully connected ReLU networks this is the bound of the paper.

    Args:
        model: plain or converted.
        inputs: example inputs. A model that cannot be captured on them is bounded by its number of parameters.
    """
    alphas = {id(gate.alpha) for gate in gates(model).values()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in alphas)
    record = record_of(model)
    try:
        sites = record.sites if record is not None and record.sites else discover(model, inputs_of(model, inputs))
    except CaptureError:
        return total
    return total - sum(site.channels for site in sites if scalable(site) and _plain_gate(model, site))


def scalable(site: Site) -> bool:
    """True if the channels of a site can be scaled without changing the function."""
    folds = (*site.folds, *site.consumer_folds)
    known = site.producer is not None and site.consumers and site.reason is None and not site.gated_unit
    return bool(known) and not folds and site.activation in HOMOGENEOUS


def _plain_gate(model: nn.Module, site: Site) -> bool:
    """A surrogate with an intercept is not homogeneous."""
    gate = gates(model).get(site.name)
    return gate is None or bool((gate.intercept == 0).all())


def draw_dimension(found: FunctionalDimension, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the rank over the samples, and the singular values with the limit between those that count and the others.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure, (left, right) = new_figure((9, 3), 2)
    left.plot(*zip(*found.batches, strict=True), color=FIRST, marker="o", markersize=4)
    left.axhline(found.bound, color=SECOND, linestyle="--", linewidth=1.2)
    left.text(found.batches[0][0], found.bound, "bound", color=SECOND, fontsize=8, va="bottom")
    left.set_xscale("log")
    left.minorticks_off()
    shown = [samples for samples, _ in found.batches][:: -(-len(found.batches) // 7)]
    left.set_xticks(shown, [str(samples) for samples in shown])
    left.set_ylim(0, 1.12 * max(1, found.bound))
    left.set_xlabel("samples")
    left.set_ylabel("rank")
    head(left, title, f"functional dimension {found.rank} of {found.parameters}")
    values = found.spectrum.clamp_min(float(found.spectrum.max()) * 1e-20) if found.spectrum.numel() else found.spectrum
    right.plot(range(1, len(values) + 1), values.tolist(), color=FIRST, marker=".", markersize=3, linewidth=0)
    if found.tolerance > 0:
        right.axhline(found.tolerance, color=SECOND, linestyle="--", linewidth=1.2)
        right.set_yscale("log")
    right.set_xlabel("index")
    right.set_ylabel("singular value")
    head(right, "", f"cut at {found.tolerance:.0e} ({found.method})")
    write_picture(figure, path)

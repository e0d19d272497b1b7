"""Check that two models compute the same function, by the relative errors of every output on inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize import checks
from linearize.errors import UsageError
from linearize.graph.capture import Inputs
from linearize.nest import leaves_of
from linearize.report.verification import OutputError, Verification, worst
from linearize.running.models import batches_of, call, evaluating

__all__ = ["verify"]

# float32 and float64: the error budget of a network whose sums are taken in another order. The 16-bit types:
# each weight is rounded once more when layers merge, so four steps of the type, the best such a model can do.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


@dataclass
class _Sums:
    """Running maxima and sums of one output over the batches, and the first reason why it fails."""

    tolerance: float = 0.0
    max_difference: float = 0.0
    max_reference: float = 0.0
    square_difference: float = 0.0
    square_reference: float = 0.0
    reason: str | None = field(default=None)

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        """Add one batch's output to the sums."""
        a, b = _comparable(reference), _comparable(candidate)
        if a.shape != b.shape:
            self.fail(f"shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        elif reference.dtype != candidate.dtype:
            self.fail(f"{candidate.dtype} instead of {reference.dtype}".replace("torch.", ""))
        elif a.numel():
            self._add_numbers(a, b)
            exact = not (reference.is_floating_point() or reference.is_complex())
            if exact and not torch.equal(reference.cpu(), candidate.cpu()):
                self.fail("integers differ")

    def _add_numbers(self, a: Tensor, b: Tensor) -> None:
        infinite = torch.isinf(a) | torch.isinf(b)
        if infinite.any():  # legitimate as a mask: must be equal there, and is measured everywhere else
            if not torch.equal(a[infinite], b[infinite]):
                self.fail("infinite values differ")
            a, b = a.masked_fill(infinite, 0), b.masked_fill(infinite, 0)
        if torch.isnan(a).any() or torch.isnan(b).any():
            self.fail("NaN in the reference" if torch.isnan(a).any() else "NaN in the candidate")
        difference = (a - b).abs()
        self.max_difference = worst([self.max_difference, float(difference.max())])
        self.max_reference = worst([self.max_reference, float(a.abs().max())])
        self.square_difference += float(difference.square().sum())
        self.square_reference += float(a.abs().square().sum())

    def fail(self, reason: str) -> None:
        """Keep the first reason."""
        self.reason = self.reason or reason

    def result(self, name: str) -> OutputError:
        """The errors over all batches."""
        max_error = _ratio(self.max_difference, self.max_reference)
        rms_error = _ratio(math.sqrt(self.square_difference), math.sqrt(self.square_reference))
        return OutputError(name, max_error, rms_error, self.tolerance, self.reason)


def verify(reference: nn.Module, candidate: nn.Module, inputs: Any, *, tolerance: float | None = None) -> Verification:
    """Compare two models on inputs. Both run in eval mode, without and with gradients, and stay unchanged.

    Both ways are compared because a model may take another path without gradients, as torch's transformer layers do.
    Every tensor in the outputs is compared, through tuples, dicts and dataclasses. Integers must be equal. NaN never
    passes. Infinite values must be equal, and are left out of the errors.

    Args:
        reference: the model to compare with.
        candidate: the model to check. It may be on another device.
        inputs: a tensor, a tuple, a dict of keyword arguments, or a list of such batches.
        tolerance: the largest relative error that passes, maximum and RMS; None chooses by the coarsest
            floating type in the outputs and parameters: 1e-12 for float64, 1e-5 for float32, 4e-3 for
            float16, 3.2e-2 for bfloat16.

    Returns:
        A `Verification` with `.passed`, `.max_error`, `.rms_error` and `.outputs`. It prints as a table.

    Raises:
        UsageError: no inputs, a negative tolerance, or a model that does not run on the inputs.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> bool(verify(model, model, torch.randn(3, 4)))
        True
    """
    if tolerance is not None and (not checks.is_number(tolerance) or not tolerance >= 0):
        checks.refuse("tolerance", tolerance, "a number of at least 0, or None")
    for name, given in (("reference", reference), ("candidate", candidate)):
        checks.module(name, given)
        if not any(hasattr(module, "_hf_hook") for module in given.modules()):  # which fetches what is offloaded
            checks.weights(name, given)
    parameters = [p for model in (reference, candidate) for p in model.parameters()]
    comparison = _Comparison(tolerance, max((_tolerance(p.dtype) for p in parameters), default=0.0))
    with evaluating(reference, candidate):
        for batch in batches_of(inputs):
            _compare(comparison, reference, candidate, batch)
            if any(parameter.requires_grad for parameter in parameters):
                with torch.enable_grad():
                    _compare(comparison, reference, candidate, batch)
    return comparison.result()


def _compare(comparison: _Comparison, reference: nn.Module, candidate: nn.Module, batch: Inputs) -> None:
    """Compare all outputs of one batch; where only the mode with gradients cannot run the reference, nothing."""
    try:
        expected = _named(call("reference", reference, batch))
    except UsageError:
        if torch.is_grad_enabled():  # it has run without: kernels for inference, say
            return
        raise
    found = _named(call("candidate", candidate, batch))
    for name in expected | found:
        comparison.add(name, expected.get(name, _MISSING), found.get(name, _MISSING))


_MISSING = object()


@dataclass
class _Comparison:
    """All outputs met so far. `coarsest` is the tolerance that the parameters' types call for."""

    tolerance: float | None
    coarsest: float
    sums: dict[str, _Sums] = field(default_factory=dict)
    ignored: dict[str, None] = field(default_factory=dict)

    def add(self, name: str, a: Any, b: Any) -> None:
        """Compare one output of one batch: `a` of the reference, `b` of the candidate."""
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            entry = self._entry(name)
            if a.is_floating_point() or a.is_complex():
                chosen = max(_tolerance(a.dtype), self.coarsest)
                entry.tolerance = chosen if self.tolerance is None else self.tolerance
            entry.add(a, b)
        elif a is _MISSING or b is _MISSING:
            self._entry(name).fail("only in the candidate" if a is _MISSING else "missing in the candidate")
        elif isinstance(a, Tensor) or isinstance(b, Tensor):
            self._entry(name).fail(f"{type(b).__name__} instead of {type(a).__name__}")
        elif isinstance(a, (bool, int, float, str)):
            if a != b:
                self._entry(name).fail(f"{b!r} instead of {a!r}")
        elif a is not None or b is not None:
            self.ignored[name] = None

    def _entry(self, name: str) -> _Sums:
        return self.sums.setdefault(name, _Sums())

    def result(self) -> Verification:
        """The result for all batches."""
        return Verification(tuple(s.result(name) for name, s in self.sums.items()), tuple(self.ignored))


def _named(output: Any) -> dict[str, Any]:
    """Tensors and other values in an output, by path."""
    return {name or "output": value for name, value in leaves_of(output)}


def _comparable(tensor: Tensor) -> Tensor:
    """A dense copy in double precision on the CPU, which has that type on every machine."""
    dense = tensor.detach().cpu()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _tolerance(dtype: torch.dtype) -> float:
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
    return TOLERANCES.get(real, 0.0)


def _ratio(difference: float, reference: float) -> float:
    if reference == 0:
        return 0.0 if difference == 0 else (math.nan if math.isnan(difference) else math.inf)
    return difference / reference

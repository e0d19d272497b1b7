"""What the sweep asks of one model: captured, gated, collapsed, saved, loaded, the same function throughout."""

from __future__ import annotations

import ast
import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from benchmarks.coverage.cases import Case, DoesNotRun, all_blocks, signature
from benchmarks.coverage.pool import Record
from benchmarks.coverage.row import COUNTED, EQUAL, META, NOTHING, RUNS_NOT, UNREACHED, Row
from linearize.cost import cost
from linearize.graph.capture import Inputs, capture, tensors_of
from linearize.graph.discover import discover
from linearize.sites.record import record_of
from linearize.sites.site import Site

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
ALWAYS_BELOW = 12_000_000
# Gates of attention, squeeze-and-excite and routers are no channel activations: they are counted apart.
_NOTHING = ("no activation was found", "none of its")
_UNREACHED = "the forward that calls it cannot be rewritten"
_ASIDE = "it is a gate that scales another tensor"
_DIFFERS = "collapsed differs from gated"
_AS_MUCH = "so does the gated model from itself when its weights change in their last digit"


def stir(model: nn.Module) -> nn.Module:
    """Random values where an initialisation hides a layer: layer scales near zero, identity norms, heads of zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.dim() <= 1 or bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
        for module in model.modules():
            variance = getattr(module, "running_var", None)
            if isinstance(variance, Tensor):
                variance.uniform_(0.5, 2.0, generator=generator)
    return model.train().eval()  # some remember what they computed from their weights until they train again


@torch.no_grad()
def half_linear(model: nn.Module) -> None:
    """A random half of every site's channels linear, with random surrogates (constants in gated units)."""
    generator = torch.Generator().manual_seed(1)
    for gate in linearize.gates(model).values():
        half = torch.randperm(gate.channels, generator=generator) < (gate.channels + 1) // 2
        slope = 2 * torch.rand(gate.channels, generator=generator) - 1
        intercept = torch.rand(gate.channels, generator=generator) - 0.5
        gate.slope.copy_(torch.zeros_like(gate.slope) if gate.gated_unit else slope.to(gate.slope))
        gate.intercept.copy_(intercept.to(gate.intercept))
        gate.linearize_(half)


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors that a model puts out; the same random numbers each time, for models that draw some."""
    torch.manual_seed(0)
    return [t.clone() for t in tensors_of(model(*inputs[0], **inputs[1]))]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest relative difference over all outputs; infinite where shapes or integers differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(x, y) else float("inf"))
        elif not torch.equal(x, y):
            finite = torch.isfinite(x)  # masked scores are infinite in some models
            same = torch.equal(finite, torch.isfinite(y)) and torch.equal(x[~finite], y[~finite])
            moved, scale = (x - y)[finite].abs().max(), x[finite].abs().max().clamp_min(1e-30)
            worst = max(worst, float(moved / scale) if same else float("inf"))
    return worst


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds that it took."""
    start = time.perf_counter()
    value = action()
    return value, time.perf_counter() - start


def fill(
    row: Row,
    make: Callable[[], Case],
    *,
    export: bool = False,
    known: Mapping[str, Record] | None = None,
    count: bool = False,
) -> Row:
    """Fill in a row for the model that `make` builds; what cannot be built or run says why.

    A model of a signature in `known` is the same one under another name: it gets that row. With `count`, the model is
    only captured and given gates, so that activations are counted and nothing is compared.
    """
    try:
        return _filled(row, make, export=export, known=known or {}, count=count)
    finally:
        all_blocks()


def _filled(row: Row, make: Callable[[], Case], *, export: bool, known: Mapping[str, Record], count: bool) -> Row:
    try:
        case = make()
    except DoesNotRun as error:
        row.result = f"{RUNS_NOT}: {error.found}"
        return row
    row.size, row.signature = case.size, signature(case.model)
    if row.signature in known:
        return same_as(row, known[row.signature])
    if count:
        return inspect_only(row, case.model, case.inputs, COUNTED)
    if next(case.model.parameters()).is_meta:
        return inspect_only(row, case.model, case.inputs)
    return check(row, stir(case.model), case.inputs, export=export)


def same_as(row: Row, record: Record) -> Row:
    """The row of a model that was checked under another name."""
    kinds = {field.name: type(getattr(row, field.name)) for field in fields(row)}
    for name in kinds.keys() - {"name", "family", "smallest", "note", "reasons"}:
        setattr(row, name, kinds[name](record[name]))
    row.reasons = ast.literal_eval(record["reasons"])
    row.note = f"{record['note']} same as {record['name']};".strip()
    return row


def check(row: Row, model: nn.Module, inputs: Inputs, *, export: bool = False) -> Row:
    """Fill in a row. The model is in eval mode, its inputs are of its dtype.

    Args:
        row: what is filled in.
        model: what is checked.
        inputs: of its forward.
        export: also time a forward pass and a `torch.export` of the model, to compare `convert` with.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    row.dtype = str(dtype).removeprefix("torch.")
    original, row.seconds_forward = timed(lambda: run(model, inputs))
    if any(bool(torch.isnan(t).any()) for t in original if t.is_floating_point()):
        row.result = "the original model itself puts out NaN"
        return row
    if difference(original, run(model, inputs)) > 0:
        row.result = "the original model gives another output each time"
        return row
    before = cost(model, _example(inputs))
    row.parameters, row.flops = before.parameters, before.flops
    if export:
        _, row.seconds_forward = timed(lambda: run(model, inputs))
        with suppress(linearize.CaptureError):  # convert will say so
            _, row.seconds_export = timed(lambda: capture(model, inputs))
    gated = _converted(row, model, inputs)
    if gated is None:
        return row
    if not all(torch.equal(a, b) for a, b in zip(original, run(gated, inputs), strict=True)):
        row.result = "gated differs from the original"
        return row
    half_linear(gated)
    moved = run(gated, inputs)
    row.control = difference(original, moved)
    # Merging everything makes dense kernels of inverted residuals: the strictest test, for models that stay in memory.
    row.when = "always" if row.parameters < ALWAYS_BELOW else "cheaper"
    collapsed, row.seconds_collapse = timed(lambda: linearize.collapse(gated, when=row.when or "cheaper"))
    row.error = difference(moved, run(collapsed, inputs))
    after = cost(collapsed, _example(inputs))
    row.parameters_after, row.flops_after = after.parameters, after.flops
    row.reload = _reloaded(row, model, collapsed, inputs)
    row.result = _verdict(row, dtype)
    if row.result.startswith(_DIFFERS):
        row.result += f"; {_AS_MUCH}" if _rounding_moves(gated, moved, inputs) > 0.1 * row.error else ""
    return row


def _rounding_moves(gated: nn.Module, moved: list[Tensor], inputs: Inputs) -> float:
    """How far the gated model goes from itself when its weights change in their last digit: choices among equals."""
    generator, noisy = torch.Generator().manual_seed(2), copy.deepcopy(gated)
    with torch.no_grad():
        for parameter in noisy.parameters():
            if parameter.is_floating_point():
                digit = torch.finfo(parameter.dtype).eps
                parameter.mul_(1 + digit * torch.randn(parameter.shape, generator=generator).to(parameter))
    return difference(moved, run(noisy, inputs))


def inspect_only(row: Row, model: nn.Module, inputs: Inputs, result: str = META) -> Row:
    """What can be said of a model without its values: it is captured, and its sites are found."""
    row.parameters = sum(p.numel() for p in model.parameters())
    if _converted(row, model, inputs) is not None:
        row.result = result
    return row


def _example(inputs: Inputs) -> Any:
    return inputs[0] if not inputs[1] else inputs[1]


def _converted(row: Row, model: nn.Module, inputs: Inputs) -> nn.Module | None:
    """The model with gates, and the row's counts; None, and the row's result, if there are none to have."""
    start = time.perf_counter()
    try:
        gated = linearize.convert(model, _example(inputs))
    except linearize.LinearizeError as error:
        row.result = f"{type(error).__name__}: {error.found}"
        if isinstance(error, linearize.ConvertError) and error.found.startswith(_NOTHING):
            _count(row, [replace(s, ungated=s.ungated or _UNREACHED) for s in discover(model, inputs)])
            row.result = UNREACHED if row.activations else NOTHING
        return None
    row.seconds_convert = time.perf_counter() - start
    record = record_of(gated)
    _count(row, record.sites if record is not None else ())
    return gated


def _count(row: Row, sites: Sequence[Site]) -> None:
    counted = [site for site in sites if not (site.ungated or "").startswith(_ASIDE)]
    row.gates_aside = len(sites) - len(counted)
    row.activations = len(counted)
    row.gated = sum(site.ungated is None for site in counted)
    row.collapsible = sum(site.ungated is None and site.reason is None for site in counted)
    reasons = Counter(_general(site.ungated or site.reason or "") for site in counted)
    reasons.pop("", None)
    row.reasons = dict(reasons)


def _general(reason: str) -> str:
    """A reason without the module path that it names, so that reasons can be counted."""
    head, _, place = reason.rpartition(" (")
    words = (head if place.endswith(")") else reason).split()
    return " ".join(word for word in words if "." not in word.strip(".,:")) or reason


def _reloaded(row: Row, base: nn.Module, collapsed: nn.Module, inputs: Inputs) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        linearize.save(collapsed, path)
        try:
            loaded = linearize.load(path)
        except linearize.CheckpointError as error:
            row.note += f" load needs the base model ({error.found[:60]});"
            loaded = linearize.load(path, model=copy.deepcopy(base))
        return difference(*(run(in_memory(each).eval(), inputs) for each in (collapsed, loaded)))


def in_memory(model: nn.Module) -> nn.Module:
    """A copy whose tensors each lie in memory of their own.

    Those of a file, and parts of others, are not aligned, and some processors then add up in another order.
    """
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _verdict(row: Row, dtype: torch.dtype) -> str:
    if not row.error <= 1e-5:
        return f"{_DIFFERS} by {row.error:.1e}"
    if row.error > EXACT[dtype]:
        row.note += " single precision inside;"
    if row.reload != 0.0:
        return f"loaded differs from collapsed by {row.reload:.1e}"
    if not row.control > 10 * row.error:
        return f"no negative control: linear channels moved the output by {row.control:.1e} only"
    return EQUAL

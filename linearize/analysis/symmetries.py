"""Hidden symmetries: redundant channels, on the data seen or on a whole box of inputs.

Source: Grigsby, Lindsey and Rolnick, "Hidden Symmetries of ReLU Networks", ICML 2023. Shape letter: C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linearize import checks
from linearize.analysis.ablation import ablated
from linearize.analysis.bounds import bounds
from linearize.analysis.channel_ranges import ChannelRange, channel_ranges, unread
from linearize.analysis.intervals import box_of, input_shapes, per_channel
from linearize.analysis.pieces import homogeneous, line_on
from linearize.analysis.symmetry import Evidence, Required, Symmetry, SymmetryKind
from linearize.analysis.units import find_units
from linearize.analysis.weights import live_columns, parallel_rows
from linearize.convert import convert, eager_model
from linearize.errors import UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.graph.capture import Inputs, capture, fake_inputs
from linearize.running.models import batches_of, device_of, move

__all__ = ["hidden_symmetries"]

Ranges = dict[str, tuple[torch.Tensor, torch.Tensor]]


def hidden_symmetries(model: nn.Module, inputs: Any, *, box: Any = None) -> list[Symmetry]:
    """Find redundant channels: a smaller network could compute the same function.

    There are four kinds. A channel is always inactive (its activation is constant) or always active (its activation is
    a straight line), several channels are positive multiples of one another, or a channel's effect is lost later on.
    The evidence "data" means: on all these inputs, up to rounding in float64. The evidence "box" means: for every input
    in the box, by interval bounds through linear maps, convolutions, norms in eval mode, ReLU-like activations, pooling
    and sums. Anything else counts as unbounded. Everything is computed on a float64 copy in eval mode.

    Args:
        model: plain or converted. Channels that are already linear are left out.
        inputs: a tensor, a tuple, a dict of keyword arguments, or a list of such batches.
        box: a pair (low, high) for all inputs, or one for each input; numbers, or tensors of a sample's shape.

    Returns:
        A record for each site, kind and evidence (for parallel channels, for each group), in order of execution. Pass
        all of them to `reduce` together: then the function stays the same. `symmetry_table` prints them.

    Raises:
        CaptureError: the model cannot be captured.
        UsageError: the model does not run on the inputs, or the box does not fit them.
        DataError: NaN or infinity turns up.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].bias.copy_(torch.tensor([-50.0, 50.0, 0.0]))
        >>> for found in hidden_symmetries(net, torch.randn(9, 2), box=(-1, 1)):
        ...     print(found.kind, found.site, found.channels, found.evidence)
        inactive 1 (0,) box
        active 1 (1,) box
    """
    twin, batches = _twin(checks.module("model", model), inputs)
    shapes = fake_inputs(batches[0])
    found = gates(twin)
    observed = channel_ranges(twin, found, batches)
    on_data: Ranges = {name: (seen.low, seen.high) for name, seen in observed.items()}
    on_box = _boxed(twin, batches[0], box) if box is not None else {}
    records: list[Symmetry] = []
    for ranges, evidence in ((on_box, "box"), (on_data, "data")):
        records += _stable(found, ranges, records, evidence)  # type: ignore[arg-type]
    records += _parallel(twin, found, observed, records, use_weights=box is not None)
    for evidence in ("box", "data") if box is not None else ("data",):
        records += _lost(twin, found, records, evidence)
    records += _silent(twin, found, batches, records)
    order = {name: place for place, name in enumerate(found)}
    records.sort(key=lambda record: order[record.site])
    return [replace(record, inputs=shapes) for record in records]


def _twin(model: nn.Module, inputs: Any) -> tuple[nn.Module, list[Inputs]]:
    """A converted copy in float64 and eval mode, and the inputs in float64."""
    model = eager_model(model)
    checks.with_values("inputs", inputs)
    twin = copy.deepcopy(model).double().eval()
    batches = [move(batch, device_of(twin), torch.float64) for batch in batches_of(inputs)]
    if not gates(twin):
        args, kwargs = batches[0]
        twin = convert(twin, kwargs if kwargs and not args else args, inplace=True)
        if kwargs and args:
            raise UsageError("inputs", "found positional and keyword arguments", "Pass one kind of them.")
    return twin.eval(), batches


def _boxed(twin: nn.Module, inputs: Inputs, box: Any) -> Ranges:
    from torch.utils import _pytree as pytree

    one: Inputs = pytree.tree_map_only(torch.Tensor, lambda t: t[:1], inputs)
    captured = capture(twin, one)
    units = find_units(twin, captured)
    try:
        boxes = box_of(input_shapes(captured), box)
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "Pass (low, high): numbers or tensors of the shape of a sample."
        raise UsageError("box", f"does not fit inputs of shapes {input_shapes(captured)} ({error})", remedy) from error
    if any(bool((b.low > b.high).any()) for b in boxes):
        raise UsageError("box", "its low end is above its high end", "Pass (low, high).")
    known = bounds(twin, captured, units, boxes)
    ranges: Ranges = {}
    for unit in units:
        interval = known.get(unit.source)
        if interval is None or isinstance(interval, list) or not isinstance(unit.gate, ChannelGate):
            continue
        low, high = per_channel(interval, unit.gate.axis)
        if unit.name in ranges:  # a site that runs twice
            low, high = torch.minimum(low, ranges[unit.name][0]), torch.maximum(high, ranges[unit.name][1])
        ranges[unit.name] = (low, high)
    runs = {unit.name: 0 for unit in units}
    for unit in units:
        runs[unit.name] += known.get(unit.source) is None
    return {name: value for name, value in ranges.items() if not runs[name]}


def _taken(records: Iterable[Symmetry], site: str) -> set[int]:
    """Channels of a site that have a record; the first of a parallel group stays."""
    return {c for r in records if r.site == site for c in (r.channels[1:] if r.kind == "parallel" else r.channels)}


def _stable(
    found: dict[str, ChannelGate], ranges: Ranges, known: Sequence[Symmetry], evidence: Evidence
) -> list[Symmetry]:
    """Channels whose input stays in one straight piece of the activation."""
    made: list[Symmetry] = []
    for name, (low, high) in ranges.items():
        gate = found[name]
        kind = gate.site.activation if gate.site is not None else type(gate.activation).__name__.lower()
        lines = {}
        for c in sorted(set(nonlinear_channels(gate)) - _taken(known, name)):
            line = line_on(gate.activation, kind, float(low[c]), float(high[c]))
            if line is not None and not (gate.gated_unit and line.slope != 0):
                lines[c] = line
        kinds: tuple[SymmetryKind, SymmetryKind] = ("inactive", "active")
        for word in kinds:
            chosen = {c: line for c, line in lines.items() if (line.slope == 0) == (word == "inactive")}
            if chosen:
                slopes = tuple(line.slope for line in chosen.values())
                intercepts = tuple(line.intercept for line in chosen.values())
                made.append(Symmetry(word, name, tuple(chosen), evidence, slopes, intercepts))
    return made


def nonlinear_channels(gate: ChannelGate) -> list[int]:
    """Channels of a gate that are completely nonlinear."""
    mask = ~gate.linear & (gate.alpha == 0)
    return [int(c) for c in mask.nonzero().flatten()]


def _parallel(
    twin: nn.Module,
    found: dict[str, ChannelGate],
    observed: dict[str, ChannelRange],
    known: Sequence[Symmetry],
    *,
    use_weights: bool,
) -> list[Symmetry]:
    """Groups of channels whose inputs are positive multiples of one another."""
    made: list[Symmetry] = []
    for name, gate in found.items():
        site, taken = gate.site, _taken(known, name)
        if site is None or gate.gated_unit:
            continue
        channels = [c for c in nonlinear_channels(gate) if c not in taken]
        any_scale = homogeneous(gate.activation, site.activation)
        groups = parallel_rows(twin, site, channels, any_scale=any_scale) if use_weights else []
        used = {c for group in groups for c in group}
        evidence: Evidence = "box"
        for group in [
            *groups,
            None,
            *observed[name].parallel([c for c in channels if c not in used], any_scale=any_scale),
        ]:
            if group is None:
                evidence = "data"
                continue
            made.append(Symmetry("parallel", name, tuple(group), evidence, scales=tuple(group.values())))
    return made


def _lost(twin: nn.Module, found: dict[str, ChannelGate], known: Sequence[Symmetry], evidence: str) -> list[Symmetry]:
    """Channels that are read with weight 0 only, or by channels that are constant or lost themselves."""
    made: list[Symmetry] = []
    for name in reversed(found):
        gate = found[name]
        if gate.site is None:
            continue
        usable = [r for r in known if r.evidence == "box" or evidence == "data"]
        dead = {other: _constants(usable, other) for other in found}
        gone = {other: _unseen([*usable, *made], other) for other in found}
        columns = live_columns(twin, gate.site, found, dead, gone)
        if columns is None:
            continue
        taken = _taken([*known, *made], name)
        kept = {r.channels[0] for r in known if r.site == name and r.kind == "parallel"}
        lost = [c for c in nonlinear_channels(gate) if not columns[0][c] and c not in taken and c not in kept]
        if lost:
            zeros = (0.0,) * len(lost)
            word: Evidence = "box" if evidence == "box" else "data"
            made.append(Symmetry("unseen", name, tuple(lost), word, zeros, zeros, requires=columns[1]))
    return made


def _constants(records: Iterable[Symmetry], site: str) -> dict[int, float]:
    inactive = [r for r in records if r.site == site and r.kind == "inactive"]
    return {c: value for r in inactive for c, value in zip(r.channels, r.intercepts, strict=True)}


def _unseen(records: Iterable[Symmetry], site: str) -> dict[int, Required]:
    return {c: r.requires for r in records if r.site == site and r.kind == "unseen" for c in r.channels}


def _silent(
    twin: nn.Module, found: dict[str, ChannelGate], batches: list[Inputs], known: Sequence[Symmetry]
) -> list[Symmetry]:
    """Channels that change no output on the data, although something reads them: found by gradient, proven by trial."""
    candidates = {}
    for name, channels in unread(twin, found, batches).items():
        kept = {r.channels[0] for r in known if r.site == name and r.kind == "parallel"}
        free_now = set(nonlinear_channels(found[name])) - _taken(known, name) - kept
        candidates[name] = [c for c in channels if c in free_now]
    chosen = ablated(twin, found, batches, candidates, known)
    return [
        Symmetry("unseen", name, tuple(cs), "data", (0.0,) * len(cs), (0.0,) * len(cs))
        for name, cs in chosen.items()
        if cs
    ]

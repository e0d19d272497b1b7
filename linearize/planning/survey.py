"""Everything known about a model before anything is decided: statistics, options with costs and losses, totals."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.approximate.blocks import Block, blocks_of, observe_blocks
from linearize.approximate.find_wholes import meddled, wholes_of
from linearize.approximate.observe import observe
from linearize.approximate.wholes import Whole, observe_wholes
from linearize.calibrate import Calibration, calibrate
from linearize.collapse import collapse
from linearize.cost import Cost, cost
from linearize.errors import UsageError
from linearize.gate import gates
from linearize.groups import groups_of
from linearize.plan import make_plan
from linearize.planning.candidates import candidates
from linearize.planning.choose import choose
from linearize.planning.curves import Curve, curve_of
from linearize.planning.distance import some_of
from linearize.planning.modules import with_modules
from linearize.planning.notes import NOTHING, Notes
from linearize.planning.options import Group, Measure
from linearize.planning.timed import timed
from linearize.planning.units import sensitivities, unit_costs, unit_groups, with_lines
from linearize.running.models import device_of
from linearize.surgery.bake import bake
from linearize.surgery.layers import MaskedActivation

__all__ = ["Survey", "survey"]

_log = logging.getLogger(__name__)


@dataclass
class Survey:
    """What could be done to a model.

    Attributes:
        gated: the converted model with its original weights and fitted lines.
        measure: what the budget limits.
        groups: options with costs and losses.
        total: the whole original model's cost in that measure, for the example batch; 1 for latency.
        before: parameters and FLOPs of the original.
        curves: by site name; empty for budgets in units.
        blocks: by the name of their first site.
        wholes: modules that could become one linear map, by path.
        unit_costs: by site name, for budgets in units.
        notes: what a reader should know, such as too little data.
    """

    gated: nn.Module
    measure: Measure
    groups: list[Group]
    total: float
    before: Cost
    curves: dict[str, Curve] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)
    wholes: dict[str, Whole] = field(default_factory=dict)
    unit_costs: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def fixed(self) -> float:
        """The part of the total that no option changes."""
        return self.total - sum(group.stay.cost(self.measure) for group in self.groups)

    @property
    def least(self) -> float:
        """The smallest fraction of the total that the options can reach, as predicted."""
        return (self.fixed + choose(self.groups, self.measure, -math.inf).cost) / self.total

    @property
    def reasons(self) -> dict[str, str]:
        """Why sites stay for another reason than their loss, by name."""
        found: dict[str, str] = {}
        for group in self.groups:
            cheaper = any(o.cost(self.measure) < group.stay.cost(self.measure) for o in group.options[1:])
            why = group.reason or (None if cheaper else "no other option costs less")
            found |= dict.fromkeys(() if group.module or why is None else group.sites, str(why))
        return found


def survey(
    original: nn.Module,
    gated: nn.Module,
    data: Iterable[Any],
    batch: Any,
    *,
    measure: Measure,
    batch_sizes: Sequence[int] | None = None,
    round_to: int | None = None,
    uniform: bool | Sequence[str] = False,
    stock: bool = False,
    modules: bool = True,
    seed: int = 0,
    rounds: int = 9,
    cache: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
    notes: Notes = NOTHING,
) -> Survey:
    """Observe a model on data, and list what could be done to each site.

    Args:
        original: the model as it came.
        gated: the same, converted.
        data: re-iterable batches.
        batch: one of them, without labels: costs are for this batch.
        measure: what the budget will limit.
        batch_sizes: for measured latency; None takes that of the batch.
        round_to: widths are multiples of this; None decides by site.
        uniform: True keeps equal numbers of channels in all sites of the same shape; or glob patterns of site names,
            each a group of its own.
        stock: only options that leave ordinary layers, all of one width.
        modules: whether whole modules may become one linear map; not where equal widths are asked for.
        seed: of random projections.
        rounds: measurements of each latency.
        cache: file of latencies; None remembers none.
        progress: show bars.
        say: told what is going on.
        notes: of passes that an interrupted run has finished.
    """
    before = cost(original, batch)
    baked = bake(gated)
    if baked:
        say(f"  {len(baked)} computed weights become plain ones, such as that of {baked[0]}")
    say("calibrate")
    calibration = calibrate(gated, data, progress=progress)
    units = _units(gated, data, calibration, seed) if measure == "activations" else {}
    barred = _uncollapsible(gated)
    say("observe")
    sites = [name for name in gates(gated) if name not in barred]
    observations = observe(
        gated, data, seed=seed, progress=progress, sites=sites, known=notes.some("site", sites),
        finished=lambda found: notes.write("site", {name: seen.state() for name, seen in found.items()}),
    )  # fmt: skip
    observations = {name: found for name, found in observations.items() if found.rows.count}
    few = [note for name, found in observations.items() if (note := _too_few(name, found.rows, found.seen))]
    for note in few[:1]:
        more = f" (and {len(few) - 1} more sites)" if len(few) > 1 else ""
        warnings.warn(note + more, stacklevel=4)
    curves = {name: curve_of(gated, found, stock=stock) for name, found in observations.items()}
    say("options")
    blocks = {block.name: block for block in blocks_of(gated, groups_of(gated))}
    if stock:
        blocks, uniform = {}, uniform or True
    held = notes.some("block", blocks)
    for name, state in held.items():
        blocks[name].restore(state, device_of(gated))
    if blocks.keys() - held.keys():
        new = [block for name, block in blocks.items() if name not in held]
        observe_blocks(
            gated, data, new, seed=seed,
            finished=lambda some: notes.write("block", {block.name: block.state() for block in some}),
        )  # fmt: skip
    ties = _ties(gated, uniform)
    groups = candidates(gated, curves, blocks=blocks, round_to=round_to, uniform=ties, barred=barred, progress=progress)
    if units and not stock:
        groups = with_lines(groups, unit_groups(gated, units), barred={name for names in ties for name in names})
    wholes: dict[str, Whole] = {}
    if modules and not ties and measure != "activations":
        say("modules")
        wholes = _wholes(gated, data, batch, seed, notes)
        groups = with_modules(groups, list(wholes.values()), gated, some_of(data, 4), progress=progress)
    total = {"flops": float(before.flops), "params": float(before.parameters)}.get(measure, 1.0)
    if measure == "activations":
        total = sum(group.stay.activations for group in groups)
    if measure == "latency":
        say("measure")
        shapes = {name: found.shape for name, found in observations.items() if found.shape}
        groups = timed(original, gated, groups, shapes, blocks, wholes, batch, batch_sizes, rounds=rounds, cache=cache)
    few += _hooked(gated)
    return Survey(gated, measure, groups, total, before, curves, blocks, wholes, units, few)


def _hooked(gated: nn.Module) -> list[str]:
    """A note about what hooks take away, if there are any."""
    found = meddled(gated)
    if not found:
        return []
    some = "; ".join(f"{path or 'the model'} has {what}" for path, what in list(found.items())[:2])
    more = f" (and {len(found) - 2} more modules)" if len(found) > 2 else ""
    return [f"{some}{more}: what would be lost with a module or the modules around it stays as it is"]


def _wholes(gated: nn.Module, data: Iterable[Any], batch: Any, seed: int, notes: Notes) -> dict[str, Whole]:
    """The modules that could become one linear map, observed."""
    found = {whole.path: whole for whole in wholes_of(gated, batch, groups_of(gated))}
    held = notes.some("module", found)
    for path, state in held.items():
        found[path].restore(state, device_of(gated))
    new = [whole for path, whole in found.items() if path not in held]
    if new:
        observe_wholes(
            gated, data, new, seed=seed,
            finished=lambda some: notes.write("module", {whole.path: whole.state() for whole in some}),
        )  # fmt: skip
    return found


def _units(gated: nn.Module, data: Iterable[Any], calibration: Calibration, seed: int) -> dict[str, Tensor]:
    """By site, what each channel costs the output if it goes to its line."""
    found = sensitivities(gated, data, seed=seed)
    return {name: unit_costs(gate, calibration.sites[name], found[name]) for name, gate in gates(gated).items()}


def _uncollapsible(gated: nn.Module) -> dict[str, str]:
    """Sites whose width cannot change, by name, with the reason: found by trying, on a copy."""
    from linearize.duplicate import duplicate
    from linearize.errors import CollapseError

    trial = duplicate(gated, CollapseError)
    for gate in gates(trial).values():
        if gate.site is not None and gate.site.reason is None:
            gate.slope.zero_()
            gate.intercept.zero_()
            gate.linearize_(torch.arange(gate.channels) >= max(1, gate.channels // 2))
    named = {
        name: path for path, module in trial.named_modules() for name, gate in gates(trial).items() if gate is module
    }
    level = logging.getLogger("linearize.collapse").level
    logging.getLogger("linearize.collapse").setLevel(logging.ERROR)
    try:
        small = collapse(trial)
    except CollapseError as error:
        _log.debug("no trial: %s", error)
        return {}
    finally:
        logging.getLogger("linearize.collapse").setLevel(level)
    modules = dict(small.named_modules())
    stuck = [name for name, path in named.items() if isinstance(modules.get(path), MaskedActivation)]
    plan = make_plan(trial)
    return {name: plan[name].reason or "the code around it does not take another width" for name in stuck}


def _too_few(name: str, rows: Any, samples: int) -> str | None:
    """A covariance of F features needs more than F rows to have full rank."""
    features = len(rows.mean)
    if rows.count > features:
        return None
    needed = -(-(features + 1) * max(1, samples) // max(1, rows.count))
    return (
        f"{name}: found {rows.count} rows for {features} features: the covariance has no full rank and is regularised. "
        f"Pass at least {needed} samples (there were {samples}), better ten times as many."
    )


def _ties(gated: nn.Module, uniform: bool | Sequence[str]) -> list[list[str]]:
    """Groups of site names that must keep equal widths."""
    import fnmatch

    names = list(gates(gated))
    if uniform is True:
        shapes: dict[Any, list[str]] = {}
        for name, gate in gates(gated).items():
            site = gate.site
            ports = () if site is None else tuple(p.total for p in (site.producer, site.up, *site.consumers) if p)
            shapes.setdefault((site and site.activation, gate.channels, ports), []).append(name)
        return list(shapes.values())
    if uniform is False:
        return []
    patterns = [uniform] if isinstance(uniform, str) else list(uniform)
    ties = [fnmatch.filter(names, pattern) for pattern in patterns]
    for pattern, found in zip(patterns, ties, strict=True):
        if not found:
            raise UsageError("uniform", f"found {pattern!r}, which names no site", f"Sites are {', '.join(names)}.")
    return ties


def describe(groups: Sequence[Group], measure: Measure) -> Mapping[str, str]:
    """Per group, its best options as a table."""
    return {", ".join(group.sites): str(group.pareto(measure)) for group in groups}

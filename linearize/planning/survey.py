"""The survey: everything known about a model before a decision: statistics, options with costs and losses, totals."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from linearize.calibrate import fit_lines, line_collectors
from linearize.convert import check_gated
from linearize.cost import Cost, cost
from linearize.errors import UsageError
from linearize.export.runtimes import Runtime
from linearize.families import registry
from linearize.families.family import Context, Layers
from linearize.families.option import Group, Measure, Option
from linearize.families.registry import family_of
from linearize.families.ties import tied
from linearize.gating.gate import gates
from linearize.planning.knapsack import choose
from linearize.planning.resume import NOTHING, Notes
from linearize.planning.serving import with_memory, with_steps
from linearize.planning.timing.all import timed
from linearize.report.trial import Trial
from linearize.running.batches import read_batches
from linearize.running.models import evaluating
from linearize.running.passes import Collector, run_passes
from linearize.running.processes import from_first
from linearize.serving.memory import memory
from linearize.serving.point import Point
from linearize.surgery.bake import bake
from linearize.training.distance import some_of
from linearize.training.probes import projection

__all__ = ["Survey", "descriptions", "survey"]


@dataclass
class Survey:
    """Everything that could be done to a model.

    Attributes:
        context: the converted model with its original weights and fitted lines, and what options were asked for.
        measure: what the budget limits.
        groups: options with costs and losses.
        total: the whole original model's cost in that measure, for the example batch; 1 for latency.
        before: parameters and FLOPs of the original.
        places: by the name of a family, where it applies; only the family itself looks inside.
        trials: plans that were tried with the real loss.
        also: totals in the measures of further budgets.
    """

    context: Context
    measure: Measure
    groups: list[Group]
    total: float
    before: Cost
    places: dict[str, Any] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    also: dict[Measure, float] = field(default_factory=dict)

    @property
    def gated(self) -> nn.Module:
        """The converted model."""
        return self.context.gated

    @property
    def notes(self) -> list[str]:
        """Remarks for the report, such as too little data."""
        return [*self.context.warned, *self.context.told]

    @property
    def totals(self) -> dict[Measure, float]:
        """The original's cost in every measure that a budget limits."""
        return {self.measure: self.total, **self.also}

    @property
    def fixed(self) -> float:
        """The part of the total that no option changes."""
        return self.fixed_of(self.measure)

    def fixed_of(self, measure: Measure) -> float:
        """The same in another measure."""
        return self.totals[measure] - sum(group.stay.cost(measure) for group in self.groups)

    def limits(self, fractions: Mapping[Measure, float]) -> dict[Measure, float]:
        """What the options may cost together in each measure, for fractions of the totals."""
        return {measure: share * self.totals[measure] - self.fixed_of(measure) for measure, share in fractions.items()}

    def share(self, measure: Measure, options: Iterable[Option]) -> float:
        """The fraction of the original's cost that some options leave, as predicted."""
        return (self.fixed_of(measure) + sum(option.cost(measure) for option in options)) / self.totals[measure]

    @property
    def least(self) -> float:
        """The smallest fraction of the total that the options can reach, as predicted."""
        return self.least_of(self.measure)

    def least_of(self, measure: Measure) -> float:
        """The same in another measure."""
        return self.share(measure, choose(self.groups, measure, -math.inf).options)

    @property
    def reasons(self) -> dict[str, str]:
        """By name, the reason of each site that stays for another reason than its loss."""
        found: dict[str, str] = {}
        for group in self.groups:
            cheaper = any(o.cost(m) < group.stay.cost(m) for o in group.options[1:] for m in self.totals)
            why = group.reason or (None if cheaper else "no other option costs less")
            found |= dict.fromkeys(() if group.encloses or why is None else group.sites, str(why))
        return found


def survey(
    original: nn.Module,
    gated: nn.Module,
    data: Iterable[Any],
    batch: Any,
    *,
    measure: Measure,
    also: Sequence[Measure] = (),
    point: Point | None = None,
    batch_sizes: Sequence[int] | None = None,
    round_to: int | None = None,
    uniform: bool | Sequence[str] = False,
    stock: bool = False,
    modules: bool = True,
    families: Sequence[str] | None = None,
    seed: int = 0,
    rounds: int = 9,
    cache: Path | None = None,
    runtime: Runtime | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
    notes: Notes = NOTHING,
    lean: bool = False,
) -> Survey:
    """Observe a model on data, and list what could be done to each site.

    Args:
        original: the model as it came.
        gated: the same, converted.
        data: re-iterable batches.
        batch: one of them, without labels: costs are for this batch.
        measure: what the budget will limit.
        also: what further budgets will limit.
        point: where the model is served, for measures that ask for it.
        batch_sizes: for measured latency; None takes that of the batch.
        round_to: widths are multiples of this; None decides by site.
        uniform: True keeps equal numbers of channels in all sites of the same shape; or glob patterns of site names,
            each a group of its own.
        stock: only options that leave ordinary layers.
        modules: whether whole modules may become one linear map; not where equal widths are asked for.
        families: names of those that may offer options; None takes all.
        seed: of random projections.
        rounds: measurements of each latency.
        cache: file of latencies; None remembers none.
        runtime: where latencies are measured; None for PyTorch.
        progress: show bars.
        say: told what is going on.
        notes: of passes that an interrupted run has finished.
        lean: gather only what these options need, and run forwards only: an error costs its own square where it
            happens. Notes of that are of no use to other requests.
    """
    with evaluating(gated):  # before anything else may blame the model
        next(iter(read_batches(gated, data))).checked(gated, 0)
    before = cost(original, batch)
    baked = bake(gated)
    if baked:
        say(f"  {len(baked)} computed weights become plain ones, such as that of {baked[0]}")
    ties = _ties(gated, uniform=uniform)
    context = Context(
        gated,
        batch,
        some_of(data, 4),
        measure,
        seed=seed,
        round_to=round_to,
        tied=frozenset(name for names in ties for name in names),
        uniform=uniform is True,
        stock=stock,
        modules=modules,
        families=None if families is None else frozenset(families),
        lean=lean,
        progress=progress,
    )
    # The first family's groups hold the sites that all others build upon.
    asked = [family for family in registry.FAMILIES if family is registry.FAMILIES[0] or context.takes(family.name)]
    places = {family.name: family.find(context) for family in asked}
    say("observe")
    lines = line_collectors(gated) if gates(gated) else []
    wanted: list[Collector] = [*lines]
    for family in asked:
        wanted += family.collectors(context, places[family.name])
    run_passes(gated, data, wanted, probe=None if lean else projection, seed=seed, progress=progress, notes=notes)
    context.calibration = fit_lines(gated, lines).sites
    say("options")
    groups: list[Group] = []
    for family in asked:
        groups = family.options(context, places[family.name], groups)
    if all(len(group.options) < 2 for group in groups):
        check_gated(gated)  # says why there is nothing to do
    for names in ties:
        groups = tied(groups, set(names))
    _warn(context.warned)
    units = sum(group.stay.activations for group in groups)
    counted = {"flops": float(before.flops), "params": float(before.parameters), "activations": units}
    found = Survey(context, measure, groups, counted.get(measure, 1.0), before, places)
    found.also = {other: counted.get(other, 1.0) for other in also}
    if "memory" in found.totals and point is not None:
        whole = memory(original, point)
        found.groups = with_memory(gated, found.groups, whole)
        found.also = {name: whole.total if name == "memory" else total for name, total in found.also.items()}
        found.total = whole.total if measure == "memory" else found.total
    if {"latency", "decode", "prefill"} & set(found.totals):
        say("measure")
        found.groups = from_first(lambda: _timed(
            original, found, batch, batch_sizes, point, runtime=runtime, rounds=rounds, cache=cache
        ))  # fmt: skip
    return found


def _timed(
    original: nn.Module,
    found: Survey,
    batch: Any,
    batch_sizes: Sequence[int] | None,
    point: Point | None,
    *,
    runtime: Runtime | None,
    **options: Any,
) -> list[Group]:
    """The groups with all shares of times that budgets ask for."""
    groups, flops = found.groups, float(found.before.flops)

    def layers(group: Group, option: Option) -> Layers:
        return layers_of(found, group, option)

    for kind in ("decode", "prefill"):
        if kind in found.totals and point is not None:
            groups = with_steps(kind, original, found.gated, groups, layers, batch, point, flops=flops, **options)
    if "latency" in found.totals:
        groups = timed(
            original, found.gated, groups, layers, batch, batch_sizes, flops=flops, runtime=runtime, **options
        )
    return groups


def layers_of(found: Survey, group: Group, option: Option) -> Layers:
    """The layers that an option would leave, to be timed."""
    family = family_of(option.choices[0].form)
    return family.layers(found.gated, found.places[family.name], group, option)


def _warn(notes: Sequence[str]) -> None:
    """The first note as a warning, in the name of the code that called `compress`."""
    for note in notes[:1]:
        more = f" (and {len(notes) - 1} more sites)" if len(notes) > 1 else ""
        warnings.warn(note + more, stacklevel=5)


def _ties(gated: nn.Module, *, uniform: bool | Sequence[str]) -> list[list[str]]:
    """Groups of site names that must keep equal widths."""
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


def descriptions(groups: Sequence[Group], measure: Measure) -> Mapping[str, str]:
    """Per group, its best options as a table."""
    return {", ".join(group.sites): str(group.pareto(measure)) for group in groups}

"""Survey a model: observe it on data, list what could be done to each site, and measure what that would cost."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from linearize.calibrate import fit_lines, line_collectors
from linearize.convert import check_gated
from linearize.cost import cost
from linearize.errors import UsageError
from linearize.export.runtimes import Runtime
from linearize.families import registry
from linearize.families.family import Context, Family
from linearize.families.option import Group, Measure
from linearize.families.ties import tied
from linearize.gating.gate import gates
from linearize.planning.resume import NOTHING, ResumeStore
from linearize.planning.serving import with_memory, with_steps
from linearize.planning.survey import Survey
from linearize.planning.timing.all import timed
from linearize.running.batches import read_batches
from linearize.running.models import evaluating
from linearize.running.passes import Collector, run_passes
from linearize.running.processes import from_first
from linearize.serving.memory import memory
from linearize.serving.point import Point
from linearize.surgery.bake import bake
from linearize.training.distance import some_of
from linearize.training.probes import projection

__all__ = ["Wanted", "survey"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a survey is to find out.

    Attributes:
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
        lean: gather only what these options need, and run forwards only: an error costs its own square where it
            happens. ResumeStore of that are of no use to other requests.
    """

    measure: Measure
    also: Sequence[Measure] = ()
    point: Point | None = None
    batch_sizes: Sequence[int] | None = None
    round_to: int | None = None
    uniform: bool | Sequence[str] = False
    stock: bool = False
    modules: bool = True
    families: Sequence[str] | None = None
    seed: int = 0
    rounds: int = 9
    cache: Path | None = None
    runtime: Runtime | None = None
    lean: bool = False


def survey(
    original: nn.Module,
    gated: nn.Module,
    data: Iterable[Any],
    batch: Any,
    wanted: Wanted,
    *,
    progress: bool = True,
    say: Say = lambda _: None,
    store: ResumeStore = NOTHING,
) -> Survey:
    """Observe a model on data, and list what could be done to each site, with costs and predicted losses.

    Args:
        original: the model as it came.
        gated: the same, converted.
        data: re-iterable batches.
        batch: one of them, without labels: costs are for this batch.
        wanted: what is to be found out.
        progress: show bars.
        say: told what is going on.
        store: of passes that an interrupted run has finished.
    """
    with evaluating(gated):  # before anything else may blame the model
        next(iter(read_batches(gated, data))).checked(gated, 0)
    before = cost(original, batch)
    baked = bake(gated)
    if baked:
        say(f"  {len(baked)} computed weights become plain ones, such as that of {baked[0]}")
    ties = _ties(gated, uniform=wanted.uniform)
    context = _context(gated, data, batch, wanted, ties, progress=progress)
    # The first family's groups hold the sites that all others build upon.
    asked = [family for family in registry.FAMILIES if family is registry.FAMILIES[0] or context.takes(family.name)]
    places = {family.name: family.find(context) for family in asked}
    say("observe")
    _observe(context, asked, places, data, store)
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
    found = Survey(context, wanted.measure, groups, counted.get(wanted.measure, 1.0), before, places)
    found.also = {other: counted.get(other, 1.0) for other in wanted.also}
    _price(original, found, batch, wanted, say)
    return found


def _context(
    gated: nn.Module, data: Iterable[Any], batch: Any, wanted: Wanted, ties: Sequence[Sequence[str]], *, progress: bool
) -> Context:
    return Context(
        gated,
        batch,
        some_of(data, 4),
        wanted.measure,
        seed=wanted.seed,
        round_to=wanted.round_to,
        tied=frozenset(name for names in ties for name in names),
        uniform=wanted.uniform is True,
        stock=wanted.stock,
        modules=wanted.modules,
        families=None if wanted.families is None else frozenset(wanted.families),
        lean=wanted.lean,
        progress=progress,
    )


def _observe(
    context: Context, asked: Sequence[Family], places: dict[str, Any], data: Iterable[Any], store: ResumeStore
) -> None:
    """Gather what the families ask for, and the line of each channel."""
    lines = line_collectors(context.gated) if gates(context.gated) else []
    collectors: list[Collector] = [*lines]
    for family in asked:
        collectors += family.collectors(context, places[family.name])
    probe = None if context.lean else projection
    run_passes(context.gated, data, collectors, probe=probe, seed=context.seed, progress=context.progress, store=store)
    context.calibration = fit_lines(context.gated, lines).sites


def _price(original: nn.Module, found: Survey, batch: Any, wanted: Wanted, say: Say) -> None:
    """Add the costs that are not counted for the example: memory where a model is served, and times."""
    point = wanted.point
    if "memory" in found.totals and point is not None:
        whole = memory(original, point)
        found.groups = with_memory(found.gated, found.groups, whole)
        found.also = {name: whole.total if name == "memory" else total for name, total in found.also.items()}
        found.total = whole.total if wanted.measure == "memory" else found.total
    if {"latency", "decode", "prefill"} & set(found.totals):
        say("measure")
        found.groups = from_first(lambda: _timed(original, found, batch, wanted))


def _timed(original: nn.Module, found: Survey, batch: Any, wanted: Wanted) -> list[Group]:
    """The groups with all shares of times that budgets ask for."""
    groups, point = found.groups, wanted.point
    how: dict[str, Any] = {"flops": float(found.before.flops), "rounds": wanted.rounds, "cache": wanted.cache}
    for kind in ("decode", "prefill"):
        if kind in found.totals and point is not None:
            groups = with_steps(kind, original, found.gated, groups, found, batch, point, **how)
    if "latency" in found.totals:
        groups = timed(original, found.gated, groups, found, batch, wanted.batch_sizes, runtime=wanted.runtime, **how)
    return groups


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

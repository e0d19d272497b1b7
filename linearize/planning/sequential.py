"""Refit sites in order. Each is observed again behind the compressed sites, so that errors do not add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from linearize.families.option import SiteChoice
from linearize.families.registry import family_of
from linearize.gating.gate import gates
from linearize.planning.carry_out import edited
from linearize.planning.resume import NOTHING, ResumeStore, fingerprint
from linearize.planning.survey import Survey
from linearize.running.passes import Collector, run_passes
from linearize.training.probes import projection

__all__ = ["edited_in_order"]


def edited_in_order(
    found: Survey,
    choices: Mapping[str, SiteChoice],
    data: Iterable[Any],
    *,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
    store: ResumeStore = NOTHING,
) -> nn.Module:
    """A copy of the surveyed model with the choices carried out, one site after the other.

    Which channels stay is decided already; the weights are refitted on what reaches the site now. One pass over the
    data for each site.
    """
    model = edited(found, {name: choice for name, choice in choices.items() if not family_of(choice.form).in_order})
    for name in gates(model):
        choice = choices.get(name)
        family = family_of(choice.form) if choice is not None else None
        if choice is None or family is None or not family.in_order:
            continue
        say(f"  refit {name}")
        kind = f"refit {fingerprint(model)[:12]}"  # what reaches the site depends on all that was refitted before it

        def see(collectors: Sequence[Collector], kind: str = kind) -> None:
            for collector in collectors:
                collector.kind = kind
            run_passes(model, data, collectors, probe=projection, seed=seed, progress=progress, store=store)

        family.refit(model, found.places[family.name], choice, see)
    return model

"""Sites carried out in order, each observed anew behind those that are compressed: errors do not pile up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from linearize.families.channels.apply import carry_out
from linearize.families.channels.collect import observe
from linearize.families.channels.fit import curve_of
from linearize.families.option import SiteChoice
from linearize.gating.gate import gates
from linearize.planning.carry_out import edited
from linearize.planning.resume import NOTHING, Notes, fingerprint
from linearize.planning.survey import Survey

__all__ = ["edited_in_order"]


def edited_in_order(
    found: Survey,
    choices: Mapping[str, SiteChoice],
    data: Iterable[Any],
    *,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
    notes: Notes = NOTHING,
) -> nn.Module:
    """A copy of the surveyed model with the choices carried out, one site after the other.

    Which channels stay is decided already; the weights are refitted on what reaches the site now. One pass over the
    data for each site.
    """
    model = edited(found, {name: choice for name, choice in choices.items() if choice.block or choice.form == "line"})
    for name in gates(model):
        choice = choices.get(name)
        if choice is None or choice.form == "line" or name not in found.curves:
            continue
        if choice.keep >= found.curves[name].channels:
            continue
        say(f"  refit {name}")
        kind = f"refit {fingerprint(model)[:12]}"  # what reaches the site depends on all that was refitted before it
        known = notes.some(kind, [name])
        seen = observe(model, data, sites=[name], seed=seed, progress=progress, known=known)[name]
        if not known:
            notes.write(kind, {name: seen.state()})
        carry_out(
            model,
            curve_of(model, seen, stock=found.curves[name].stock).edit(model, choice, found.curves[name].keep(choice)),
        )
    return model

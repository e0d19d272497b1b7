"""Every layer of a report as a row: its width before and after, its form, and the loss that was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from linearize.plan import UNCHANGED, Plan, SitePlan, added_form
from linearize.report.svg import short, strip
from linearize.summary import SiteSummary, Summary

__all__ = ["LayerRow", "layer_rows"]


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        name: of the site or the module.
        form: what became of it.
        width: nonlinear channels before and after, in words.
        rank: of the linear skip; 0 for none.
        loss: predicted error of the output; 0 for none.
        reason: why it stays, or is not folded; "" if there is none.
        bar: its channels as a picture: nonlinear, linear, removed.
        loss_bar: its loss beside the largest of all layers; None without a loss.
    """

    name: str
    form: str
    width: str
    rank: int
    loss: float
    reason: str
    bar: Markup
    loss_bar: Markup | None


def layer_rows(plan: Plan | None, summary: Summary) -> list[LayerRow]:
    """A row for each entry of the plan, and for each site that is not in it; without a plan, for each site."""
    planned = () if plan is None else plan.sites
    most = max((site.loss for site in planned), default=0.0)
    rows = [_planned(site, most) for site in planned]
    inside = [site.site for site in planned]
    rest = [site for site in summary.sites if not any(_within(site.name, path) for path in inside)]
    return rows + [_unplanned(site) for site in rest]


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _planned(site: SitePlan, most: float) -> LayerRow:
    gone, linear = set(site.dropped), set(site.linear) - set(site.dropped)
    stay = max(0, site.channels - len(gone) - len(linear))
    if not site.channels:
        counts = [(1.0, "stays" if site.form == UNCHANGED else "folded")]
        told = "as it was" if site.form == UNCHANGED else "replaced as a whole"
        width = ""
    else:
        counts = [
            (n / site.channels, kind) for n, kind in ((stay, "stays"), (len(linear), "folded"), (len(gone), "gone"))
        ]
        added = added_form(site.form)
        units = "units" if added is not None and added.replaces else "nonlinear channels"  # such as heads
        told = f"{site.channels} {units}: {stay} stay, {len(linear)} are linear, {len(gone)} removed"
        width = f"{site.channels} → {stay}"
    told += f", skip of rank {site.rank}" if site.rank else ""
    told += f", predicted loss {short(site.loss)}" if site.loss else ""
    name = f"Loss of {site.site}: {short(site.loss)}"
    loss = strip(name, [(site.loss / most, "loss")], thin=True) if site.loss > 0 else None
    bar = strip(f"{site.site}, {site.form}: {told}", counts)
    return LayerRow(site.site, site.form, width, site.rank, site.loss, site.reason or "", bar, loss)


def _unplanned(site: SiteSummary) -> LayerRow:
    total = max(site.channels, 1)
    parts: Sequence[tuple[float, str]] = [(1 - site.linear / total, "stays"), (site.linear / total, "folded")]
    form = (site.form or UNCHANGED) if site.gated else "no gate"
    width = f"{site.channels} → {site.channels - site.linear}" if site.channels else ""
    told = f"{site.channels} channels, {site.linear} linear" if site.channels else "its channels are not known"
    return LayerRow(
        site.name, form, width, 0, 0.0, site.reason or "", strip(f"{site.name}, {form}: {told}", parts), None
    )

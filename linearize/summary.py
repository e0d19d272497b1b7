"""A table with one row per site: its activation, its linear channels, and the form it would take, or why it cannot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from linearize import checks
from linearize.convert import convert, eager_model
from linearize.gating.gate import ChannelGate, gates
from linearize.gating.sharded import check_unsharded
from linearize.plan import MASKED, UNCHANGED, Plan, SitePlan
from linearize.sites.record import Record, converted_parts, record_of
from linearize.sites.site import Site
from linearize.surgery.form_choice import make_plan, masks_of
from linearize.text_table import render, render_html

_HEADERS = ("site", "activation", "channels", "linear", "collapses to")


@dataclass(frozen=True)
class SiteSummary:
    """One activation site.

    Attributes:
        name, activation: the name of the site and its activation.
        channels, linear: the number of its channels, and how many of them are linear now.
        gated: whether it has a gate.
        form: what it would collapse to with its present linear channels. If no channel is linear yet, all of them are
            taken as linear.
        reason: why it has no gate, or why its linear channels cannot be collapsed; None if they can.
    """

    name: str
    activation: str
    channels: int
    linear: int
    gated: bool
    form: str | None
    reason: str | None


@dataclass(frozen=True)
class Summary:
    """All activation sites of a model, in order of execution. It prints as a table."""

    sites: tuple[SiteSummary, ...]

    @property
    def channels(self) -> int:
        """The number of channels that have a gate."""
        return sum(site.channels for site in self.sites if site.gated)

    @property
    def linear(self) -> int:
        """The number of channels that are linear."""
        return sum(site.linear for site in self.sites)

    @property
    def share(self) -> float:
        """Share of the gated channels that are linear, 0 to 1."""
        return self.linear / self.channels if self.channels else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        totals = {"channels": self.channels, "linear": self.linear, "share": self.share}
        return {"sites": [asdict(site) for site in self.sites], **totals}

    def __str__(self) -> str:
        return render(_HEADERS, self._rows())

    def _repr_html_(self) -> str:
        return render_html(_HEADERS, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [
            (
                site.name,
                site.activation,
                str(site.channels or ""),
                str(site.linear) if site.gated else "-",
                _outcome(site),
            )
            for site in self.sites
        ]
        total = (f"{len(self.sites)} sites", "", str(self.channels), str(self.linear), f"{self.share:.1%} linear")
        return [*rows, total]


def _outcome(site: SiteSummary) -> str:
    if not site.gated:
        return f"no gate: {site.reason}"
    return site.form or "" if site.reason is None else f"{site.form}: {site.reason}"


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """List every activation of a model, with the form it would collapse to, or the reason why it cannot.

    Args:
        model: converted or not. A model without gates is converted as a copy; your model does not change.
        example_inputs: as for `linearize.convert`. Needed if the model is neither converted nor from a known library.

    Raises:
        UsageError: the model is sharded over processes.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> summary(net, torch.randn(2, 4)).sites[0].form
        'vanished'
    """
    model = eager_model(checks.module("model", model))
    check_unsharded(model)
    found = gates(model)
    for gate in found.values():
        gate.check()
    known = record_of(model)
    if not found and known is not None and known.sites:  # every gate that there was has been taken away again
        return Summary(tuple(_row(site, None, Plan(())) for site in known.sites))
    if not found:
        model = convert(model, example_inputs)
        found = gates(model)
    parts = converted_parts(model)
    if parts and "" not in parts:
        inner = [(path, summary(model.get_submodule(path))) for path in parts]
        return Summary(tuple(replace(row, name=f"{path}.{row.name}") for path, part in inner for row in part.sites))
    masks = masks_of(found)
    anything = any(bool(mask.any()) for mask in masks.values())
    everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
    plan = make_plan(model, linear=masks if anything else everything)
    record = record_of(model) or Record(tuple(gate.site for gate in found.values() if gate.site is not None))
    return Summary(tuple(_row(site, found.get(site.name), plan) for site in record.sites))


def _row(site: Site, gate: ChannelGate | None, plan: Plan) -> SiteSummary:
    if gate is None:
        return SiteSummary(site.name, site.activation, site.channels, 0, gated=False, form=None, reason=site.ungated)
    planned: SitePlan = plan[site.name]
    linear = 0 if gate.alpha.device.type == "meta" else int(gate.linear.sum())
    reason = planned.reason if planned.form == MASKED else site.reason
    form = None if planned.form == UNCHANGED and site.reason is None else planned.form
    return SiteSummary(site.name, site.activation, gate.channels, linear, gated=True, form=form, reason=reason)

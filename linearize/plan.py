"""The plan: what happens to every channel of every site. Plain data with a JSON round trip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from linearize.algebra.forms import FORMS, Infeasible, Maps, Pieces, cost
from linearize.errors import UsageError
from linearize.gate import ChannelGate, gates
from linearize.maps import Reader
from linearize.sites import Site

When = Literal["cheaper", "always"]

UNCHANGED = "unchanged"  # no channel is linear: the activation comes back as it was
MASKED = "partial activation"  # linear channels stay where they are, behind an activation that leaves them out
_MERGED = ("vanished", "merged", "merged (input)")


@dataclass(frozen=True)
class SitePlan:
    """What happens to one site.

    Attributes:
        site: its name.
        form: "vanished", "merged", "merged (input)", "factored", "partial activation" or "unchanged".
        linear: the channels that are linear, by index.
        before, after: multiply-adds of its maps in one forward of the example inputs.
        reason: why its channels are not collapsed, if they are not.
    """

    site: str
    form: str
    linear: tuple[int, ...]
    before: float = 0.0
    after: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Plan:
    """What happens to every channel of a model.

    Example:
        >>> plan = Plan((SitePlan("act", "merged", (0, 2)),))
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    sites: tuple[SitePlan, ...]

    def to_json(self) -> str:
        """The plan as text; `from_json` reads it back."""
        return json.dumps({"sites": [asdict(site) for site in self.sites]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote, perhaps edited since."""
        data = json.loads(text)
        return cls(tuple(SitePlan(**{**site, "linear": tuple(site["linear"])}) for site in data["sites"]))

    def __getitem__(self, name: str) -> SitePlan:
        return next(site for site in self.sites if site.site == name)


def make_plan(
    model: nn.Module,
    *,
    when: When = "cheaper",
    linear: Mapping[str, Tensor] | None = None,
    barred: Mapping[str, str] | None = None,
) -> Plan:
    """Choose a form for every gate of a model, from shapes alone; nothing is computed and nothing changes.

    Sites are taken from the last to the first: a consumer that is also the next site's producer is settled then.

    Args:
        model: a converted model.
        when: "cheaper" changes a site only where that saves cost; "always" merges every linear channel that can be.
        linear: masks to use instead of the gates' own.
        barred: sites that must stay a partial activation, with the reason.
    """
    if when not in ("cheaper", "always"):
        raise UsageError("when", f"found {when!r}", 'Pass "cheaper" or "always".')
    reader = Reader(model, "meta")
    found = gates(model)
    masks = masks_of(found) if linear is None else {**masks_of(found), **linear}
    plans: dict[str, SitePlan] = {}
    for name in reversed(found):
        site = found[name].site
        chosen = tuple(int(i) for i in masks[name].nonzero().flatten())
        if not chosen:
            plans[name] = SitePlan(name, UNCHANGED, ())
        elif site is None or site.reason is not None or (barred and name in barred):
            reason = "it was put in by hand" if site is None else (site.reason or (barred or {})[name])
            plans[name] = SitePlan(name, MASKED, chosen, reason=reason)
        else:
            plans[name] = _choose(reader, site, found[name], masks, when, fixed_producer(found, site, masks))
    return Plan(tuple(plans[name] for name in found))


def masks_of(found: Mapping[str, ChannelGate]) -> dict[str, Tensor]:
    """The linear channels of every gate, on the CPU; none, where a gate has no values yet (meta device)."""
    return {
        name: torch.zeros(gate.channels, dtype=torch.bool) if gate.alpha.device.type == "meta" else gate.linear.cpu()
        for name, gate in found.items()
    }


def _choose(
    reader: Reader, site: Site, gate: ChannelGate, masks: Mapping[str, Tensor], when: When, fixed: bool
) -> SitePlan:
    chosen = tuple(int(i) for i in masks[site.name].nonzero().flatten())
    before = reader.weights(site)
    try:
        maps = reader.maps(site, gate, masks[site.name], fixed)
    except Infeasible as why:
        return SitePlan(site.name, MASKED, chosen, before, before, str(why))
    options, reasons = options_of(maps)
    prices = {form: price(form, pieces, site) for form, pieces in options.items()}
    if when == "always":
        allowed = [form for form in options if form in _MERGED] or list(options)
    else:
        allowed = [form for form in options if prices[form] <= before]
    if not allowed:
        dear = (
            "collapsing it would cost more" if options else "; ".join(f"{form}: {why}" for form, why in reasons.items())
        )
        return SitePlan(site.name, MASKED, chosen, before, before, dear)
    form = min(allowed, key=lambda name: prices[name])
    reader.pieces.update(options[form])
    return SitePlan(site.name, form, chosen, before, prices[form])


def options_of(maps: Maps) -> tuple[dict[str, Pieces], dict[str, str]]:
    """Every form that can express a site, and why the others cannot."""
    options: dict[str, Pieces] = {}
    reasons: dict[str, str] = {}
    for form, make in FORMS.items():
        try:
            options[form] = make(maps)
        except Infeasible as why:
            reasons[form] = str(why)
    return options, reasons


def price(form: str, pieces: Pieces, site: Site) -> float:
    """Multiply-adds of a form in one forward of the example inputs."""
    ports = [port for port in (site.producer, site.up, *site.consumers) if port is not None]
    positions = {port.module: port.positions for port in ports}
    if form == "vanished":
        positions = dict.fromkeys(positions, site.consumers[0].positions)
    return cost(pieces, positions)


def fixed_producer(found: Mapping[str, ChannelGate], site: Site, masks: Mapping[str, Tensor]) -> bool:
    """True if a site before this one will fold into this one's producer, which must then stay a plain layer."""
    if site.producer is None:
        return False
    earlier = (gate.site for name, gate in found.items() if gate.site is not None and bool(masks[name].any()))
    return any(
        port.module == site.producer.module for other in earlier if other.order < site.order for port in other.consumers
    )


def mask_of(plan: SitePlan, channels: int) -> Tensor:
    """The linear channels of a site as a mask, bool (C,)."""
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[list(plan.linear)] = True
    return mask

"""Choose a form for every gate of a model, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from linearize.algebra.forms import FORMS, multiply_adds
from linearize.algebra.parts import made
from linearize.algebra.piece import Infeasible, Maps, Pieces
from linearize.errors import UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.plan import MASKED, NARROWED, UNCHANGED, Plan, SitePlan, When
from linearize.sites.site import Site
from linearize.surgery.maps import Reader
from linearize.surgery.narrow import CoupledSites, constant_channels, coupled_sites, narrow

_MERGED = ("vanished", "merged", "merged (input)")


def make_plan(
    model: nn.Module,
    *,
    when: When = "cheaper",
    linear: Mapping[str, Tensor] | None = None,
    barred: Mapping[str, str] | None = None,
    widen: bool = True,
) -> Plan:
    """Choose a form for every gate of a model, from shapes alone; nothing is computed and nothing changes.

    Sites are taken from the last to the first: a consumer that is also the next site's producer is settled then.

    Args:
        model: a converted model.
        when: "cheaper" changes a site only where that saves cost; "always" merges every linear channel that can be.
        linear: masks to use instead of the gates' own.
        barred: sites that must stay a partial activation, with the reason.
        widen: whether a branch of a concatenation may become wider than it was.
    """
    if when not in ("cheaper", "always"):
        raise UsageError("when", f"found {when!r}", 'Pass "cheaper" or "always".')
    reader = Reader(model, "meta", widen=widen)
    found = gates(model)
    barred = barred or {}
    masks = masks_of(found) if linear is None else {**masks_of(found), **linear}
    plans: dict[str, SitePlan] = {}
    narrowing = _Narrowing(reader, found, masks, when, barred)
    for name in reversed(found):
        site = found[name].site
        chosen = tuple(int(i) for i in masks[name].nonzero().flatten())
        if narrowing.takes(name):
            plans[name] = narrowing.plan(name)
        elif not chosen:
            plans[name] = SitePlan(name, UNCHANGED, ())
        elif site is None or site.reason is not None or name in barred:
            reason = "it was put in by hand" if site is None else (site.reason or barred[name])
            plans[name] = SitePlan(name, MASKED, chosen, reason=reason)
        else:
            choice = _Choice(reader, found, masks)
            plans[name] = choice.always(site) if when == "always" else choice.cheaper(site, barred)
    return Plan(tuple(replace(plans[name], channels=gate.channels) for name, gate in found.items()))


class _Narrowing:
    """Which chains through depthwise maps become narrower, and what that means for each of their sites."""

    def __init__(
        self,
        reader: Reader,
        found: Mapping[str, ChannelGate],
        masks: Mapping[str, Tensor],
        when: When,
        barred: Mapping[str, str],
    ) -> None:
        self.reader, self.found, self.masks = reader, found, masks
        self.gone: dict[str, Tensor] = {}
        self.chains: dict[str, CoupledSites] = {}
        for chain in coupled_sites(reader.model, (gate.site for gate in found.values())):
            names = (chain.upper.name, chain.lower.name)
            gone = constant_channels(chain, found, masks)
            some = bool(gone.any()) and not bool(gone.all()) and not barred.keys() & set(names)
            if some and (when == "cheaper" or not any(bool((masks[name] & ~gone).any()) for name in names)):
                self.chains |= dict.fromkeys(names, chain)
                self.gone |= dict.fromkeys(names, gone)

    def takes(self, name: str) -> bool:
        """True if the site is narrowed with its chain. Called from the last site to the first."""
        chain = self.chains.get(name)
        if chain is None or name == chain.upper.name:
            return chain is not None
        before = self.reader.weights(chain.lower), self.reader.weights(chain.upper)
        try:
            pieces = narrow(self.reader, chain, self.found, self.gone[name])
        except Infeasible:
            pieces = None
        if pieces is None or self._vanishes(chain):
            for each in (chain.upper.name, chain.lower.name):
                del self.chains[each]
            return False
        self.reader.pieces.update(pieces)
        self.before = dict(zip((chain.lower.name, chain.upper.name), before, strict=True))
        return True

    def _vanishes(self, chain: CoupledSites) -> bool:
        """All of both activations is linear: then one dense map is for the ordinary choice to weigh."""
        return all(bool(self.masks[name].all()) for name in (chain.upper.name, chain.lower.name))

    def plan(self, name: str) -> SitePlan:
        """The plan of a site for which `takes` returned True."""
        chain = self.chains[name]
        site = chain.lower if name == chain.lower.name else chain.upper
        linear, gone = (tuple(int(i) for i in mask.nonzero().flatten()) for mask in (self.masks[name], self.gone[name]))
        return SitePlan(name, NARROWED, linear, self.before[name], self.reader.weights(site), dropped=gone)


def masks_of(found: Mapping[str, ChannelGate]) -> dict[str, Tensor]:
    """The linear channels of every gate, on the CPU; none, where a gate has no values yet (meta device)."""
    return {
        name: torch.zeros(gate.channels, dtype=torch.bool) if gate.alpha.device.type == "meta" else gate.linear.cpu()
        for name, gate in found.items()
    }


@dataclass(frozen=True)
class _Choice:
    """Chooses the form of one site after the other, and notes the pieces that it decides on."""

    reader: Reader
    found: Mapping[str, ChannelGate]
    masks: Mapping[str, Tensor]

    def always(self, site: Site) -> SitePlan:
        """Merge if that is possible; otherwise take any form that can express the site."""
        before = self.reader.weights(site)
        options, why = self._options(site)
        allowed = [form for form in options if form in _MERGED] or list(options)
        return self._settle(site, options, allowed, before, why)

    def cheaper(self, site: Site, barred: Mapping[str, str]) -> SitePlan:
        """The cheapest form that costs no more than leaving the site as it is."""
        before = self.reader.weights(site)
        options, why = self._options(site)
        allowed = [form for form, pieces in options.items() if price(form, pieces, site) <= before]
        if (
            "vanished" in options
            and "vanished" not in allowed
            and self._pays_upstream(site, options["vanished"], barred)
        ):
            allowed = ["vanished"]
        return self._settle(site, options, allowed, before, "collapsing it would cost more" if options else why)

    def _pays_upstream(self, site: Site, pieces: Pieces, barred: Mapping[str, str]) -> bool:
        """Does it pay if the site before vanishes too? Expand, depthwise, project is one convolution in the end."""
        above = self._upstream(site)
        if above is None or above.name in barred or not bool(self.masks[above.name].all()):
            return False
        apart = self.reader.weights(site) + self.reader.weights(above) - self._shared(site)
        held = dict(self.reader.pieces)
        self.reader.pieces.update(pieces)
        together = self._options(above)[0].get("vanished")
        worth = together is not None and price("vanished", together, above) <= apart
        self.reader.pieces.clear()
        self.reader.pieces.update(held)
        return worth

    def _upstream(self, site: Site) -> Site | None:
        """The site whose only consumer is this site's producer."""
        for gate in self.found.values():
            other = gate.site
            if other is None or other.reason is not None or site.producer is None:
                continue
            if [port.key for port in other.consumers] == [site.producer.module]:
                return other
        return None

    def _shared(self, site: Site) -> float:
        """Cost of the map between a site and the one before it: both count it."""
        port = site.producer
        return 0.0 if port is None else float(port.positions * self.reader.numel(port.module))

    def _options(self, site: Site) -> tuple[dict[str, Pieces], str]:
        fixed = fixed_producer(self.found, site, self.masks)
        try:
            maps = self.reader.maps(site, self.found[site.name], self.masks[site.name], fixed_producer=fixed)
        except Infeasible as why:
            return {}, str(why)
        options, reasons = options_of(maps, lambda made: self.reader.settled(site, made))
        return options, "; ".join(f"{form}: {why}" for form, why in reasons.items())

    def _settle(self, site: Site, options: dict[str, Pieces], allowed: list[str], before: float, why: str) -> SitePlan:
        chosen = tuple(int(i) for i in self.masks[site.name].nonzero().flatten())
        if not allowed:
            return SitePlan(site.name, MASKED, chosen, before, before, why)
        prices = {form: price(form, options[form], site) for form in allowed}
        form = min(allowed, key=lambda name: prices[name])
        self.reader.pieces.update(options[form])
        return SitePlan(site.name, form, chosen, before, prices[form])


def options_of(maps: Maps, settled: Callable[[Pieces], Pieces]) -> tuple[dict[str, Pieces], dict[str, str]]:
    """Every form that can express a site, as whole layers, and why the others cannot."""
    options: dict[str, Pieces] = {}
    reasons: dict[str, str] = {}
    for form in FORMS:
        try:
            options[form] = settled(made(form, maps))
        except Infeasible as why:
            reasons[form] = str(why)
    return options, reasons


def price(form: str, pieces: Pieces, site: Site) -> float:
    """Multiply-adds of a form in one forward of the example inputs."""
    ports = [port for port in (site.producer, site.up, *site.consumers) if port is not None]
    positions = {port.module: port.positions for port in ports}
    if form == "vanished":
        positions = dict.fromkeys(positions, site.consumers[0].positions)
    return multiply_adds(pieces, positions)


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

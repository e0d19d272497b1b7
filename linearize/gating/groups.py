"""Groups of sites that share a linear map, such as the two activations of an inverted residual."""

from __future__ import annotations

from torch import nn

from linearize.gating.gate import gates
from linearize.sites.site import Port, Site

__all__ = ["groups_of", "ports_of"]


def ports_of(site: Site) -> list[Port]:
    """The maps of a site."""
    return [port for port in (site.producer, site.up, *site.consumers) if port is not None]


def groups_of(model: nn.Module) -> list[list[str]]:
    """Names of sites that share a map, and so must be decided together; in order of execution.

    A consumer behind a concatenation is not shared: each of its branches has columns of its own. Nor is one of a site
    whose channels are taken apart: it keeps them.

    Examples:
        >>> import linearize, torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> groups_of(linearize.convert(net, torch.randn(1, 2)))
        [['1', '3']]
    """
    groups: list[tuple[list[str], set[str]]] = []
    for name, gate in gates(model).items():
        site = gate.site
        ports = [] if site is None or site.parts > 1 else ports_of(site)
        others = {port.module for port in ports if site is not None and port in site.consumers and not port.whole}
        maps = {port.module for port in ports} - others
        names = [name]
        for group in [g for g in groups if g[1] & maps]:
            groups.remove(group)
            names, maps = [*group[0], *names], maps | group[1]
        groups.append((names, maps))
    return [names for names, _ in groups]

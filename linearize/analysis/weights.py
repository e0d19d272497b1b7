"""What the weights around a site show: parallel rows of its producer, and the columns that its consumers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from linearize.algebra.affine import Affine
from linearize.algebra.piece import Infeasible
from linearize.errors import CollapseError
from linearize.gating.gate import ChannelGate
from linearize.sites.site import Port, Site
from linearize.surgery.maps import Reader

_EXACT = 1e-14  # rows that are multiples of one another but for the rounding of the scale


def producer_rows(model: nn.Module, site: Site) -> Tensor | None:
    """Weights and bias of each channel of a site, norms folded in: float64 (C, I * k + 1). None if there are none."""
    if site.producer is None:
        return None
    try:
        reader = Reader(model)
        affine = reader.produced(site)
    except (Infeasible, CollapseError):
        return None
    return torch.cat((affine.weight.flatten(1), affine.bias[:, None]), 1)


def parallel_rows(model: nn.Module, site: Site, channels: Sequence[int], *, any_scale: bool) -> list[dict[int, float]]:
    """Groups of channels whose rows are positive multiples of one another, with the scale of each."""
    rows = producer_rows(model, site)
    if rows is None:
        return []
    groups: list[dict[int, float]] = []
    for c in channels:
        norm = float(rows[c].norm())
        if norm == 0:
            continue
        for group in groups:
            first = next(iter(group))
            scale = norm / float(rows[first].norm())
            if not any_scale and abs(scale - 1) > _EXACT:
                continue
            if float((rows[c] - scale * rows[first]).norm()) <= _EXACT * norm:
                group[c] = scale
                break
        else:
            groups.append({c: 1.0})
    return [group for group in groups if len(group) > 1]


def live_columns(
    model: nn.Module,
    site: Site,
    found: Mapping[str, ChannelGate],
    dead: Mapping[str, Mapping[int, float]],
    gone: Mapping[str, Mapping[int, tuple[tuple[str, int, float], ...]]],
) -> tuple[list[bool], tuple[tuple[str, int, float], ...]] | None:
    """The channels of a site that any live operation reads, and the dead readers on which this depends.

    Args:
        model: a converted model.
        site: one of its sites.
        found: its gates.
        dead: of each site, the channels that are constant, with the constant.
        gone: of each site, the channels that nothing reads, with the dead readers that this depends on.

    Returns:
        A bool for each channel, and (site, channel, constant) of the dead readers; None if it cannot be known.
    """
    if site.reason is not None or not site.consumers:
        return None
    alive = torch.zeros(site.channels, dtype=torch.bool)
    needed: set[tuple[str, int, float]] = set()
    for port in site.consumers:
        affine = _read(model, port, site)
        if affine is None or affine.weight.shape[1] != site.channels:
            return None
        used = affine.weight.flatten(2).abs().amax(2) if affine.dims else affine.weight.abs()
        used = used != 0  # (O, C)
        behind = _behind(port, found)
        for row in range(used.shape[0]):
            name = behind.name if behind is not None else ""
            if behind is not None and row in gone[name]:
                if bool(used[row].any()):
                    needed.update(gone[name][row] or ())
                continue
            if behind is not None and row in dead[name]:
                if bool(used[row].any()):
                    needed.add((name, row, dead[name][row]))
                continue
            alive |= used[row].cpu()
    return [bool(a) for a in alive], tuple(sorted(needed))


def _read(model: nn.Module, port: Port, site: Site) -> Affine | None:
    try:
        return Reader(model).consumed(port, site)
    except (Infeasible, CollapseError):
        return None


def _behind(port: Port, found: Mapping[str, ChannelGate]) -> Site | None:
    """The site whose only producer is a map, with a channel for each of its outputs."""
    for gate in found.values():
        site = gate.site
        if site is None or site.producer is None or site.gated_unit or site.producer.module != port.module:
            continue
        if site.producer.start == 0 and site.producer.stop == site.producer.total and site.reason is None:
            return site
    return None

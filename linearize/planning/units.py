"""Budgets in nonlinear units: which channels may go to their own line, whether that collapses or not.

A channel whose line leaves the residual e_c, mean square, costs the model's output `e_c G_cc`, with G_cc the
Gauss-Newton sensitivity to an error in that channel. Channels of a site all free equally many units, so that within a
site they go in the order of that product.

Source of the measure: Cho et al., "Selective Network Linearization for Efficient Private Inference", ICML 2022.

Shape letters: C channels, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.moments import SiteCalibration
from linearize.approximate.probes import projection
from linearize.approximate.rows import rows_of
from linearize.calibrate import padding_mask
from linearize.gate import ChannelGate, gates
from linearize.planning.options import Group, Option, SiteChoice, frontier
from linearize.running.batches import read_batches
from linearize.running.models import watching

__all__ = ["sensitivities", "unit_costs", "unit_groups", "with_lines"]

_LEVELS = 64  # options of lines per group, at most


def sensitivities(model: nn.Module, batches: Iterable[Any], *, seed: int = 0) -> dict[str, Tensor]:
    """For every gate, what an error in each channel costs, summed over rows, per sample: (C,) float64, on the CPU."""
    named = gates(model)
    sums = {name: torch.zeros(gate.channels, dtype=torch.float64) for name, gate in named.items()}
    generator, samples = torch.Generator().manual_seed(seed), 0
    seen: dict[str, list[Tensor]] = {}
    with watching(model, lambda source: _hooks(model, seen, source)) as source:
        for batch in read_batches(model, batches):
            seen.clear()
            scalar, positions = projection(batch.run(model), batch, generator)
            if scalar.requires_grad:
                torch.autograd.grad(scalar, source, allow_unused=True)
            samples += positions
            for name, gradients in seen.items():
                mask = padding_mask(model, name, batch.masks)
                for gradient in gradients:
                    g = rows_of(gradient, -named[name].axis - 1, mask)
                    sums[name] += g.float().square().sum(0).double().cpu()
    if not any(bool((total > 0).any()) for total in sums.values()):  # no gradient came through: all count alike
        return {name: torch.ones_like(total) for name, total in sums.items()}
    return {name: total / max(1, samples) for name, total in sums.items()}


def _hooks(model: nn.Module, seen: dict[str, list[Tensor]], source: Tensor) -> Iterator[Any]:
    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def see(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output = output + source.to(output.dtype)
            if output.requires_grad:
                output.register_hook(lambda gradient: seen.setdefault(name, []).append(gradient.detach()))
            return output

        return see

    return (gate.register_forward_hook(hook(name)) for name, gate in gates(model).items())


def unit_costs(gate: ChannelGate, calibration: SiteCalibration, sensitivity: Tensor) -> Tensor:
    """What each channel costs the output if it goes to its line: (C,) float64.

    A gate that nothing tells anything about costs infinitely much.
    """
    if not calibration.count:
        return torch.full((gate.channels,), torch.inf, dtype=torch.float64)
    return calibration.residual * sensitivity


def unit_groups(model: nn.Module, costs: Mapping[str, Tensor]) -> list[Group]:
    """A group per gate, with options for how many of its channels stay nonlinear."""
    groups = []
    for name, gate in gates(model).items():
        positions = float(gate.site.positions) if gate.site is not None else 1.0
        channels, ordered = gate.channels, costs[name].sort().values
        loss = torch.cat((torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)))
        steps = sorted({round(channels * i / _LEVELS) for i in range(_LEVELS + 1)}) if channels > _LEVELS else None
        options = [
            Option(
                (SiteChoice(name, channels - gone, form="line" if gone else "unchanged"),),
                float(loss[gone]),
                0.0,
                0.0,
                positions * (channels - gone),
            )
            for gone in (steps or range(channels + 1))
            if bool(torch.isfinite(loss[gone]))
        ]
        groups.append(Group((name,), tuple(options), None if len(options) > 1 else "no batch reached it"))
    return groups


def with_lines(groups: Sequence[Group], lines: Sequence[Group], *, barred: Collection[str] = ()) -> list[Group]:
    """The groups with the options of `unit_groups` besides their own: refitted weights here, lines in place there.

    Args:
        groups: of `candidates`; the sites of one may share maps, and get refits together.
        lines: one group per gate.
        barred: sites that must keep their widths, and get no lines.
    """
    of = {group.sites[0]: group for group in lines}
    found = []
    for group in groups:
        if barred and set(group.sites) & set(barred):
            found.append(group)
            continue
        options = _joined([of.pop(site) for site in group.sites])
        every = (group.stay, *group.options[1:], *options)
        reason = None if len(every) > 1 else group.reason
        found.append(replace(group, options=every, reason=reason))
    return [*found, *(group for group in of.values() if group.sites[0] not in barred)]


def _joined(groups: Sequence[Group]) -> list[Option]:
    """Options of several sites that do not depend on each other, without the one that changes nothing."""
    found = [Option((), 0.0, 0.0, 0.0, 0.0)]
    for group in groups:
        every = tuple(
            Option((*a.choices, *b.choices), a.loss + b.loss, 0.0, 0.0, a.activations + b.activations)
            for a in found for b in group.options
        )  # fmt: skip
        best = frontier(every, "activations")
        found = (
            [best[round(i * (len(best) - 1) / _LEVELS)] for i in range(_LEVELS + 1)] if len(best) > _LEVELS else best
        )
    return [option for option in found if any(choice.form == "line" for choice in option.choices)]

"""Channels that gates may let go in training, and how the others make up for them.

A channel goes to zero, and the consumer's weights for those that stay take over what they can predict of it, by least
squares on the survey's covariance; a channel that returns takes it back. So the loss of a decision is that of the
closed form, as for a plan. Where a site shall end in one merged map, channels go to their line instead.

Shape letters: C channels, g features per channel, K channels that stay, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.algebra.piece import Infeasible
from linearize.algebra.regression import residual_weight
from linearize.families.channels.apply import Edit
from linearize.families.channels.editable import bias_of, columns_of, consumers_of, write_bias, write_columns
from linearize.families.channels.fit import Curve, step_of
from linearize.families.channels.options import slots_of
from linearize.families.family import Context, Movable
from linearize.families.option import Group, SiteChoice
from linearize.families.price import Pricer
from linearize.gating.gate import gates
from linearize.plan import NARROWED, added_form
from linearize.training.slots import Slot

__all__ = ["movable"]


@dataclass(frozen=True)
class _Going:
    """The channels of a slot, and what is left of their site for a number of them that are gone.

    Attributes:
        names: of the sites that have these channels, the last the one with the gate.
        curve: of that site.
        rank, form: of the skip beside them that stays as it is, and of the site; rank 0 for none.
        line: channels go to their line, not to zero.
        counts: numbers that may be gone.
        held: bool (C,), the channels that carry the skip.
    """

    names: tuple[str, ...]
    curve: Curve
    rank: int
    form: str
    line: bool
    counts: tuple[int, ...]
    held: Tensor

    def choices(self, gone: int) -> list[SiteChoice]:
        """The choices for its sites."""
        keep = self.curve.channels - self.rank - gone
        if self.line and gone:
            return [SiteChoice(self.names[-1], keep, self.curve.largest_rank, "merged" if keep else "vanished")]
        return [SiteChoice(name, keep, self.rank, self.form) for name in self.names]

    def losses(self) -> Tensor:
        """What the going of each channel costs, as predicted: (C,), never less than that of one that goes before."""
        removal = self.curve.skipped if self.line else self.curve.dropped
        found = torch.zeros(self.curve.channels, dtype=torch.float64)
        found[removal.order.cpu()] = removal.loss.diff().cummax(0).values.cpu()
        return found


def movable(
    model: nn.Module,
    context: Context,
    curves: Mapping[str, Curve],
    edit: Callable[[SiteChoice], Edit],
    group: Group,
    choices: Mapping[str, SiteChoice],
) -> Movable | None:
    """What may move in a group; the gates and weights of `model` are prepared for it, which keeps its function.

    Args:
        model: gated, with the choices carried out; or as it was, and a choice with a full skip says that the channels
            of its site go to their line.
        context: of the survey.
        curves: by site name.
        edit: the closed form of a choice.
        group: of the survey.
        choices: by site, of this group.
    """
    if not _may_move(model, context, curves, group, choices):
        return None
    named, own = gates(model), gates(context.gated)
    going = [_going(model, context, curves[s[-1]], edit, s, choices.get(s[-1])) for s in slots_of(model, group.sites)]
    if any(len(each.counts) < 2 for each in going):
        return None
    pricer = Pricer(context.gated, [own[name] for name in group.sites])
    stay = group.stay.flops, group.stay.params, group.stay.activations

    def chosen(gone: Sequence[int]) -> tuple[SiteChoice, ...]:
        every = [choice for each, count in zip(going, gone, strict=True) for choice in each.choices(count)]
        return tuple(sorted(every, key=lambda choice: group.sites.index(choice.site)))

    def costs(gone: Sequence[int]) -> tuple[float, float, float]:
        if not any(gone) and not any(each.rank for each in going):
            return stay
        found = pricer.costs(chosen(gone))
        return min(stay, found) if going[0].line else found  # a merged map that costs more is not made

    try:
        costs([each.counts[-1] for each in going])
        costs([each.counts[-1] * (each is going[0]) for each in going])
    except Infeasible:
        return None
    gone = {each.names[-1]: named[each.names[-1]].linear.cpu() & ~each.held for each in going}
    for each in going:
        _prepare(model, context.gated, each, gone[each.names[-1]])
    return Movable(tuple(_slot(model, each) for each in going), chosen, costs, gone)


def _may_move(
    model: nn.Module,
    context: Context,
    curves: Mapping[str, Curve],
    group: Group,
    choices: Mapping[str, SiteChoice],
) -> bool:
    """Whether all of a group's sites still have gates that are free to decide."""
    if group.encloses or set(group.sites) & context.tied or not set(group.sites) <= gates(model).keys():
        return False
    if any(added_form(choice.form) is not None for choice in choices.values()):
        return False
    if context.measure == "activations" and not choices:  # then lines do better
        return False
    return all(slot[-1] in curves for slot in slots_of(context.gated, group.sites))


def _going(
    model: nn.Module,
    context: Context,
    curve: Curve,
    edit: Callable[[SiteChoice], Edit],
    names: tuple[str, ...],
    choice: SiteChoice | None,
) -> _Going:
    channels, held = curve.channels, torch.zeros(curve.channels, dtype=torch.bool)
    step = step_of(channels, context.round_to)
    rank, form = (0, "factored") if choice is None else (choice.rank, choice.form)
    linear = int(gates(model)[names[-1]].linear.sum())
    if rank and not linear:  # not carried out
        rest = [width for width in range(0, channels, step) if channels - width >= curve.largest_rank]
        return _Going(names, curve, 0, form, line=True, counts=_counts(channels, rest), held=held)
    if rank and choice is not None:
        held[edit(choice).carriers.cpu()] = True
    widths = {*range(step, channels - rank, step), channels - linear} if linear < channels else {channels - rank}
    form = NARROWED if len(names) > 1 else form
    return _Going(names, curve, rank, form, line=False, counts=_counts(channels - rank, widths), held=held)


def _counts(channels: int, widths: Sequence[int] | set[int]) -> tuple[int, ...]:
    return tuple(sorted({0, *(channels - width for width in widths)}))


@torch.no_grad()
def _prepare(model: nn.Module, gated: nn.Module, going: _Going, gone: Tensor) -> None:
    """Free the gate. Who is gone keeps the columns that it had, unread, so that it has something to return to."""
    gate = gates(model)[going.names[-1]]
    if going.line:
        return
    free = ~going.held.to(gate.slope.device)
    gate.slope.masked_fill_(free, 0)
    gate.intercept.masked_fill_(free, 0)
    gate.frozen.logical_and_(~free)
    site, features = going.curve.observation.site, _features(gone, going.curve.observation.group)
    for consumer, before in zip(consumers_of(model, site), consumers_of(gated, site), strict=True):
        columns = columns_of(model, consumer)
        columns[:, features] = columns_of(gated, before)[:, features]
        write_columns(model, consumer, columns)
        module: Any = consumer.module
        if module.bias is None:  # what the others predict of a channel has a constant, too
            zeros = module.weight.new_zeros(consumer.outputs)
            module.bias = nn.Parameter(zeros, requires_grad=False)


def _slot(model: nn.Module, going: _Going) -> Slot:
    site = going.curve.observation.site
    if going.line:
        return Slot(site.name, going.counts, going.losses(), going.held)
    touches = [f"{c.port.module}.{part}" for c in consumers_of(model, site) for part in ("weight", "bias")]

    def hand_over(some: nn.Module, before: Tensor, after: Tensor) -> None:
        _hand_over(some, going, before, after)

    return Slot(site.name, going.counts, going.losses(), going.held, hand_over=hand_over, touches=tuple(touches))


@torch.no_grad()
def _hand_over(model: nn.Module, going: _Going, before: Tensor, after: Tensor) -> None:
    """Those that return take back what the others carry of them; then the others take over from those that go."""
    curve, seen = going.curve, going.curve.observation
    covariance, mean = curve.covariance[seen.inputs :, seen.inputs :], curve.mean[seen.inputs :]
    consumers = consumers_of(model, seen.site)
    weight = torch.cat([columns_of(model, consumer) for consumer in consumers]).to(covariance)
    bias = torch.cat([bias_of(model, consumer.port, consumer.outputs) for consumer in consumers]).to(covariance)
    for sign, moved, onto in (
        (-1.0, before & ~after, ~before & ~after & ~going.held),
        (1.0, after & ~before, ~after & ~going.held),
    ):
        if not bool(moved.any()):
            continue
        of, given = (_features(mask, seen.group).to(weight.device) for mask in (moved, onto))
        constant = weight[:, of] @ mean[of]
        if len(given):
            added = residual_weight(covariance, weight[:, of], given, of, curve.ridge)
            weight[:, given] += sign * added
            constant = constant - added @ mean[given]
        bias = bias + sign * constant
    sizes = [consumer.outputs for consumer in consumers]
    for consumer, columns, values in zip(consumers, weight.split(sizes), bias.split(sizes), strict=True):
        write_columns(model, consumer, columns)
        write_bias(model, consumer.port, values)


def _features(mask: Tensor, group: int) -> Tensor:
    """Indices of the features of some channels."""
    return mask.cpu().repeat_interleave(group).nonzero().flatten()

"""Carry out a plan on a copy of a model: every site takes its form, and its maps become layers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from linearize.algebra.parts import made
from linearize.algebra.piece import Pieces
from linearize.errors import CollapseError
from linearize.gating.gate import ChannelGate, gates
from linearize.plan import MASKED, NARROWED, UNCHANGED, Plan, SitePlan
from linearize.running.copies import duplicate
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.sites.site import Site
from linearize.surgery.folds import what_is_left
from linearize.surgery.form_choice import fixed_producer, mask_of, masks_of
from linearize.surgery.fusing import keep_readable
from linearize.surgery.leftover import keep_activation, shrink_activation
from linearize.surgery.make import make_layer
from linearize.surgery.maps import Reader
from linearize.surgery.narrow import CoupledSites, constant_channels, coupled_sites, narrow
from linearize.surgery.specs import Spec, build, replace_module, spec_of

KEEPS_MAPS = (MASKED, UNCHANGED)  # forms that leave the maps of a site as they are


def carry_out(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with the plan carried out. It is not yet checked that the result runs.

    Raises:
        Infeasible: the weights show what the shapes did not.
        CollapseError: the plan is for other weights.
    """
    result = duplicate(model, CollapseError)
    found = gates(result)
    masks = masks_of(found)
    reader = Reader(result)
    steps, unfolded = list[Step](), list[Site]()
    at: dict[str, int] = {}
    last_use = _last_use(found)
    chains = {chain.lower.name: chain for chain in coupled_sites(result, (gate.site for gate in found.values()))}
    for planned in reversed(plan.sites):
        gate = found[planned.site]
        site, carries = gate.site, True
        if planned.form == NARROWED and planned.site in chains:
            chain = chains[planned.site]
            reader.pieces.update(narrow(reader, chain, found, _dropped(planned, chain, found, masks)))
            at.update({port.module: port.dims for port in chain.ports})
            unfolded += [chain.upper, chain.lower]
            steps += [step for part in (chain.upper, chain.lower) for step in unfold(result, part)]
        elif planned.form not in (*KEEPS_MAPS, NARROWED) and site is not None:
            maps = reader.maps(
                site, gate, mask_of(planned, gate.channels), fixed_producer=fixed_producer(found, site, masks)
            )
            reader.pieces.update(reader.settled(site, made(planned.form, maps)))
            carries = maps.linear.numel() > 0  # else all others were dropped: an ordinary activation remains
            at.update(
                {port.module: port.dims for port in (site.producer, site.up, *site.consumers) if port is not None}
            )
            unfolded.append(site)
            steps += unfold(result, site)
        linear = mask_of(planned, gate.channels)
        if planned.form in KEEPS_MAPS:
            steps += keep_activation(result, gate, linear, torch.zeros_like(linear))
        elif planned.form == NARROWED:
            gone = torch.zeros_like(linear)
            gone[list(planned.dropped)] = True
            steps += keep_activation(result, gate, linear, gone)
        else:
            width = _width(reader.pieces, site)
            steps += shrink_activation(result, gate, linear, carries=carries, width=width)
        steps += _settle_maps(result, reader.pieces, at, {p for p, first in last_use.items() if first == planned.site})
    record = record_of(model) or Record()
    steps = [*sorted(steps, key=_depth), *keep_readable(result, unfolded)]
    set_record(result, Record((), [*record.steps, *steps], record.inputs))
    return result


def _dropped(planned: SitePlan, chain: CoupledSites, found: dict[str, ChannelGate], masks: dict[str, Tensor]) -> Tensor:
    """The channels that leave a chain, bool (C,).

    Raises:
        CollapseError: the plan drops a channel of which more than a constant is left.
    """
    gone = torch.zeros(chain.lower.channels, dtype=torch.bool)
    gone[list(planned.dropped)] = True
    odd = (gone & ~constant_channels(chain, found, masks)).nonzero()
    if odd.numel():
        found_text = f"channel {int(odd[0])} is dropped in the plan, but more than a constant of it is left"
        raise CollapseError(planned.site, found_text, "Make the plan from this model.")
    return gone


def _depth(step: Step) -> int:
    """A module whose own map was folded away gives way before its children are touched."""
    return 0 if step["module"]["type"] == "Children" else 1


def _width(pieces: Pieces, site: Site | None) -> int:
    """How many features the producer of a site puts out."""
    piece = pieces[site.producer.module] if site is not None and site.producer is not None else None
    return 0 if piece is None or piece.affine is None else piece.affine.weight.shape[0]


def _last_use(found: dict[str, ChannelGate]) -> dict[str, str]:
    """For every linear map, the first site (the last to be handled) that it belongs to: then its weights are final."""
    last: dict[str, str] = {}
    for name, gate in reversed(found.items()):
        if gate.site is not None:
            ports = (gate.site.producer, gate.site.up, *gate.site.consumers)
            last.update({port.module: name for port in ports if port is not None})
    return last


def unfold(model: nn.Module, site: Site) -> list[Step]:
    """Remove the constant maps that were folded into their neighbours. Their children stay.

    A map behind a concatenation belongs to several sites: it may be gone already.
    """
    steps: list[Step] = []
    for fold in (*site.folds, *site.up_folds, *site.consumer_folds):
        spec: Spec = what_is_left(fold)
        step: Step = {"path": fold.module, "module": spec}
        if step not in steps:  # a module of several maps goes once
            replace_module(model, fold.module, build(spec, model.get_submodule(fold.module)))
            steps.append(step)
    return steps


def _settle_maps(model: nn.Module, pieces: Pieces, at: dict[str, int], final: set[str]) -> list[Step]:
    """Turn the pieces that no other site will touch into layers, and let go of their float64 copies."""
    steps: list[Step] = []
    for path in [path for path in pieces if path in final]:
        layer = make_layer(path, pieces[path], at[path], model.get_submodule(path))
        spec = spec_of(layer)
        replace_module(model, path, layer)
        steps.append({"path": path, "module": spec})
        piece = pieces[path]
        pieces[path] = replace(piece, affine=None, border=None)
    return steps

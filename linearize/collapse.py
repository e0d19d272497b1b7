"""Carry out a plan: fold linear channels into the linear maps around them, in float64, and leave no gate behind."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from linearize import checks
from linearize.algebra.forms import FORMS, Infeasible, Pieces
from linearize.algebra.parts import made
from linearize.convert import unwrapped
from linearize.errors import CollapseError
from linearize.gating.gate import ChannelGate, gates
from linearize.graph.dryrun import Trace, dry_run, first_line
from linearize.graph.protect import ALONE
from linearize.plan import MASKED, NARROWED, UNCHANGED, Plan, SitePlan, When
from linearize.running.copies import duplicate
from linearize.sites.record import Record, Step, converted_parts, record_of, set_record
from linearize.sites.site import Site
from linearize.surgery.alphas import check_alphas
from linearize.surgery.folds import what_is_left
from linearize.surgery.form_choice import fixed_producer, make_plan, mask_of, masks_of
from linearize.surgery.fused import fuse_again
from linearize.surgery.fusing import keep_readable
from linearize.surgery.leftover import keep_activation, shrink_activation
from linearize.surgery.make import make_layer
from linearize.surgery.maps import Reader
from linearize.surgery.narrow import Chain, chains_of, constant_channels, narrow
from linearize.surgery.specs import Spec, build, replace_module, spec_of

_log = logging.getLogger(__name__)

_WHOLE = (MASKED, UNCHANGED)  # forms that leave the maps of a site as they are


def collapse(model: nn.Module, *, when: When = "cheaper", plan: Plan | None = None) -> nn.Module:
    """A model without gates that computes the same function as `model` in eval mode.

    Linear channels are folded into the linear maps before and after them: merged, factored or vanished, whichever is
    cheapest (docs/algebra.md). A channel that is linear but cannot be collapsed keeps a partial activation.

    Args:
        model: a converted model; it is left as it is.
        when: "cheaper" collapses a site only where that saves cost; "always" merges every linear channel that can be.
        plan: a plan made before, to carry out instead of a new one.

    Returns:
        A new model of the same class. Relative error at most 1e-5 in float32 and 1e-12 in float64.

    Raises:
        CollapseError: the model has no gates, its weights are not finite, or the plan is for another model.

    Warns:
        UserWarning: channels have an alpha between 0 and 1, and keep a blend of activation and line.

    Examples:
        >>> import linearize
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> gated = linearize.convert(net, torch.randn(2, 4))
        >>> _ = linearize.gates(gated)["1"].linearize_(torch.ones(64, dtype=torch.bool))
        >>> linearize.collapse(gated)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Identity()
          (2): Identity()
        )
    """
    checks.choice("when", when, ("cheaper", "always"))
    model = unwrapped(checks.module("model", model))
    found = gates(model)
    if not found:
        raise CollapseError(type(model).__name__, "has no gates", "Call linearize.convert(model) first.")
    if any(gate.alpha.device.type == "meta" for gate in found.values()):
        raise CollapseError(type(model).__name__, "has no values (meta device)", "Load its weights first.")
    for gate in found.values():
        gate.check()
    check_alphas(found)
    if plan is not None and not isinstance(plan, Plan):
        checks.refuse("plan", plan, "a Plan; Plan.from_json reads one from text")
    if plan is not None and "" in (converted_parts(model) or [""]):
        _check_plan(plan, found)
    return collapse_telling(model, when, plan, _log.warning)


def collapse_telling(
    model: nn.Module, when: When, plan: Plan | None, tell: Callable[[str, str, str], object]
) -> nn.Module:
    """Collapse a model that has been checked; `tell` is given a format, a site that stays and the reason."""
    parts = converted_parts(model)
    with ALONE:
        if parts and "" not in parts:
            return _collapse_parts(model, parts, when, plan, tell)
        return _collapse(model, when, plan, tell)


def _collapse(model: nn.Module, when: When, plan: Plan | None, tell: Callable[[str, str, str], object]) -> nn.Module:
    chosen = plan if plan is not None else make_plan(model, when=when)
    result, failure = _try(model, chosen)
    widen = True
    if failure is not None and plan is None and _branches(model):  # code that cuts what is wider, as in GhostNet
        widen, chosen = False, make_plan(model, when=when, widen=False)
        result, failure = _try(model, chosen)
    if failure is not None and plan is None:
        barred = _troublemakers(model, chosen, widen=widen)
        for name, why in barred.items():
            tell("%s keeps a partial activation: %s", name, why)
        chosen = make_plan(model, when=when, barred=barred, widen=widen)
        result, failure = _try(model, chosen)
        if failure is not None and any(site.form == NARROWED for site in chosen.sites):  # halving parts chains
            barred |= {site.site: f"{failure}" for site in chosen.sites if site.form == NARROWED}
            result, failure = _try(model, make_plan(model, when=when, barred=barred, widen=widen))
    if result is None:
        found = f"does not run after collapsing ({failure})"
        remedy = "Please report this model." if plan is None else "Make the plan from this model."
        raise CollapseError(type(model).__name__, found, remedy)
    return result


def _check_plan(plan: Plan, found: dict[str, ChannelGate]) -> None:
    remedy = "Make the plan from this model."
    if {site.site for site in plan.sites} != set(found):
        odd = sorted({site.site for site in plan.sites} ^ set(found))
        raise CollapseError(odd[0], "is in the plan or in the model, but not in both", remedy)
    for site in plan.sites:
        if site.form not in (*FORMS, NARROWED, MASKED, UNCHANGED):
            raise CollapseError(site.site, f"found the form {site.form!r} in the plan", remedy)
        linear = {int(i) for i in found[site.site].linear.nonzero().flatten()}
        if not linear.issuperset(site.linear):
            channel = min(set(site.linear) - linear)
            raise CollapseError(site.site, f"channel {channel} is linear in the plan, but not in the model", remedy)


def _collapse_parts(
    model: nn.Module, parts: list[str], when: When, plan: Plan | None, tell: Callable[[str, str, str], object]
) -> nn.Module:
    """Collapse the submodules that were converted by themselves."""
    if plan is not None:
        found = f"was not converted as a whole, but its parts {', '.join(parts)}"
        raise CollapseError(type(model).__name__, found, "Collapse each part with a plan of its own.")
    result = duplicate(model, CollapseError)
    steps: list[Step] = []
    for path in parts:
        part = collapse_telling(model.get_submodule(path), when, None, tell)
        record = record_of(part) or Record()
        steps += [{**step, "path": f"{path}.{step['path']}" if step["path"] else path} for step in record.steps]
        replace_module(result, path, part)
    set_record(result, Record((), steps))
    return collapse_telling(result, when, None, tell) if gates(result) else result


def _try(model: nn.Module, plan: Plan) -> tuple[nn.Module | None, str | None]:
    """The collapsed model, or why there is none."""
    try:
        result = _carry_out(model, plan)
    except Infeasible as why:  # the weights showed what the shapes did not
        return None, str(why)
    failure = _difference(model, result)
    if failure is not None:
        return None, failure
    record = record_of(result) or Record()
    record.steps = fuse_again(result, record.steps)
    return result, None


def _carry_out(model: nn.Module, plan: Plan) -> nn.Module:
    result = duplicate(model, CollapseError)
    found = gates(result)
    masks = masks_of(found)
    reader = Reader(result)
    steps, unfolded = list[Step](), list[Site]()
    at: dict[str, int] = {}
    last_use = _last_use(found)
    chains = {chain.lower.name: chain for chain in chains_of(result, (gate.site for gate in found.values()))}
    for planned in reversed(plan.sites):
        gate = found[planned.site]
        site, carries = gate.site, True
        if planned.form == NARROWED and planned.site in chains:
            chain = chains[planned.site]
            reader.pieces.update(narrow(reader, chain, found, _dropped(planned, chain, found, masks)))
            at.update({port.module: port.dims for port in chain.ports})
            unfolded += [chain.upper, chain.lower]
            steps += [step for part in (chain.upper, chain.lower) for step in unfold(result, part)]
        elif planned.form not in (*_WHOLE, NARROWED) and site is not None:
            maps = reader.maps(site, gate, mask_of(planned, gate.channels), fixed_producer(found, site, masks))
            reader.pieces.update(reader.settled(site, made(planned.form, maps)))
            carries = maps.linear.numel() > 0  # else all others were dropped: an ordinary activation remains
            at.update(
                {port.module: port.dims for port in (site.producer, site.up, *site.consumers) if port is not None}
            )
            unfolded.append(site)
            steps += unfold(result, site)
        linear = mask_of(planned, gate.channels)
        if planned.form in _WHOLE:
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


def _dropped(planned: SitePlan, chain: Chain, found: dict[str, ChannelGate], masks: dict[str, Tensor]) -> Tensor:
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
    """Take away the constant maps that now live in their neighbours; their children stay.

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


def _difference(model: nn.Module, result: nn.Module) -> str | None:
    """What shows, without computing anything, that the collapsed model is not the same function; None if nothing does.

    The code around a site may name the width of its tensors, or compute with it.
    """
    record, after = record_of(model), record_of(result)
    if record is None or record.inputs is None or after is None:
        return None
    new = after.steps[len(record.steps) :]
    changed = {step["path"] for step in new if step["module"]["type"] != "Neutral"}
    skip = frozenset(changed | {path for path, module in model.named_modules() if isinstance(module, ChannelGate)})
    modes = (False, True) if any(parameter.requires_grad for parameter in model.parameters()) else (False,)
    for gradients in modes:
        try:
            expected = dry_run(model, record.inputs, skip=skip, gradients=gradients)
        except Exception as error:  # a model that does not run on fake tensors at all cannot be asked
            _log.debug("no dry run: %s", error)
            continue
        try:
            found = dry_run(result, record.inputs, skip=skip, gradients=gradients)
        except Exception as error:  # whatever the model's own code raises
            return first_line(error)
        why = _difference_of(expected, found, changed)
        if why is not None:
            return why
    return None


def _difference_of(expected: Trace, found: Trace, changed: set[str]) -> str | None:
    """What two runs in the same mode show."""
    missed = (changed & expected.called) - found.called
    if missed:
        return f"it calls {min(missed)} from another place that holds it, too"
    if found.outputs != expected.outputs:
        return "an output has another shape"
    odd = found.numbers - expected.numbers
    return f"it computes with the number {next(iter(odd))[1][0]} then" if odd else None


def _branches(model: nn.Module) -> bool:
    """True if a consumer lies behind a concatenation."""
    sites = [gate.site for gate in gates(model).values() if gate.site is not None]
    return any(not port.whole for site in sites for port in site.consumers)


def _troublemakers(model: nn.Module, plan: Plan, *, widen: bool) -> dict[str, str]:
    """The sites that cannot be collapsed on their own, with what happens if they are: found by halving."""
    names = [planned.site for planned in plan.sites]
    waiting = [[planned.site for planned in plan.sites if planned.form not in _WHOLE]]
    barred: dict[str, str] = {}
    while waiting:
        group = waiting.pop()
        others = {name: "" for name in names if name not in group}
        chosen = make_plan(model, when="always", barred=others, widen=widen)
        _, failure = _try(model, chosen) if group else (None, None)
        if failure is None:
            continue
        if len(group) == 1:
            barred[group[0]] = f"the code around it does not take another width ({failure})"
        else:
            waiting += [group[: len(group) // 2], group[len(group) // 2 :]]
    return barred

"""Remove all gates, and fold linear channels into the linear maps around them, in float64."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from linearize import checks
from linearize.algebra.forms import FORMS
from linearize.algebra.piece import Infeasible
from linearize.convert import eager_model
from linearize.errors import CollapseError
from linearize.gating.gate import ChannelGate, gates
from linearize.gating.sharded import check_unsharded
from linearize.graph.protect import ALONE
from linearize.plan import MASKED, NARROWED, UNCHANGED, Plan, When
from linearize.running.copies import duplicate
from linearize.sites.record import Record, Step, converted_parts, record_of, set_record
from linearize.surgery.alphas import check_alphas
from linearize.surgery.carry_out import KEEPS_MAPS, carry_out
from linearize.surgery.difference import difference
from linearize.surgery.form_choice import make_plan
from linearize.surgery.fused import fuse_again
from linearize.surgery.specs import replace_module
from linearize.zoo.layers import close_up

_log = logging.getLogger(__name__)


def collapse(model: nn.Module, *, when: When = "cheaper", plan: Plan | None = None) -> nn.Module:
    """Make a model without gates that computes the same function as `model` in eval mode.

    Linear channels are folded into the linear maps before and after them, in the cheapest form: merged, factored or
    vanished (docs/algebra.md). If the channels of a site cannot be folded, its activation leaves out the linear ones.

    Args:
        model: a converted model. It is not changed.
        when: "cheaper" folds a site only if that saves cost. "always" merges every linear channel that can be merged.
        plan: a plan to carry out; None makes a new one.

    Returns:
        A new model of the same class. Relative error at most 1e-5 in float32 and 1e-12 in float64.

    Raises:
        CollapseError: the model has no gates, its weights are not finite, or the plan is for another model.

    Warns:
        UserWarning: channels have an alpha between 0 and 1, and keep a blend of activation and line.

    Examples:
        >>> import linearize
        >>> import torch
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
    model = eager_model(checks.module("model", model))
    found = gates(model)
    if not found:
        raise CollapseError(type(model).__name__, "has no gates", "Call linearize.convert(model) first.")
    check_unsharded(model, CollapseError)
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
    """Collapse a model that has been checked. `tell` gets a format, a site that is not folded, and the reason."""
    parts = converted_parts(model)
    with ALONE:
        if parts and "" not in parts:
            return _collapse_parts(model, parts, when, plan, tell)
        result = _collapse(model, when, plan, tell)
        close_up(result)
        return result


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
        result = carry_out(model, plan)
    except Infeasible as why:  # the weights showed what the shapes did not
        return None, str(why)
    failure = difference(model, result)
    if failure is not None:
        return None, failure
    record = record_of(result) or Record()
    record.steps = fuse_again(result, record.steps)
    return result, None


def _branches(model: nn.Module) -> bool:
    """True if a consumer lies behind a concatenation."""
    sites = [gate.site for gate in gates(model).values() if gate.site is not None]
    return any(not port.whole for site in sites for port in site.consumers)


def _troublemakers(model: nn.Module, plan: Plan, *, widen: bool) -> dict[str, str]:
    """The sites that cannot be collapsed on their own, with what happens if they are: found by halving."""
    names = [planned.site for planned in plan.sites]
    waiting = [[planned.site for planned in plan.sites if planned.form not in KEEPS_MAPS]]
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

"""Gates in a group of their own, whichever library made the groups: they never decay, and have a rate of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from linearize import checks
from linearize.errors import UsageError
from linearize.gating.gate import ChannelGate
from linearize.integrations.attach import plain_optimizer

__all__ = ["gates_apart"]

_NAMED = "param_names"  # torch keeps names beside parameters, if it was given them


def gates_apart(groups: Any, model: nn.Module, *, gate_lr: float = 1e-2) -> Any:
    """Take the alphas out of an optimizer's groups, and put them into one of their own at the end.

    Args:
        groups: an optimizer that has done no step, which is changed in place, or a list of groups as a library makes
            them (timm's `param_groups_layer_decay`), which is not. Call it before a scheduler is made.
        model: with gates; alphas that need no gradient are left out.
        gate_lr: learning rate of the gates.

    Returns:
        The optimizer, or new groups. The new group has no weight decay, and no scale of a layer's depth.

    Raises:
        UsageError: the model has no gates that are trained, or the optimizer has done steps, or has a scheduler.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 4), ChannelGate(nn.ReLU(), 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in gates_apart(optimizer, model).param_groups]
        [(4, 0.001, 0.05), (1, 0.01, 0.0)]
    """
    checks.number("gate_lr", gate_lr, least=0)
    checks.module("model", model)
    found = [m.alpha for m in model.modules() if isinstance(m, ChannelGate) and m.alpha.requires_grad]
    if not found:
        remedy = "Pass linearize.convert(model), with gates that require a gradient."
        raise UsageError("gates_apart", "found no gate that is trained", remedy)
    alphas = {id(alpha): alpha for alpha in found}
    if isinstance(groups, Sequence) and not isinstance(groups, str):
        rest = [_without(dict(group), alphas) for group in groups]
        kept = [group for group in rest if group["params"]]
        return [*kept, {"params": list(alphas.values()), "lr": gate_lr, "weight_decay": 0.0}]
    optimizer = plain_optimizer(groups)
    if optimizer.state:
        raise UsageError("gates_apart", "found an optimizer that has done steps", "Call it right behind its making.")
    if any("initial_lr" in group for group in optimizer.param_groups):
        counted = "found an optimizer with a scheduler, which has counted its groups"
        raise UsageError("gates_apart", counted, "Call it before the scheduler is made.")
    names = {id(parameter): path for path, parameter in model.named_parameters()}
    named = any(_NAMED in group for group in optimizer.param_groups)
    optimizer.param_groups[:] = [g for g in (_without(g, alphas) for g in optimizer.param_groups) if g["params"]]
    mine = list(alphas.values())
    optimizer.add_param_group(
        {"params": [(names[id(a)], a) for a in mine] if named else mine, "lr": gate_lr, "weight_decay": 0.0}
    )
    return groups


def _without(group: dict[str, Any], alphas: Mapping[int, Any]) -> dict[str, Any]:
    """The group without the alphas, and their names, if it has names."""
    group["params"] = list(group["params"])  # which may be a generator
    stay = [place for place, parameter in enumerate(group["params"]) if id(_tensor(parameter)) not in alphas]
    for key in ("params", _NAMED):
        if key in group:
            group[key] = [group[key][place] for place in stay]
    return group


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry

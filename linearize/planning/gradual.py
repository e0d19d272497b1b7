"""Gradual fine-tuning: gates and weights move to the planned state while the model trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import CollapseError
from linearize.gating.gate import gates
from linearize.running.copies import duplicate
from linearize.training.path import PlannedPath

__all__ = ["path_to"]


def path_to(start: nn.Module, goal: nn.Module, *, steps: int) -> tuple[nn.Module, PlannedPath]:
    """A copy of a gated model, and the path that moves it to `goal` in a number of steps.

    Args:
        start: gated, as the original computes.
        goal: the same with some channels linear, and other weights and lines at their sites.
        steps: optimizer steps until the copy is in its planned state; 0 starts there.

    Returns:
        The model to train and its path, to be passed to `finetune` as `model` and `prior`.
    """
    model = duplicate(start if steps else goal, CollapseError)
    goals, named = gates(goal), gates(model)
    masks = {name: gate.linear.clone() for name, gate in goals.items() if bool(gate.linear.any())}
    if not steps:
        return model, PlannedPath(model, masks, {}, steps=1)
    _add_missing(model, goal)
    own, wanted = dict(model.named_parameters()), dict(goal.named_parameters())
    inside = {id(gate.alpha) for gate in named.values()}
    ways: dict[str, Tensor] = {}
    for name, parameter in own.items():
        if id(parameter) in inside or name not in wanted:
            continue
        way = wanted[name].detach() - parameter.detach()
        if bool((way != 0).any()):
            ways[name] = way
    for name, gate in named.items():
        if name in masks:
            _set_line(gate, goals[name].slope, goals[name].intercept)
    return model, PlannedPath(model, masks, ways, steps=steps)


@torch.no_grad()
def _set_line(gate: Any, slope: Tensor, intercept: Tensor) -> None:
    gate.slope.copy_(slope)
    gate.intercept.copy_(intercept)


def _add_missing(model: nn.Module, goal: nn.Module) -> None:
    """A layer that got a bias in the goal gets one of zeros here."""
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    for path, module in goal.named_modules():
        there: Any = modules.get(path)
        bias = module._parameters.get("bias")
        if bias is not None and there is not None and there._parameters.get("bias", 0) is None:
            there.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=bias.requires_grad)

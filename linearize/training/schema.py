"""What the state of a training run must be: seen before any of it is loaded, so that a damaged one changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.checks import is_number, is_whole
from linearize.running.randomness import is_random_state

__all__ = ["fits_optimizer", "flaw_in_checkpoint", "flaw_in_run"]

_PARTS = {
    "model": dict,
    "optimizer": dict,
    "prior": dict | None,
    "scaler": dict | None,
    "random": dict,
    "generators": list,
    "step": int,
    "history": list,
}


def flaw_in_checkpoint(state: Any) -> str | None:
    """What is wrong with the content of a checkpoint; None if nothing is.

    Example:
        >>> flaw_in_checkpoint({"options": {}, "run": {"model": 3}})
        'model is a int'
    """
    if not isinstance(state, dict) or not isinstance(state.get("options"), dict):
        return "no options of a run"
    return flaw_in_run(state.get("run"))


def flaw_in_run(state: Any) -> str | None:
    """What is wrong with the state of a run; None if nothing is."""
    if not isinstance(state, dict):
        return "no state of a run"
    for name, kind in _PARTS.items():
        if name not in state:
            return f"no {name}"
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            return f"{name} is a {type(state[name]).__name__}"
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state["model"].items()):
        return "a model that is no dict of tensors"
    if not is_random_state(state["random"]) or not all(map(_is_generator_state, state["generators"])):
        return "random states that are none"
    if state["step"] < len(state["history"]) or not state["history"]:
        return f"{state['step']} steps in {len(state['history'])} epochs"
    if not all(map(_is_record, state["history"])):
        return "a history of something else than epochs"
    return _flaw_in_optimizer(state["optimizer"])


def fits_optimizer(optimizer: Any) -> bool:
    """Whether what an optimizer remembers of each parameter has its shape."""
    return all(
        value.dim() == 0 or value.shape == parameter.shape
        for parameter, entries in optimizer.state.items()
        for value in entries.values()
        if isinstance(value, Tensor)
    )


def _flaw_in_optimizer(state: dict[str, Any]) -> str | None:
    entries, groups = state.get("state"), state.get("param_groups")
    if not isinstance(entries, dict) or not isinstance(groups, list):
        return "an optimizer without state or groups"
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list) or not is_number(group.get("lr")):
            return "a group of parameters that is none"
    names = {"step", "exp_avg", "exp_avg_sq"}
    if not all(is_whole(key) and isinstance(entry, dict) and names <= entry.keys() for key, entry in entries.items()):
        return "an optimizer that is not AdamW"
    return None


def _is_generator_state(state: Any) -> bool:
    return isinstance(state, Tensor) and state.dtype == torch.uint8 and state.dim() == 1


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and {"epoch", "loss"} <= record.keys()
        and all(isinstance(name, str) and is_number(value) for name, value in record.items())
    )

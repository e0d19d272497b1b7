"""Check the state of a training run before any of it is loaded, so that a damaged state changes nothing."""

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
    """The flaw in the content of a checkpoint; None if there is none.

    Examples:
        >>> flaw_in_checkpoint({"options": {}, "run": {"model": 3}})
        'model is a int'
    """
    if not isinstance(state, dict) or not isinstance(state.get("options"), dict):
        return "no options of a run"
    if not all(_is_plain(value) for value in state["options"].values()):
        return "options that are none"
    flaw = flaw_in_run(state.get("run"))
    if flaw is not None:
        return flaw
    length, run = state["options"].get("steps per epoch"), state["run"]
    if is_whole(length) and run["step"] != length * len(run["history"]):
        return f"{run['step']} steps in {len(run['history'])} epochs of {length}"
    return None


def flaw_in_run(state: Any) -> str | None:
    """The flaw in the state of a run; None if there is none."""
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
    if not all(_is_record(record, place + 1) for place, record in enumerate(state["history"])):
        return "a history of something else than epochs"
    return _flaw_in_optimizer(state["optimizer"])


def fits_optimizer(optimizer: Any) -> bool:
    """True if the stored state of an optimizer has the shapes of its parameters."""
    return all(
        entries[name].shape == parameter.shape
        for parameter, entries in optimizer.state.items()
        for name in ("exp_avg", "exp_avg_sq")
        if name in entries
    )


def _flaw_in_optimizer(state: dict[str, Any]) -> str | None:
    entries, groups = state.get("state"), state.get("param_groups")
    if not isinstance(entries, dict) or not isinstance(groups, list):
        return "an optimizer without state or groups"
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list) or not is_number(group.get("lr")):
            return "a group of parameters that is none"
    if not all(is_whole(key) and _is_moments(entry) for key, entry in entries.items()):
        return "an optimizer that is not AdamW"
    return None


def _is_moments(entry: Any) -> bool:
    """Whether this is what AdamW remembers of a parameter."""
    if not isinstance(entry, dict) or not {"step", "exp_avg", "exp_avg_sq"} <= entry.keys():
        return False
    step = entry["step"]
    single = is_number(step) or (isinstance(step, Tensor) and step.dim() == 0 and step.is_floating_point())
    moments = (entry["exp_avg"], entry["exp_avg_sq"])
    return single and all(isinstance(each, Tensor) and each.is_floating_point() for each in moments)


def _is_generator_state(state: Any) -> bool:
    return isinstance(state, Tensor) and state.dtype == torch.uint8 and state.dim() == 1


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(entry, str) for entry in value)
    return value is None or isinstance(value, str | bool | int | float)


def _is_record(record: Any, epoch: int) -> bool:
    return (
        isinstance(record, dict)
        and {"epoch", "loss", "lr", "share", "seconds"} <= record.keys()
        and record["epoch"] == epoch
        and all(isinstance(name, str) and is_number(value) for name, value in record.items())
    )

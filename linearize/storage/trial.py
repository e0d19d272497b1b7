"""Whether the layers of a loaded model fit each other: a run without values, on the inputs that its file names.

What one layer makes, another must take. No look at the layers one by one tells that, but a run on tensors without
memory does, in some hundredths of a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from linearize.errors import CheckpointError, UsageError
from linearize.graph.capture import fake_inputs
from linearize.graph.dryrun import dry_run, first_line
from linearize.graph.protect import untouched
from linearize.nest import copied
from linearize.zoo.building import Limit, within_limit

__all__ = ["check_runs"]

_log = logging.getLogger(__name__)

_SOME, _EACH = 500, 10  # parts that a run may make, ten computations for each: a loop over long inputs has an end
_REMEDY = "Load it onto the base model that it was made from, with the library versions that it was made with."


def check_runs(path: str, model: nn.Module, inputs: Any, base: Callable[[], nn.Module], limit: Limit) -> None:
    """Check that a model without values runs on the example inputs of its file, if its base model does.

    Args:
        path: the file, for the message.
        model: with the steps of the file.
        inputs: arguments by position and by name, on the meta device; anything else is left alone.
        base: makes the same model without the steps. It is called only where the model does not run.
        limit: how much may be made, and computed, on the way.

    Raises:
        CheckpointError: the model does not run, and its base model does.
    """
    is_call = isinstance(inputs, tuple) and len(inputs) == 2
    if not is_call or not isinstance(inputs[0], tuple) or not isinstance(inputs[1], dict):
        return
    problem = _problem(model, inputs, limit)
    if problem is not None and _problem(base(), inputs, limit) is None:
        raise CheckpointError(path, f"its layers do not fit each other ({problem})", _REMEDY)


def _problem(model: nn.Module, inputs: Any, limit: Limit) -> str | None:
    """Why a model does not run; None if it does, or if nobody can tell without values and within the limit."""
    found: str | None = None
    parts = sum(1 for _ in model.modules())
    bound = Limit(limit.elements, min(limit.parts, _SOME + _EACH * parts), limit.size)
    for attempt in (_hollow, _fake):
        try:
            with untouched(model), torch.no_grad(), within_limit(bound):
                attempt(model, inputs)
        except UsageError as error:
            _log.debug("no run without values: %s", error)
            return None
        except Exception as error:  # whatever the model's own code raises
            found = first_line(error)[:200]
        else:
            return None
    return found


def _hollow(model: nn.Module, inputs: Any) -> object:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hollow = {name: tensor.detach().to("meta") for name, tensor in tensors}
    args, kwargs = fake_inputs(copied(inputs))
    return torch.func.functional_call(model, hollow, args, kwargs)


def _fake(model: nn.Module, inputs: Any) -> object:
    return dry_run(model, inputs, on_cpu=True)

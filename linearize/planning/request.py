"""What `compress` is called with, checked before any work begins."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.errors import DataError, UsageError
from linearize.finetune import finetune as train
from linearize.plan import Plan
from linearize.planning.budget import is_number
from linearize.running.batches import Batch, labels_are_inputs, read_batch, to_device
from linearize.running.models import device_of, evaluating
from linearize.training.losses import has_loss
from linearize.training.run import Objective

__all__ = ["check_call", "check_output", "check_request", "check_training", "some_batches", "training_options"]

_log = logging.getLogger(__name__)

_GENTLE = 3e-4  # learning rate behind a plan: the model is close already, and a large rate takes it away


def check_call(model: Any, evaluate: Any, folder: Any, seed: Any) -> None:
    """Arguments that nothing else looks at before the work begins."""
    if not isinstance(model, nn.Module):
        raise UsageError("model", f"found a {type(model).__name__}", "Pass a torch.nn.Module.")
    if torch.is_inference_mode_enabled():
        raise UsageError("compress", "found torch.inference_mode()", "Call it outside: it needs gradients.")
    if evaluate is not None and not callable(evaluate) and not isinstance(evaluate, Iterable):
        remedy = "Pass batches with labels, or a function of a model."
        raise UsageError("evaluate", f"found a {type(evaluate).__name__}", remedy)
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError("checkpoint_dir", f"found {folder}, which is no folder", "Pass a folder, new or not.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError("seed", f"found {seed!r}", "Pass a whole number.")


def check_request(
    budget: bool, linear: float | None, plan: Plan | None, *, round_to: int | None, rounds: int, search: int
) -> None:
    """Exactly one of a budget, a share and a plan, and whole numbers in range.

    Raises:
        UsageError: otherwise.
    """
    given = int(budget) + (linear is not None) + (plan is not None)
    if given != 1:
        found = "found no budget" if not given else "found a budget beside linear= or plan="
        remedy = "Pass exactly one of latency, flops, params, speedup, activations (or linear, or plan)."
        raise UsageError("compress", found, remedy)
    if linear is not None and (not is_number(linear) or not 0 < linear <= 1):
        raise UsageError("linear", f"found {linear!r}", "Pass a share above 0 and up to 1.")
    if plan is not None and not isinstance(plan, Plan):
        raise UsageError("plan", f"found a {type(plan).__name__}", "Pass a Plan; Plan.from_json reads one from text.")
    for name, value, least in (("round_to", round_to, 1), ("rounds", rounds, 0), ("search", search, 0)):
        if value is None and name == "round_to":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(name, f"found {value!r}", f"Pass a whole number of at least {least}.")


def some_batches(model: nn.Module, data: Iterable[Any], count: int = 4) -> list[Any]:
    """The first batches without their labels, but where the model makes inputs of them; as `verify` takes them.

    Raises:
        DataError: there are none.
    """
    found: list[Any] = []
    kept: bool | None = None
    for raw in islice(data, count):
        batch = read_batch(model, raw)
        kept = _needs_labels(model, batch) if kept is None else kept
        kwargs = {name: value for name, value in batch.kwargs.items() if name != "labels" or kept}
        if batch.args and kwargs:
            raise DataError("data", "found positional and keyword inputs in one batch", "Pass one kind only.")
        if not batch.size:
            raise DataError("data", f"found no sample in batch {len(found)}", "Leave out empty batches.")
        found.append(batch.args or kwargs)
    if not found:
        raise DataError("data", "found no batches", "Pass at least one; a generator can be used only once.")
    return found


def check_output(model: nn.Module, data: Iterable[Any]) -> None:
    """Whether the output has the parts that are to count, before minutes are spent on the plan.

    Raises:
        UsageError: it has no such part.
    """
    batch = to_device(read_batch(model, next(iter(data))), device_of(model))
    with evaluating(model):
        batch.meaning.parts(batch.checked(model, 0), batch.labels)


def _needs_labels(model: nn.Module, batch: Batch) -> bool:
    """Whether a model makes inputs of its labels: as its forward says, or because it does not run without them."""
    if "labels" not in batch.kwargs or labels_are_inputs(model, batch.kwargs):
        return "labels" in batch.kwargs
    here = to_device(batch, device_of(model))
    without = replace(here, kwargs={name: value for name, value in here.kwargs.items() if name != "labels"})
    with evaluating(model):
        for attempt, needed in ((without, False), (here, True)):
            try:
                attempt.run(model)
            except Exception as error:  # whatever the model's own code raises: what comes next says it better
                _log.debug("no run with labels=%s: %s", needed, error)
            else:
                return needed
    return False


def training_options(finetune: int | Mapping[str, Any] | None, *, gentle: bool) -> dict[str, Any]:
    """Keyword arguments of `finetune`, the number of epochs among them, 0 for none; if gentle, with a low rate."""
    if finetune is None:
        return {"epochs": 0}
    options: dict[str, Any] = {"epochs": 10, **finetune} if isinstance(finetune, Mapping) else {"epochs": finetune}
    if gentle:
        options.setdefault("lr", _GENTLE)
    taken = sorted(set(options) & {"prior", "teacher", "evaluate", "progress", "on_epoch", "seed"})
    if taken:
        found = f"found {taken[0]!r} among the options of fine-tuning"
        raise UsageError("finetune", found, "Use the argument of compress, which sets it.")
    unknown = sorted(set(options) - set(inspect.signature(train).parameters) - {"gradual"})
    if unknown:
        raise UsageError("finetune", f"found {unknown[0]!r}", "Pass keyword arguments of linearize.finetune.")
    if isinstance(options["epochs"], bool) or not isinstance(options["epochs"], int) or options["epochs"] < 1:
        remedy = "Pass a number of epochs, a dict of options, or None."
        raise UsageError("finetune", f"found {options['epochs']!r} epochs", remedy)
    gradual = options.get("gradual", 0)
    if not is_number(gradual) or not 0 <= gradual <= 1:
        raise UsageError("finetune", f"found gradual={gradual!r}", "Pass a share of the steps, from 0 to 1.")
    return options


def check_training(model: nn.Module, data: Iterable[Any], options: Mapping[str, Any], distill: bool) -> None:
    """Whether a loss comes out of the first batch at all, before minutes are spent on the plan.

    Raises:
        DataError: labels are missing.
        TrainingError: the loss is no scalar.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = "Set requires_grad on what may be trained, or pass finetune=None."
        raise UsageError("finetune", "found no parameter that requires a gradient", remedy)
    weight = options.get("distill_weight", 0.5) if distill else 0.0
    if weight >= 1:
        return
    with evaluating(model):
        batch = read_batch(model, to_device(next(iter(data)), device_of(model)))
        output = batch.checked(model, 0)
        if batch.labels is None and options.get("loss") is None and not has_loss(output):
            remedy = "Yield (inputs, labels) or a dict with 'labels', or pass finetune={'distill_weight': 1.0}"
            remedy += " to learn from the original alone." if distill else " and distill=True."
            raise DataError("data", "found no labels in a batch", remedy)
        Objective(options.get("loss"))(output, batch)

"""What a model and the first batches of its data must be like, checked before minutes are spent on a plan."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import nn

from linearize import checks
from linearize.convert import eager_model
from linearize.errors import DataError, UsageError
from linearize.planning.request import Request
from linearize.running.batches import Batch, labels_are_inputs, read_batch, to_device
from linearize.running.devices import check_whole
from linearize.running.models import device_of, evaluating
from linearize.serving.point import check_serving, size_of
from linearize.training.losses import has_loss
from linearize.training.objective import Objective

__all__ = ["check_inputs", "check_output", "check_served", "check_training_data", "some_batches"]

_log = logging.getLogger(__name__)


def check_inputs(model: Any, data: Any) -> None:
    """Check the model and its data before any work.

    Raises:
        UsageError: the model is none, has no values, or nothing can be computed with gradients here.
        DataError: the data cannot be iterated, or only once.
    """
    check_whole(eager_model(checks.module("model", model)), values=True)
    checks.normal_mode("compress")
    checks.batches("data", data)


def some_batches(model: nn.Module, data: Iterable[Any], count: int = 4) -> list[Any]:
    """The first batches without their labels, unless the model makes inputs of them; in the form that `verify` takes.

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
    """Check that the output has the chosen parts, before minutes are spent on the plan.

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


def check_served(model: nn.Module, example: Any, request: Request) -> None:
    """Check that a model can be served as its budgets ask for.

    Raises:
        UsageError: it does not generate text, or not from a context of this length.
    """
    point = request.point(size_of(example)[1])
    if point is not None:
        check_serving(model, point, request.served[0].measure)


def check_training_data(model: nn.Module, data: Iterable[Any], options: Mapping[str, Any], *, distill: bool) -> None:
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

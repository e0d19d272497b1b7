"""The arguments of `finetune`, checked before anything happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from linearize import checks
from linearize.errors import DataError, UsageError
from linearize.running.devices import check_whole

__all__ = ["PRECISIONS", "check_numbers", "check_training"]

PRECISIONS = ("no", "bf16", "fp16")
"""What `mixed_precision` may be."""

_CHECKS: dict[str, Callable[[Any], Any]] = {
    "epochs": lambda value: checks.whole("epochs", value, 1),
    "distill_weight": lambda value: checks.share("distill_weight", value),
    "temperature": lambda value: checks.number("temperature", value, above=0),
    "feature_weight": lambda value: checks.number("feature_weight", value, above=0),
    "lr": lambda value: checks.number("lr", value, least=0),
    "gate_lr": lambda value: checks.number("gate_lr", value, least=0),
    "weight_decay": lambda value: checks.number("weight_decay", value, least=0),
    "warmup": lambda value: checks.share("warmup", value, "share of the steps"),
    "clip": lambda value: value is None or checks.number("clip", value, above=0),
    "mixed_precision": lambda value: value is None or checks.choice("mixed_precision", value, PRECISIONS),
    "accumulate": lambda value: value is None or checks.whole("accumulate", value, 1),
    "keep_norms": lambda value: checks.boolean("keep_norms", value),
    "steps_per_epoch": lambda value: value is None or checks.whole("steps_per_epoch", value, 1),
    "keep": lambda value: checks.whole("keep", value, 1),
    "resume": lambda value: checks.boolean("resume", value),
    "seed": lambda value: value is None or checks.seed("seed", value),
    "progress": lambda value: checks.boolean("progress", value),
}
"""By name, what each number, word and switch must be; `compress` checks the options that it passes on by these."""


def check_numbers(**given: Any) -> None:
    """Numbers, words and switches by name, those that are given.

    Raises:
        UsageError: one of them is out of range.

    Examples:
        >>> check_numbers(epochs=3, lr=1e-3, clip=None)
    """
    for name, value in given.items():
        if name in _CHECKS:
            _CHECKS[name](value)


def check_training(
    model: Any,
    data: Any,
    *,
    loss: Any,
    prior: Any,
    teacher: Any,
    evaluate: Any,
    on_step: Any,
    on_epoch: Any,
    torch_compile: Any,
    accelerator: Any,
    features: Any,
) -> None:
    """What is neither number nor word.

    Raises:
        UsageError: one of them is of another kind.
        DataError: the data cannot be iterated.
    """
    check_whole(checks.module("model", model), values=True)
    checks.normal_mode("finetune")
    if isinstance(data, str | bytes | Mapping | Tensor) or not isinstance(data, Iterable):
        remedy = "Pass an iterable of batches: tensors, tuples (inputs, labels), or dicts of keyword arguments."
        raise DataError("data", f"found a {type(data).__name__}", remedy)
    if teacher is not None:
        checks.weights("teacher", checks.module("teacher", teacher))
    if loss is not None:
        checks.function("loss", loss, "a function of (output, labels)")
    for name, hook in (("on_step", on_step), ("on_epoch", on_epoch)):
        if hook is not None:
            checks.function(name, hook, "a function of a record")
    if not isinstance(torch_compile, bool | Mapping):
        checks.refuse("torch_compile", torch_compile, "True, False, or a dict of options of torch.compile")
    if evaluate is not None:
        checks.evaluation("evaluate", evaluate)
    if prior is not None and not (callable(prior) and hasattr(prior, "gates") and hasattr(prior, "step")):
        checks.refuse("prior", prior, "a linearize.SparsityPrior")
    if accelerator is not None and not hasattr(accelerator, "prepare_optimizer"):
        checks.refuse("accelerator", accelerator, "an accelerate.Accelerator")
    if features is not None:
        checks.patterns("features", features)
        if teacher is None:
            raise UsageError("features", "found no teacher whose features could be learned", "Pass teacher= as well.")

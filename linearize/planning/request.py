"""What `compress` is called with: made, checked and told apart in one place, before any work begins."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from linearize import checks
from linearize.convert import unwrapped
from linearize.errors import DataError, UsageError
from linearize.finetune import finetune as train
from linearize.plan import Plan, When
from linearize.planning.budget import Budget, read_budget
from linearize.planning.timing.table import cache_file
from linearize.running.batches import Batch, labels_are_inputs, read_batch, to_device
from linearize.running.devices import check_whole
from linearize.running.models import device_of, evaluating
from linearize.running.outputs import Choice
from linearize.training.arguments import check_numbers
from linearize.training.kept import check_folder
from linearize.training.losses import has_loss
from linearize.training.objective import Objective

__all__ = ["Request", "check_inputs", "check_output", "check_training_data", "some_batches"]

_log = logging.getLogger(__name__)

_GENTLE = 3e-4  # learning rate behind a plan: the model is close already, and a large rate takes it away

# What neither the plan nor the weights depend on.
_ASIDE = {"evaluate", "dry_run", "cache", "checkpoint_dir", "progress"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `linearize.compress`, which describes them; whoever makes one has them checked.

    Raises:
        UsageError: no budget or several, or an option out of range.

    Examples:
        >>> Request(speedup=2).budget
        Budget(measure='latency', fraction=0.5)
    """

    latency: float | None = None
    flops: float | None = None
    params: float | None = None
    speedup: float | None = None
    activations: float | None = None
    linear: float | None = None
    plan: Plan | None = None
    finetune: int | Mapping[str, Any] | None = None
    evaluate: Any = None
    distill: bool = True
    example_inputs: Any = None
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    dry_run: bool = False
    sequential: bool = False
    search: int = 16
    uniform: bool | Sequence[str] = False
    stock: bool = False
    modules: bool = True
    output: Choice = None
    round_to: int | None = None
    when: When = "cheaper"
    batch_sizes: Sequence[int] | None = None
    rounds: int = 15
    cache: bool | Path = True
    checkpoint_dir: Any = None
    seed: int = 0
    progress: bool | Callable[[str], None] = True

    def __post_init__(self) -> None:
        self._check_what()
        for name in ("distill", "dry_run", "sequential", "stock", "modules"):
            checks.boolean(name, getattr(self, name))
        for name in ("search", "rounds"):
            checks.whole(name, getattr(self, name))
        for name in ("include", "exclude"):
            if getattr(self, name) is not None:
                checks.patterns(name, getattr(self, name))
        if self.round_to is not None:
            checks.whole("round_to", self.round_to, 1)
        if self.batch_sizes is not None:
            self._set("batch_sizes", checks.wholes("batch_sizes", self.batch_sizes))
        if not isinstance(self.uniform, bool):
            self._set("uniform", checks.patterns("uniform", self.uniform, "True, False, or glob patterns of sites"))
        if not isinstance(self.cache, bool):
            self._set("cache", checks.path("cache", self.cache))
        if self.evaluate is not None:
            checks.evaluation("evaluate", self.evaluate)
        if not isinstance(self.progress, bool):
            checks.function("progress", self.progress, "True, False, or a function of a line of text")
        checks.choice("when", self.when, ("cheaper", "always"))
        checks.seed("seed", self.seed)
        if self.checkpoint_dir is not None:
            self._set("checkpoint_dir", checks.folder("checkpoint_dir", self.checkpoint_dir))
        _ = self.training

    def _check_what(self) -> None:
        """Exactly one of a budget, a share and a plan."""
        given = (self.budget is not None) + (self.linear is not None) + (self.plan is not None)
        if given != 1:
            found = "found no budget" if not given else "found a budget beside linear= or plan="
            remedy = "Pass exactly one of latency, flops, params, speedup, activations (or linear, or plan)."
            raise UsageError("compress", found, remedy)
        if self.linear is not None:
            checks.share("linear", self.linear, positive=True)
        plan: Any = self.plan
        if plan is not None and not isinstance(plan, Plan):
            found, remedy = f"found a {type(plan).__name__}", "Pass a Plan; Plan.from_json reads one from text."
            raise UsageError("plan", found, remedy)
        if self.dry_run is True and self.budget is None:
            remedy = "Pass one of latency, flops, params, speedup, activations."
            raise UsageError("dry_run", "found without a budget", remedy)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @cached_property
    def budget(self) -> Budget | None:
        """What may remain of a cost; None if a share or a plan takes its place."""
        given = {name: getattr(self, name) for name in ("latency", "flops", "params", "activations")}
        return read_budget(speedup=self.speedup, **given)

    @cached_property
    def training(self) -> Mapping[str, Any]:
        """Keyword arguments of `finetune`, the number of epochs among them, 0 for none; gentle behind a plan."""
        if self.finetune is None:
            return {"epochs": 0}
        given = self.finetune
        options: dict[str, Any] = {"epochs": 10, **given} if isinstance(given, Mapping) else {"epochs": given}
        if self.linear is None:
            options.setdefault("lr", _GENTLE)
        if self.output is not None:
            options.setdefault("output", self.output)
        _check_options(options)
        return options

    @property
    def table(self) -> Path | None:
        """The file of latencies."""
        if isinstance(self.cache, bool):
            return cache_file() if self.cache else None
        return Path(self.cache)

    @property
    def key(self) -> list[tuple[str, Any]]:
        """All that the plan and the weights depend on, by name, besides model and data: every option but a few."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ASIDE}
        told["finetune"] = {
            n: v for n, v in self.training.items() if n not in ("checkpoint_dir", "resume", "keep", "on_step")
        }
        told["plan"] = None if self.plan is None else self.plan.to_json()
        return sorted(told.items())


def _check_options(options: Mapping[str, Any]) -> None:
    """Options of fine-tuning, before the plan that comes first is made."""
    taken = sorted(set(options) & {"prior", "teacher", "evaluate", "progress", "on_epoch", "seed"})
    if taken:
        found = f"found {taken[0]!r} among the options of fine-tuning"
        raise UsageError("finetune", found, "Use the argument of compress, which sets it.")
    unknown = sorted(map(str, set(options) - set(inspect.signature(train).parameters) - {"gradual"}))
    if unknown:
        raise UsageError("finetune", f"found {unknown[0]!r}", "Pass keyword arguments of linearize.finetune.")
    try:
        check_numbers(**options)
        checks.share("gradual", options.get("gradual", 0), "share of the steps")
        if options.get("loss") is not None:
            checks.function("loss", options["loss"], "a function of (output, labels)")
        if options.get("features") is not None:
            checks.patterns("features", options["features"])
        check_folder(options.get("checkpoint_dir"), resume=options.get("resume", False))
    except UsageError as error:
        raise UsageError(f"finetune, {error.where}", error.found, error.remedy) from error


def check_inputs(model: Any, data: Any) -> None:
    """The model and its data, before anything is done with them.

    Raises:
        UsageError: the model is none, has no values, or nothing can be computed with gradients here.
        DataError: the data cannot be iterated, or only once.
    """
    check_whole(unwrapped(checks.module("model", model)), values=True)
    checks.normal_mode("compress")
    checks.batches("data", data)


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

"""The arguments of `compress` as one frozen object: made, checked and compared here, before any work begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from linearize import checks
from linearize.errors import UsageError
from linearize.export import registry as format_registry
from linearize.export.face import Means
from linearize.export.runtimes import check_runtime
from linearize.families import registry as family_registry
from linearize.finetune import finetune as train
from linearize.plan import Plan, When
from linearize.planning.budget import SERVED, Budget, read_budgets
from linearize.planning.timing.table import cache_file
from linearize.running.outputs import OutputChoice
from linearize.serving.point import Point, read_point
from linearize.training.arguments import check_numbers
from linearize.training.kept import check_folder

__all__ = ["Method", "Request"]

Method = Literal["plan", "gates", "both"]


_BUDGETS = "latency, flops, params, speedup, activations, decode, prefill, memory"
_GENTLE = 3e-4  # learning rate behind a plan: the model is close already, and a large rate takes it away

# What neither the plan nor the weights depend on.
_ASIDE = {"evaluate", "dry_run", "cache", "checkpoint_dir", "progress"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `linearize.compress`, which describes them. They are checked when the object is made.

    Raises:
        UsageError: no budget, budgets that contradict each other, or an option out of range.

    Examples:
        >>> Request(speedup=2).budget
        Budget(measure='latency', fraction=0.5)
    """

    latency: float | None = None
    flops: float | None = None
    params: float | None = None
    speedup: float | None = None
    activations: float | None = None
    decode: float | None = None
    prefill: float | None = None
    memory: float | None = None
    serving: Any = None
    linear: float | None = None
    plan: Plan | None = None
    finetune: int | Mapping[str, Any] | None = None
    method: Method = "plan"
    candidates: int = 1
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
    target: str | None = None
    runtime: Any = None
    modules: bool = True
    families: Sequence[str] | None = None
    output: OutputChoice = None
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
        if self.families is not None:
            self._set("families", _families(self.families))
        if self.evaluate is not None:
            checks.evaluation("evaluate", self.evaluate)
        if not isinstance(self.progress, bool):
            checks.function("progress", self.progress, "True, False, or a function of a line of text")
        checks.choice("when", self.when, ("cheaper", "always"))
        checks.seed("seed", self.seed)
        if self.checkpoint_dir is not None:
            self._set("checkpoint_dir", checks.folder("checkpoint_dir", self.checkpoint_dir))
        _ = self.training
        checks.whole("candidates", self.candidates, 1)
        self._check_candidates()
        self._check_method()

    def _check_candidates(self) -> None:
        """Whether there are plans, and training to compare them."""
        if self.candidates == 1:
            return
        for name, bad, remedy in (
            (
                "finetune",
                not self.training["epochs"],
                "Pass finetune=, such as finetune=10: plans are compared trained.",
            ),
            ("method", self.method == "gates", 'Pass method="plan" or "both": gates start without a plan.'),
            ("linear", self.linear is not None, "Pass a budget, such as flops=0.5."),
            ("plan", self.plan is not None, "Pass a budget, such as flops=0.5."),
            ("dry_run", self.dry_run, "Leave candidates= out: a dry run trains nothing."),
        ):
            if bad:
                found = f"found {_short(getattr(self, name))} with candidates={self.candidates}"
                raise UsageError(name, found, remedy)

    def _check_method(self) -> None:
        """What gates that decide in training need, and what leaves them nothing to decide."""
        checks.choice("method", self.method, get_args(Method))
        if self.method == "plan":
            return
        if len(self.budgets) > 1 or self.served:
            found = f"found {self.method!r} with budgets in {' and '.join(b.measure for b in self.budgets)}"
            raise UsageError("method", found, "Pass one of latency=, flops=, params= or activations=.")
        for name, bad, remedy in (
            ("finetune", not self.training["epochs"], "Pass finetune=, such as finetune=10: gates decide in training."),
            ("finetune", "gradual" in self.training, 'Leave "gradual" out: gates move in steps of their own.'),
            ("linear", self.linear is not None, "Pass a budget, such as flops=0.5."),
            ("plan", self.plan is not None, "Pass a budget, such as flops=0.5."),
            ("dry_run", self.dry_run, 'Pass method="plan": what gates decide shows in training only.'),
            ("uniform", bool(self.uniform), 'Pass method="plan": gates decide on every site by itself.'),
            ("stock", self.stock, 'Pass method="plan": gates decide on every site by itself.'),
            ("target", self.means.uniform or not self.means.own_layers, f'Pass method="plan" for "{self.target}".'),
            ("sequential", self.sequential and self.method == "gates", 'Pass method="both": only a plan is refitted.'),
        ):
            if bad:
                raise UsageError(name, f"found {_short(getattr(self, name))} with method={self.method!r}", remedy)

    def _check_what(self) -> None:
        """Exactly one of budgets, a share and a plan."""
        given = bool(self.budgets) + (self.linear is not None) + (self.plan is not None)
        if given != 1:
            found = "found no budget" if not given else "found a budget beside linear= or plan="
            remedy = f"Pass one or several of {_BUDGETS}; or exactly one of linear and plan."
            raise UsageError("compress", found, remedy)
        if self.linear is not None:
            checks.share("linear", self.linear, positive=True)
        if self.target is not None:
            checks.choice("target", self.target, tuple(format_registry.FORMATS))
            if self.linear is not None and not self.means.own_layers:
                found = f'found beside linear=, which folds channels into layers that "{self.target}" cannot hold'
                raise UsageError("target", found, "Pass a budget, such as flops=0.5.")
        if self.runtime is not None:
            check_runtime(self.runtime)
        plan: Any = self.plan
        if plan is not None and not isinstance(plan, Plan):
            found, remedy = f"found a {type(plan).__name__}", "Pass a Plan; Plan.from_json reads one from text."
            raise UsageError("plan", found, remedy)
        if self.dry_run is True and self.budget is None:
            raise UsageError("dry_run", "found without a budget", f"Pass one of {_BUDGETS}.")
        if self.serving is not None:
            self._set("serving", read_point(self.serving))
            if not self.served:
                remedy = "Pass it with decode=, prefill= or memory=."
                raise UsageError("serving", "found without a budget that it is for", remedy)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """The shares of costs that may remain; none if a share of channels or a plan was given."""
        given = {
            name: getattr(self, name) for name in ("latency", "flops", "params", "activations", "prefill", "memory")
        }
        return read_budgets(speedup=self.speedup, decode=self.decode, **given)

    @property
    def budget(self) -> Budget | None:
        """The first of the budgets."""
        return next(iter(self.budgets), None)

    @property
    def served(self) -> tuple[Budget, ...]:
        """The budgets that only models which generate can have."""
        return tuple(budget for budget in self.budgets if budget.measure in SERVED)

    def point(self, context: int) -> Point | None:
        """Where the model is served, if a budget asks for it: as the user says, or one text of the data's length."""
        if not self.served:
            return None
        chosen: Point | None = self.serving
        return chosen or Point(1, max(4, context))

    @cached_property
    def training(self) -> Mapping[str, Any]:
        """Keyword arguments of `finetune` with the number of epochs, 0 for none; a small learning rate after a plan."""
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
    def means(self) -> Means:
        """What a plan may use: what was asked for, as far as the format that it is for can hold it."""
        most = Means() if self.target is None else format_registry.FORMATS[self.target].means
        return Means(
            own_layers=most.own_layers and not self.stock,
            uniform=most.uniform or self.stock,
            modules=most.modules and self.modules,
            round_to=most.round_to if self.round_to is None else self.round_to,
        )

    @property
    def table(self) -> Path | None:
        """The file of latencies."""
        if isinstance(self.cache, bool):
            return cache_file() if self.cache else None
        return Path(self.cache)

    @property
    def key(self) -> list[tuple[str, Any]]:
        """Everything by name that plan and weights depend on, besides model and data."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ASIDE}
        told["finetune"] = {
            n: v for n, v in self.training.items() if n not in ("checkpoint_dir", "resume", "keep", "on_step")
        }
        told["plan"] = None if self.plan is None else self.plan.to_json()
        return sorted(told.items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def _families(given: Any) -> tuple[str, ...]:
    """Names of families, each of them known."""
    known = [family.name for family in family_registry.FAMILIES]
    names = tuple(checks.patterns("families", given))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError("families", f"found {unknown[0]!r}", f"Known are {', '.join(known)}.")
    return names


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

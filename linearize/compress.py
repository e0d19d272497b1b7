"""The main job in one call: gates, calibration, fine-tuning to a target, collapsing, and proof of what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from linearize.bench import benchmark
from linearize.calibrate import calibrate
from linearize.collapse import collapse
from linearize.convert import convert
from linearize.cost import cost
from linearize.errors import DataError, UsageError
from linearize.finetune import Evaluate
from linearize.finetune import finetune as train
from linearize.plan import Plan, When, make_plan
from linearize.prior import SparsityPrior
from linearize.report.compression import Report
from linearize.running.batches import read_batch
from linearize.running.models import device_of, evaluating
from linearize.summary import summary
from linearize.training.losses import evaluate_batches
from linearize.verify import verify

__all__ = ["Result", "compress"]

# The last part of fine-tuning goes on with all gates decided, so that the weights settle around them.
_DECIDED_AFTER = 0.7


@dataclass(frozen=True)
class Result:
    """What `compress` gives back.

    Attributes:
        model: the collapsed model: same class, no gates, in eval mode.
        plan: what happened to every channel.
        report: quality, cost and latency before and after.
    """

    model: nn.Module
    plan: Plan
    report: Report


def compress(
    model: nn.Module,
    data: Iterable[Any],
    *,
    linear: float = 0.6,
    finetune: int | Mapping[str, Any] | None = 10,
    evaluate: Evaluate | None = None,
    distill: bool = True,
    example_inputs: Any = None,
    when: When = "cheaper",
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 15,
    seed: int = 0,
    progress: bool | Callable[[str], None] = True,
) -> Result:
    """Make a share of a model's channels linear, train the others to cope, and fold the linear ones away.

    Args:
        model: a trained model; it is left as it is.
        data: re-iterable batches as the model takes them, with labels: tuples (inputs, labels) or dicts of keyword
            arguments. Used for calibration, fine-tuning, verification and timing.
        linear: share of all gated channels that shall be linear, in (0, 1].
        finetune: number of epochs, or keyword arguments of `linearize.finetune`; None trains nothing and makes those
            channels linear whose nonlinearity matters least to their own output.
        evaluate: test batches, or a function of a model that gives a number or a dict of numbers; None skips it.
        distill: imitate the original model in fine-tuning, besides the labels.
        example_inputs: as for `linearize.convert`; None takes the first batch of the data.
        when: as for `linearize.collapse`.
        batch_sizes: for the latencies; None takes that of the data.
        rounds: measurements of each latency; 0 measures none.
        seed: of dropout and whatever else is random; the global random state is put back afterwards.
        progress: False is silent, True shows bars on a terminal; a function also gets a line for each step.

    Returns:
        A `Result`: `.model`, `.plan`, `.report`.

    Raises:
        LinearizeError: by any of the steps, or for an argument out of range; the model is left as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
        >>> result = compress(net, batches, linear=0.5, finetune=2, rounds=1, progress=False)
        >>> result.report.summary.linear, bool(result.report.verification)
        (32, True)
    """
    if not 0 < linear <= 1:
        raise UsageError("linear", f"found {linear}", "Pass a share above 0 and up to 1.")
    steps = _Steps(progress)
    batches = _some_batches(model, data)
    home = device_of(model)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with steps("convert"):
                gated = convert(model, batches[0] if example_inputs is None else example_inputs)
            with steps("calibrate"):
                calibration = calibrate(gated, data, progress=steps.bars)
            options = _options(finetune)
            total = options["epochs"] * _length(data, options)
            decided = max(1, int(_DECIDED_AFTER * total))
            prior = SparsityPrior(gated, kind="target", target=linear, steps=decided, calibration=calibration)
            with steps("fine-tune"):
                if total:
                    teacher = model if distill else None
                    history = _train(gated, data, steps, prior=prior, teacher=teacher, evaluate=evaluate, **options)
                else:
                    history = []
                    prior.step()
        with steps("collapse"):
            plan = make_plan(gated, when=when)
            small = collapse(gated, when=when).eval()
        report = _report(
            {"before": model, "gated": gated, "collapsed": small},
            batches,
            evaluate,
            batch_sizes,
            rounds,
            steps,
            history,
        )
        return Result(small, plan, report)
    finally:
        model.to(home)


class _Steps:
    """Times the steps and tells about them."""

    def __init__(self, progress: bool | Callable[[str], None]) -> None:
        self.bars = progress is not False
        self.say: Callable[[str], None] = progress if callable(progress) else lambda _: None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.say(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def epoch(self, record: Mapping[str, float]) -> None:
        """A line about an epoch."""
        parts = [f"epoch {record['epoch']:.0f}", f"loss {record['loss']:.4f}", f"linear {record['share']:.1%}"]
        self.say("  " + ", ".join(parts + [f"{n} {record[n]:.4f}" for n in ("accuracy", "score") if n in record]))


def _some_batches(model: nn.Module, data: Iterable[Any], count: int = 4) -> list[Any]:
    """The first batches without their labels, as `verify` and `benchmark` take them.

    Raises:
        DataError: there are none.
    """
    found = []
    for raw in islice(data, count):
        batch = read_batch(model, raw)
        kwargs = {name: value for name, value in batch.kwargs.items() if name != "labels"}
        if batch.args and kwargs:
            raise DataError("data", "found positional and keyword inputs in one batch", "Pass one kind only.")
        found.append(batch.args or kwargs)
    if not found:
        raise DataError("data", "found no batches", "Pass at least one; a generator can be used only once.")
    return found


def _options(finetune: int | Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments of `finetune`, the number of epochs among them; 0 for none."""
    if finetune is None:
        return {"epochs": 0}
    options = {"epochs": 10, **finetune} if isinstance(finetune, Mapping) else {"epochs": finetune}
    taken = sorted(set(options) & {"prior", "teacher", "evaluate", "progress", "on_epoch", "seed"})
    if taken:
        found = f"found {taken[0]!r} among the options of fine-tuning"
        raise UsageError("finetune", found, "Use the argument of compress, which sets it.")
    if not isinstance(options["epochs"], int) or options["epochs"] < 1:
        remedy = "Pass a number of epochs, a dict of options, or None."
        raise UsageError("finetune", f"found {options['epochs']!r} epochs", remedy)
    return options


def _length(data: Iterable[Any], options: Mapping[str, Any]) -> int:
    """Steps of an epoch."""
    if options.get("steps_per_epoch"):
        return int(options["steps_per_epoch"])
    return len(data) if isinstance(data, Sized) else sum(1 for _ in data)


def _train(model: nn.Module, data: Iterable[Any], steps: _Steps, **options: Any) -> list[dict[str, float]]:
    if not isinstance(data, Sized):
        options.setdefault("steps_per_epoch", _length(data, options))
    return train(model, data, progress=steps.bars, on_epoch=steps.epoch, **options).history


def _report(
    models: Mapping[str, nn.Module],
    batches: list[Any],
    evaluate: Evaluate | None,
    batch_sizes: Sequence[int] | None,
    rounds: int,
    steps: _Steps,
    history: list[dict[str, float]],
) -> Report:
    """Everything measured about the three models, all on the device of the gated one."""
    before, gated, after = models["before"], models["gated"], models["collapsed"]
    before.to(device_of(gated))
    with steps("verify"):
        verification = verify(gated, after, batches)
    quality: dict[str, dict[str, float]] = {}
    with steps("evaluate"):
        for stage, model in models.items() if evaluate is not None else ():
            for name, value in _scores(model, evaluate).items():
                quality.setdefault(name, {})[stage] = value
    timing = None
    if rounds:
        with steps("benchmark"):
            pair = {"original": before, "collapsed": after}
            timing = benchmark(pair, batches[0], rounds=rounds, batch_sizes=batch_sizes, progress=steps.say)
    costs = [cost(model, batches[0]) for model in (before, after)]
    return Report(quality, summary(gated), costs[0], costs[1], verification, timing, history, steps.seconds)


def _scores(model: nn.Module, evaluate: Evaluate | None) -> dict[str, float]:
    if evaluate is None:
        return {}
    if not callable(evaluate):
        return evaluate_batches(model, evaluate)
    with evaluating(model):
        found = evaluate(model)
    return {name: float(v) for name, v in found.items()} if isinstance(found, Mapping) else {"score": float(found)}

"""The main job in one call: gates, calibration, a plan for a budget, fine-tuning, collapsing, and proof of it all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.bench import benchmark
from linearize.convert import convert
from linearize.cost import cost
from linearize.errors import UsageError
from linearize.finetune import Evaluate
from linearize.finetune import finetune as train
from linearize.plan import Plan, When
from linearize.planning.budget import check_data, read_budget
from linearize.planning.by_budget import How, to_budget
from linearize.planning.by_share import to_share
from linearize.planning.job import Job
from linearize.planning.notes import NOTHING, Notes, facts_of, fingerprint
from linearize.planning.request import check_call, check_request, check_training, some_batches, training_options
from linearize.report.compression import Report
from linearize.running.models import device_of, evaluating
from linearize.running.steps import Steps
from linearize.summary import summary
from linearize.training.losses import evaluate_batches
from linearize.verify import verify
from linearize.zoo.stock import expect_stock, prove_stock

__all__ = ["Result", "compress"]


@dataclass(frozen=True)
class Result:
    """What `compress` gives back.

    Attributes:
        model: the collapsed model: same class, no gates, in eval mode. After a dry run: the model that went in.
        plan: what happened, or would happen, to every channel.
        report: quality, cost and latency before and after, and whether the budget is met.
    """

    model: nn.Module
    plan: Plan
    report: Report


def compress(
    model: nn.Module,
    data: Iterable[Any],
    *,
    latency: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    speedup: float | None = None,
    activations: float | None = None,
    linear: float | None = None,
    plan: Plan | None = None,
    finetune: int | Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    distill: bool = True,
    example_inputs: Any = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dry_run: bool = False,
    sequential: bool = False,
    search: int = 16,
    uniform: bool | Sequence[str] = False,
    stock: bool = False,
    modules: bool = True,
    round_to: int | None = None,
    when: When = "cheaper",
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 15,
    cache: bool | Path = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | Callable[[str], None] = True,
) -> Result:
    """Make a model cost what a budget allows, at the least loss of its function, and prove what came out.

    For each site the candidates are: stay; drop channels and refit the others by least squares; the same beside a
    linear skip of some rank; one linear map for all of it. Whole modules, such as attention or a residual block, may
    become one linear map, too. Costs are counted or measured, losses predicted from the sensitivity of the model's
    output, and the best choice within the budget is taken (docs/compress.md). Choice and refit are approximate, and
    what they lose is measured; what then is folded away is folded exactly.

    Args:
        model: a trained model; it is left as it is.
        data: re-iterable batches as the model takes them: tensors, tuples (inputs, labels) or dicts of keyword
            arguments. Labels are needed for fine-tuning only.
        latency: budget: fraction in (0, 1] of the original's measured latency.
        flops: budget: fraction of its FLOPs.
        params: budget: fraction of its parameters.
        speedup: budget: a factor of at least 1; the same as `latency=1 / speedup`.
        activations: budget: fraction of its nonlinear unit evaluations.
        linear: in place of a budget: share of all gated channels that shall be linear, in (0, 1].
        plan: in place of a budget: a plan that `compress` made for this model, perhaps edited, to carry out again.
        finetune: number of epochs, or keyword arguments of `linearize.finetune` (and `gradual`, the share of the steps
            that the way to the plan takes; 0, the default, starts in the planned state); None trains nothing. Behind a
            budget or a plan the learning rate is 3e-4 if none is given.
        evaluate: test batches, or a function of a model that gives a number or a dict of numbers; None skips it.
        distill: imitate the original model in fine-tuning, besides the labels.
        example_inputs: as for `linearize.convert`, and what costs are counted for; None takes the first batch.
        include: as for `linearize.convert`: glob patterns of the sites that may be changed.
        exclude: likewise, of those that may not.
        dry_run: only plan: `Result.model` is the model that went in.
        sequential: refit each site once more behind those that are compressed already: a pass over the data for each.
        search: so many other plans around the chosen one are tried with the real loss, on four batches of the data, and
            those without blocks or whole modules; 0 keeps the plan of least predicted loss.
        uniform: keep equal widths in all sites of equal shape, as serving runtimes ask for; or glob patterns of sites.
        stock: take only options that leave ordinary layers: equal widths, no skip, no new bias; a transformers model
            then has a true config again (`linearize.zoo.stock_copy`).
        modules: whole modules, such as attention or a residual block, may become one linear map; not with `uniform` or
            `stock`, not under `activations=`, and none that holds an activation outside `include` and `exclude`.
        round_to: widths are multiples of this; None takes multiples of 8, finer at narrow sites. Lines in place, under
            `activations=`, change no width.
        when: with `linear`, as for `linearize.collapse`.
        batch_sizes: for latencies; None takes that of the data.
        rounds: measurements of each latency; 0 measures none, if the budget is no latency.
        cache: remember ratios of latencies in the user's cache folder, or in this file.
        checkpoint_dir: a folder for what an interrupted run has done: statistics after each pass over the data, and the
            checkpoints of fine-tuning. The same call goes on there; when it is done, they are removed.
        seed: of whatever is random; the global random state is put back afterwards.
        progress: False is silent, True shows bars on a terminal; a function also gets a line for each step.

    Returns:
        A `Result`: `.model`, `.plan`, `.report`. If the budget cannot be met, the model is the nearest one, and the
        report says so and what can be reached.

    Raises:
        UsageError: no budget or several, or an argument out of range.
        DataError: no batches, data that can be read once only, NaN, or labels missing for fine-tuning.
        LinearizeError: by any of the steps; the model is left as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
        >>> result = compress(net, [torch.randn(64, 8) for _ in range(8)], flops=0.5, rounds=0, progress=False)
        >>> result.report.outcome.met, result.report.after.flops <= 0.5 * result.report.before.flops
        (True, True)
    """
    check_call(model, evaluate, checkpoint_dir, seed)
    budget = read_budget(latency=latency, flops=flops, params=params, speedup=speedup, activations=activations)
    check_request(budget is not None, linear, plan, round_to=round_to, rounds=rounds, search=search)
    if dry_run and budget is None:
        raise UsageError(
            "dry_run", "found without a budget", "Pass one of latency, flops, params, speedup, activations."
        )
    options = training_options(finetune, gentle=linear is None)
    if stock:
        expect_stock(model)
    check_data(data)
    steps = Steps(progress)
    batches = some_batches(model, data)
    if options["epochs"] and not dry_run:
        check_training(model, data, options, distill)
    home = device_of(model)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with steps("convert"):
                example = batches[0] if example_inputs is None else example_inputs
                gated = convert(model, example, include=include, exclude=exclude)
            trainer = _trainer(data, steps, evaluate, model, distill)
            settings = (
                budget,
                linear,
                plan,
                options,
                seed,
                sequential,
                search,
                uniform,
                stock,
                modules,
                round_to,
                distill,
            )
            notes = _notes(checkpoint_dir, gated, data, settings, options, steps)
            job = Job(model, gated, data, example, steps, options, trainer, notes)
            if linear is not None:
                made = to_share(job, linear, when)
            else:
                how = How(
                    seed, max(3, rounds), batch_sizes, round_to, uniform, cache, sequential, stock, search, modules
                )
                made = to_budget(job, budget, plan, how, dry_run=dry_run)
        if dry_run:
            costs = cost(model, example)
            report = Report({}, summary(gated), costs, costs, None, None, seconds=steps.seconds)
            return Result(model, made.plan, replace(report, **made.told))
        models = {"before": model, "gated": made.gated, "collapsed": made.small}
        report = _report(models, batches, example, evaluate, batch_sizes, rounds, steps, made.history)
        notes.forget()
        if stock:
            prove_stock(made.small, example)
        return Result(made.small, made.plan, replace(report, **made.told))
    finally:
        model.to(home)


def _notes(
    folder: str | os.PathLike[str] | None,
    gated: nn.Module,
    data: Iterable[Any],
    settings: Any,
    options: dict[str, Any],
    steps: Steps,
) -> Notes:
    """Where an interrupted run goes on; tells fine-tuning, too. Statistics are good for any budget, training is not."""
    if folder is None:
        return NOTHING
    facts = facts_of(data)
    key = fingerprint(gated, facts)
    own = Path(folder) / f"unfinished-{key[:12]}"  # the folder may hold other things
    others = [path.name for path in sorted(Path(folder).glob("unfinished-*")) if path != own]
    if others and not own.exists():
        steps.say(f"  nothing to resume: {', '.join(others)} in {folder} is of other weights or other data")
    if options["epochs"] and "checkpoint_dir" not in options:
        place = f"training-{fingerprint(gated, facts, *map(_told, settings))[:12]}"
        options |= {"checkpoint_dir": own / place, "resume": True}
    return Notes(own, key)


def _told(value: Any) -> str:
    """A setting as text that is the same in every process: without the address of a function or an object."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_told(entry)}" for name, entry in sorted(value.items()))
    name = getattr(value, "__qualname__", type(value).__name__)
    return name if callable(value) or " at 0x" in repr(value) else repr(value)


def _trainer(
    data: Iterable[Any], steps: Steps, evaluate: Evaluate | None, model: nn.Module, distill: bool
) -> Callable[..., list[dict[str, float]]]:
    """A function that fine-tunes a gated model with a prior, and gives the history."""

    def run(gated: nn.Module, prior: Any, options: Mapping[str, Any]) -> list[dict[str, float]]:
        chosen = {name: value for name, value in options.items() if name != "gradual"}
        if not isinstance(data, Sized):
            chosen.setdefault("steps_per_epoch", sum(1 for _ in data))
        teacher = model if distill else None
        found = train(
            gated,
            data,
            prior=prior,
            teacher=teacher,
            evaluate=evaluate,
            progress=steps.bars,
            on_epoch=steps.epoch,
            **chosen,
        )
        return found.history

    return run


def _report(
    models: Mapping[str, nn.Module],
    batches: list[Any],
    example: Any,
    evaluate: Evaluate | None,
    batch_sizes: Sequence[int] | None,
    rounds: int,
    steps: Steps,
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
            timing = benchmark(pair, example, rounds=rounds, batch_sizes=batch_sizes, progress=steps.say)
    costs = [cost(model, example) for model in (before, after)]
    return Report(quality, summary(gated), costs[0], costs[1], verification, timing, history, steps.seconds)


def _scores(model: nn.Module, evaluate: Evaluate | None) -> dict[str, float]:
    if evaluate is None:
        return {}
    if not callable(evaluate):
        return evaluate_batches(model, evaluate)
    with evaluating(model):
        found = evaluate(model)
    return {name: float(v) for name, v in found.items()} if isinstance(found, Mapping) else {"score": float(found)}

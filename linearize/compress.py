"""The main job in one call: gates, calibration, a plan for a budget, fine-tuning, collapsing, and proof of it all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from linearize.bench import benchmark
from linearize.convert import UNSELECTED, convert
from linearize.cost import cost
from linearize.finetune import finetune as train
from linearize.graph.state import same_modes
from linearize.plan import Plan, When
from linearize.planning.by_budget import to_budget
from linearize.planning.by_share import to_share
from linearize.planning.job import Job, Made
from linearize.planning.request import Request, check_inputs, check_output, check_training, some_batches
from linearize.planning.resume import NOTHING, Notes, facts_of, fingerprint
from linearize.report.compression import Report
from linearize.running.batches import Reading
from linearize.running.devices import bring, device_of, staying
from linearize.running.order import Repeated
from linearize.running.outputs import Choice
from linearize.running.randomness import randomness_kept, seed_everything
from linearize.running.steps import Steps
from linearize.storage.folders import make_folder
from linearize.storage.lock import alone_in
from linearize.summary import summary
from linearize.training.losses import Evaluate, scores_of
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


@same_modes()
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
    output: Choice = None,
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
        output: the parts of the output that count, in plans, measured losses and fine-tuning, such as "logits" or
            ["boxes*"], or a dict of these with weights, or with kinds ("classes", "multilabel", "values"); None takes
            every floating tensor, in equal shares (docs/compress.md).
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

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
        >>> result = compress(net, [torch.randn(64, 8) for _ in range(8)], flops=0.5, rounds=0, progress=False)
        >>> result.report.outcome.met, result.report.after.flops <= 0.5 * result.report.before.flops
        (True, True)
    """
    request = Request(
        latency=latency, flops=flops, params=params, speedup=speedup, activations=activations, linear=linear, plan=plan,
        finetune=finetune, evaluate=evaluate, distill=distill, example_inputs=example_inputs, include=include,
        exclude=exclude, dry_run=dry_run, sequential=sequential, search=search, uniform=uniform, stock=stock,
        modules=modules, output=output, round_to=round_to, when=when, batch_sizes=batch_sizes, rounds=rounds,
        cache=cache, checkpoint_dir=checkpoint_dir, seed=seed, progress=progress,
    )  # fmt: skip
    result, notes = carried_out(model, data, request)
    notes.forget()
    return result


def carried_out(model: nn.Module, data: Iterable[Any], request: Request) -> tuple[Result, Notes]:
    """What a request to compress a model gives, and the notes of it, to be forgotten once the result is safe.

    Raises:
        LinearizeError: as for `compress`.
    """
    check_inputs(model, data)
    if request.stock:
        expect_stock(model)
    steps, repeated = Steps(progress=request.progress), Repeated(data, request.seed)
    with ExitStack() as around:
        around.enter_context(staying(model))
        around.enter_context(randomness_kept())
        around.callback(repeated.restore)
        reading = Reading(model, repeated, request.output)
        batches = some_batches(model, reading)
        if request.output is not None:
            check_output(model, reading)
        if request.training["epochs"] and not request.dry_run:
            check_training(model, reading, request.training, distill=request.distill)
        with steps("convert"):
            example = batches[0] if request.example_inputs is None else request.example_inputs
            gated = convert(model, example, include=request.include, exclude=request.exclude)
        notes = _notes(request, gated, reading, steps)
        if notes.folder is not None:
            make_folder(notes.folder)
            around.enter_context(alone_in(notes.folder, "checkpoint_dir"))
        trainer = _trainer(repeated, steps, request, model)
        job = Job(model, gated, reading, example, steps, request.training, trainer, notes)
        made = to_budget(job, request) if request.linear is None else to_share(job, request.linear, request.when)
        if request.dry_run:
            costs = cost(model, example)
            report = Report({}, summary(gated), costs, costs, None, None, seconds=steps.seconds)
            return _result(model, made, report), NOTHING
        models = {"before": model, "gated": made.gated, "collapsed": made.small}
        seed_everything(request.seed)
        report = _report(models, batches, example, request, steps, made.history)
        if request.stock:
            prove_stock(made.small, example)
        return _result(made.small, made, report), notes


def _result(model: nn.Module, made: Made, report: Report) -> Result:
    """All of it, with what the plan tells."""
    told = replace(report, kept=_kept(report, made.plan), plan=made.plan.sha256, **made.told)
    return Result(model, made.plan, told)


def _notes(request: Request, gated: nn.Module, reading: Reading, steps: Steps) -> Notes:
    """Where an interrupted run goes on. Statistics are good for any request; plan and training are for the same one."""
    trained_in = request.training.get("checkpoint_dir") if request.training["epochs"] else None
    if request.checkpoint_dir is None and trained_in is None:
        return NOTHING
    # What errors cost depends on the parts of the output that count.
    facts = [*facts_of(reading.data), reading.meaning.weights, reading.meaning.kinds]
    key = fingerprint(gated, facts, request.seed)
    whole = fingerprint(gated, facts, request.key)
    beside = None if trained_in is None else Path(trained_in)
    if request.checkpoint_dir is None:
        return Notes(None, key, whole, beside)
    own = Path(request.checkpoint_dir) / f"unfinished-{key[:12]}"  # the folder may hold other things
    others = [path.name for path in sorted(own.parent.glob("unfinished-*")) if path != own]
    if others and not own.exists():
        steps.say(f"  nothing to resume: {', '.join(others)} in {own.parent} is of other weights or other data")
    return Notes(own, key, whole, beside)


def _trainer(data: Repeated, steps: Steps, request: Request, model: nn.Module) -> Callable[..., list[dict[str, float]]]:
    """A function that fine-tunes a gated model with a prior, and gives the history."""

    def run(gated: nn.Module, prior: Any, options: Mapping[str, Any]) -> list[dict[str, float]]:
        chosen = {name: value for name, value in options.items() if name != "gradual"}
        chosen.setdefault("steps_per_epoch", len(data))
        data.start()  # as if nothing had been drawn before
        found = train(
            gated,
            data.data,
            prior=prior,
            teacher=model if request.distill else None,
            evaluate=request.evaluate,
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
    request: Request,
    steps: Steps,
    history: list[dict[str, float]],
) -> Report:
    """Everything measured about the three models, all on the device of the gated one."""
    before, gated, after = models["before"], models["gated"], models["collapsed"]
    bring(before, device_of(gated))
    with steps("verify"):
        verification = verify(gated, after, batches)
    quality: dict[str, dict[str, float]] = {}
    with steps("evaluate"):
        for stage, model in models.items():
            for name, value in ({} if request.evaluate is None else scores_of(model, request.evaluate)).items():
                quality.setdefault(name, {})[stage] = value
    timing = None
    if request.rounds:
        with steps("benchmark"):
            pair = {"original": before, "collapsed": after}
            timing = benchmark(
                pair, example, rounds=request.rounds, batch_sizes=request.batch_sizes, progress=steps.say
            )
    costs = [cost(model, example) for model in (before, after)]
    return Report(quality, summary(gated), costs[0], costs[1], verification, timing, history, steps.seconds)


def _kept(report: Report, plan: Plan) -> dict[str, str]:
    """The sites that stay for another reason than their loss, in the plan or without a gate."""
    planned = {site.site for site in plan.sites}
    found = {site.site: site.reason for site in plan.sites if site.reason}
    ungated = {site.name: site.reason for site in report.summary.sites if not site.gated and site.reason}
    found |= {name: why for name, why in ungated.items() if why not in UNSELECTED and not _inside(name, planned)}
    return found


def _inside(name: str, planned: set[str]) -> bool:
    """True if the site, or a module around it, became something else by the plan."""
    return any(name == path or name.startswith(f"{path}.") for path in planned)

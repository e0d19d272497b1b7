"""One compression, from the request to the result: everything around the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from linearize.compare import kept_sites, report_of
from linearize.convert import converted
from linearize.cost import cost
from linearize.export.fit import expect_fit, prove_fit
from linearize.export.runtimes import runtime_of
from linearize.finetune import finetune as train
from linearize.plan import Plan
from linearize.planning.by_budget import to_budget
from linearize.planning.by_gates import by_gates
from linearize.planning.by_share import to_share
from linearize.planning.first_batches import (
    check_inputs,
    check_output,
    check_served,
    check_training_data,
    some_batches,
)
from linearize.planning.job import Job, Made
from linearize.planning.request import Request
from linearize.planning.resume import NOTHING, ResumeStore, facts_of, fingerprint
from linearize.report.compression import Report
from linearize.report.versions import versions
from linearize.running.batches import ReadData
from linearize.running.devices import staying
from linearize.running.order import Repeated
from linearize.running.processes import place, same_model
from linearize.running.randomness import randomness_kept, seed_everything
from linearize.running.steps import Steps
from linearize.storage.folders import make_folder
from linearize.storage.lock import alone_in
from linearize.summary import summary

__all__ = ["Result", "carried_out", "check_request"]


@dataclass(frozen=True)
class Result:
    """The result of `compress`.

    Attributes:
        model: the collapsed model: same class, no gates, in eval mode. After a dry run: the model that you passed.
        plan: what happened, or would happen, to every channel.
        report: quality, cost and latency before and after, and whether the budget is met.
    """

    model: nn.Module
    plan: Plan
    report: Report


def carried_out(model: nn.Module, data: Iterable[Any], request: Request) -> tuple[Result, ResumeStore]:
    """Carry out a request. Gives the result, and the store of the run, to be deleted once the result is stored.

    Raises:
        LinearizeError: as for `compress`.
    """
    check_inputs(model, data)
    expect_fit(model, stock=request.stock, target=request.target)
    runtime = None if request.runtime is None else runtime_of(request.runtime)
    steps, repeated = Steps(progress=request.progress), Repeated(data, request.seed)
    with ExitStack() as around:
        around.enter_context(staying(model))
        around.enter_context(randomness_kept())
        around.callback(repeated.restore)
        reading = ReadData(model, repeated, request.output)
        batches = some_batches(model, reading)
        if request.output is not None:
            check_output(model, reading)
        if request.training["epochs"] and not request.dry_run:
            check_training_data(model, reading, request.training, distill=request.distill)
        example = batches[0] if request.example_inputs is None else request.example_inputs
        check_served(model, example, request)
        with steps("convert"):
            gated = converted(model, example, request.include, request.exclude)
        same_model(gated)
        store = _store(request, gated, reading, steps) if place()[0] == 0 else NOTHING  # the first process writes files
        if store.folder is not None:
            make_folder(store.folder)
            around.enter_context(alone_in(store.folder, "checkpoint_dir"))
        trainer = _trainer(repeated, steps, request, model)
        job = Job(model, gated, reading, example, steps, request.training, trainer, store, runtime)
        if request.linear is not None:
            made = to_share(job, request.linear, request.when)
        else:
            made = to_budget(job, request) if request.method == "plan" else by_gates(job, request)
        if request.dry_run:
            costs = cost(model, example)
            report = Report({}, summary(gated), costs, costs, None, None, seconds=steps.seconds)
            return _result(model, made, report), NOTHING
        models = {"before": model, "gated": made.gated, "collapsed": made.small}
        seed_everything(request.seed)
        report = report_of(models, batches, example, request, steps, made.history, runtime)
        prove_fit(made.small, example, stock=request.stock, target=request.target)
        return _result(made.small, made, report), store


def check_request(model: nn.Module, data: Iterable[Any], request: Request) -> None:
    """Check, before any training, that the target format and the serving budget suit the model.

    Raises:
        LinearizeError: a format cannot hold it, or it cannot be served as a budget asks.
    """
    expect_fit(model, stock=request.stock, target=request.target)
    if not request.served:
        return
    repeated = Repeated(data, request.seed)
    with randomness_kept():
        try:
            check_served(model, some_batches(model, ReadData(model, repeated, request.output))[0], request)
        finally:
            repeated.restore()


def _result(model: nn.Module, made: Made, report: Report) -> Result:
    """All of it, with what the plan tells."""
    about: dict[str, Any] = {"planned": made.plan, "model": type(model).__name__, "versions": versions()}
    told = replace(report, kept=kept_sites(report, made.plan), plan=made.plan.sha256, **about, **made.told)
    return Result(model, made.plan, told)


def _store(request: Request, gated: nn.Module, reading: ReadData, steps: Steps) -> ResumeStore:
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
        return ResumeStore(None, key, whole, beside)
    own = Path(request.checkpoint_dir) / f"unfinished-{key[:12]}"  # the folder may hold other things
    others = [path.name for path in sorted(own.parent.glob("unfinished-*")) if path != own]
    if others and not own.exists():
        steps.say(f"  nothing to resume: {', '.join(others)} in {own.parent} is of other weights or other data")
    return ResumeStore(own, key, whole, beside)


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

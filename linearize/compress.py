"""The main function: gates, calibration, a plan for a budget, fine-tuning, collapsing, and a report that proves it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from linearize.compare import kept_sites, report_of
from linearize.convert import converted
from linearize.cost import cost
from linearize.data.text import read_if_text
from linearize.data.text_quality import quality_of
from linearize.export.fit import expect_fit, prove_fit
from linearize.export.runtimes import runtime_of
from linearize.finetune import finetune as train
from linearize.graph.state import same_modes
from linearize.plan import Plan, When
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
from linearize.planning.request import Method, Request
from linearize.planning.resume import NOTHING, Notes, facts_of, fingerprint
from linearize.report.compression import Report
from linearize.report.versions import versions
from linearize.running.batches import Reading
from linearize.running.devices import staying
from linearize.running.order import Repeated
from linearize.running.outputs import Choice
from linearize.running.processes import place, same_model
from linearize.running.randomness import randomness_kept, seed_everything
from linearize.running.steps import Steps
from linearize.storage.folders import make_folder
from linearize.storage.lock import alone_in
from linearize.summary import summary
from linearize.training.losses import Evaluate

__all__ = ["Result", "compress"]


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


@same_modes()
def compress(
    model: nn.Module,
    data: Iterable[Any] | os.PathLike[str],
    *,
    latency: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    speedup: float | None = None,
    activations: float | None = None,
    decode: float | None = None,
    prefill: float | None = None,
    memory: float | None = None,
    serving: tuple[int, int] | None = None,
    linear: float | None = None,
    plan: Plan | None = None,
    finetune: int | Mapping[str, Any] | None = None,
    method: Method = "plan",
    candidates: int = 1,
    evaluate: Evaluate | None = None,
    tokenizer: Any = None,
    context: int | None = None,
    column: str | None = None,
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
    target: str | None = None,
    runtime: Any = None,
    modules: bool = True,
    families: Sequence[str] | None = None,
    round_to: int | None = None,
    when: When = "cheaper",
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 15,
    cache: bool | Path = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | Callable[[str], None] = True,
) -> Result:
    """Make a model smaller, to a budget, so that its output changes as little as possible, and report the result.

    For each site, the options are: keep it; drop channels and refit the next layer by least squares; the same with a
    linear skip of some rank beside; replace it by one linear map. Whole modules, such as attention or a residual block,
    may become one linear map, too. Costs are counted or measured. Losses are predicted from the sensitivity of the
    model's output. The best choice within the budget is taken (docs/compress.md). Choosing and refitting are
    approximate, and their loss is measured. Folding afterwards is exact.

    Args:
        model: a trained model. It is not changed.
        data: batches that can be read several times: tensors, tuples (inputs, labels) or dicts of keyword
            arguments. Labels are needed for fine-tuning only. Or text: a .txt, .jsonl or .parquet file, a folder of
            them, a data set with columns, or a list of texts (docs/language.md). A tenth of it is held back.
        latency: budget: fraction in (0, 1] of the original's measured latency.
        flops: budget: fraction of its FLOPs.
        params: budget: fraction of its parameters.
        speedup: budget: a factor of at least 1; the same as `latency=1 / speedup`.
        activations: budget: fraction of its nonlinear unit evaluations.
        decode: budget of a model that generates: a factor of at least 1 by which it writes more tokens per second.
        prefill: budget: fraction of its time to the first token.
        memory: budget: fraction of the bytes of its weights and its cache.
        serving: the batch size and the context at which these three count. None takes one text of the data's length.
        linear: instead of a budget: share of all gated channels that become linear, in (0, 1].
        plan: instead of a budget: a plan that `compress` made for this model, to carry out again, perhaps edited.
        finetune: number of epochs, or keyword arguments of `linearize.finetune`; None trains nothing. With `gradual`,
            a share of the steps, the model moves to the planned state during these steps; 0, the default, starts there.
            With a budget or a plan, the default learning rate is 3e-4.
        method: what decides for a budget: "plan" (closed forms, before training), "gates" (channels go during
            training, under a prior on what they cost), or "both" (training starts in the plan's state, and moves
            channels between sites). The last two need `finetune`.
        candidates: number of plans of different kinds (only widths, with blocks, with whole modules, everything) that
            are trained for a tenth of the steps each before one is taken (docs/compress.md). 1 compares none.
        evaluate: test batches, or a function of a model that gives a number or a dict of numbers; None skips it, or,
            with text, gives the perplexity and the agreement with the original on the part that is held back.
        tokenizer: with text: a tokenizer, or the path of one. None takes the one in the model's folder.
        context: with text: number of tokens in a block. None takes 512, or fewer if the model is made for fewer.
        column: with text: the column that holds it. None takes "text", or the only column of strings.
        distill: fine-tuning imitates the original model, in addition to the labels.
        output: the parts of the output that count, in plans, measured losses and fine-tuning, such as "logits" or
            ["boxes*"], or a dict of these with weights, or with kinds ("classes", "multilabel", "values"); None takes
            every floating tensor, equally weighted (docs/compress.md).
        example_inputs: as for `linearize.convert`. Costs are counted for them. None takes the first batch.
        include: glob patterns of the sites that may be changed, as for `linearize.convert`.
        exclude: glob patterns of the sites that may not be changed.
        dry_run: only make a plan. `Result.model` is the model that you passed.
        sequential: refit each site once more on the inputs behind the compressed sites; a pass over the data for each.
        search: number of other plans that are tried with the real loss, on four batches of the data, in addition to
            those without blocks or whole modules; 0 keeps the plan of least predicted loss.
        uniform: keep equal widths in all sites of equal shape, as serving runtimes need; or glob patterns of sites.
        stock: take only options that leave ordinary layers: equal widths, no skip, no new bias. A transformers model
            then has a correct config again (`linearize.zoo.stock_copy`).
        target: a format of `linearize.export`, such as "gguf": take only options that it can hold (docs/deploy.md).
        runtime: where latencies are measured: "onnxruntime" or "openvino", or a function of your own
            (docs/deploy.md). The original and each smaller model, and the layers of options, are exported for it. None
            measures in PyTorch.
        modules: whole modules, such as attention or a residual block, may become one linear map. Not with `uniform`,
            `stock` or `activations=`, and not if a module holds an activation that `include` or `exclude` leave out.
        families: the kinds of replacement that may be chosen: "channels", "blocks", "lines", "heads", "experts",
            "modules", "attention", "depth". None takes all.
        round_to: widths are multiples of this; None takes multiples of 8, and smaller ones at narrow sites. It does
            not apply to channels that only follow their line (`activations=`).
        when: with `linear`, as for `linearize.collapse`.
        batch_sizes: for latencies; None takes that of the data.
        rounds: measurements of each latency; 0 measures none, unless the budget is a latency.
        cache: store ratios of latencies in the user's cache folder, or in this file, and use them again.
        checkpoint_dir: a folder for statistics after each pass over the data and for checkpoints of fine-tuning. If
            the run is interrupted, the same call continues there. At the end these files are removed.
        seed: of everything random. The global random state is restored afterwards.
        progress: False is silent. True shows bars on a terminal. A function also gets a line of text for each step.

    Returns:
        A `Result` with `.model`, `.plan` and `.report`. If the budget cannot be met, the model is the nearest one. The
        report says so, and what can be reached.

    Raises:
        UsageError: no budget, budgets that contradict each other, or an argument out of range.
        DataError: no batches, data that can be read only once, NaN, or missing labels for fine-tuning.
        LinearizeError: one of the steps failed. The model is not changed.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
        >>> result = compress(net, [torch.randn(64, 8) for _ in range(8)], flops=0.5, rounds=0, progress=False)
        >>> result.report.outcome.met, result.report.after.flops <= 0.5 * result.report.before.flops
        (True, True)
    """
    request = Request(
        latency=latency, flops=flops, params=params, speedup=speedup, activations=activations,
        decode=decode, prefill=prefill, memory=memory, serving=serving, linear=linear, plan=plan,
        finetune=finetune, method=method, candidates=candidates, evaluate=evaluate, distill=distill,
        example_inputs=example_inputs, include=include, exclude=exclude, dry_run=dry_run, sequential=sequential,
        search=search, uniform=uniform, stock=stock, target=target, runtime=runtime, modules=modules, families=families,
        output=output, round_to=round_to, when=when, batch_sizes=batch_sizes, rounds=rounds, cache=cache,
        checkpoint_dir=checkpoint_dir, seed=seed, progress=progress,
    )  # fmt: skip
    source = read_if_text(
        data,
        model,
        tokenizer=tokenizer,
        context=context,
        column=column,
        labels=bool(request.training["epochs"]),
        seed=seed,
    )
    if source is not None:
        data = source.train
        if request.evaluate is None:
            request = replace(request, evaluate=quality_of(model, source))
    result, notes = carried_out(model, cast("Iterable[Any]", data), request)
    notes.forget()
    return result


def carried_out(model: nn.Module, data: Iterable[Any], request: Request) -> tuple[Result, Notes]:
    """Carry out a request. Gives the result, and the notes of the run, to be deleted once the result is stored.

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
        reading = Reading(model, repeated, request.output)
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
        notes = _notes(request, gated, reading, steps) if place()[0] == 0 else NOTHING  # the first process writes files
        if notes.folder is not None:
            make_folder(notes.folder)
            around.enter_context(alone_in(notes.folder, "checkpoint_dir"))
        trainer = _trainer(repeated, steps, request, model)
        job = Job(model, gated, reading, example, steps, request.training, trainer, notes, runtime)
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
        return _result(made.small, made, report), notes


def _result(model: nn.Module, made: Made, report: Report) -> Result:
    """All of it, with what the plan tells."""
    about: dict[str, Any] = {"planned": made.plan, "model": type(model).__name__, "versions": versions()}
    told = replace(report, kept=kept_sites(report, made.plan), plan=made.plan.sha256, **about, **made.told)
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

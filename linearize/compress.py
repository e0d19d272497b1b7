"""The main function: gates, calibration, a plan for a budget, fine-tuning, collapsing, and a report that proves it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from linearize.compression import Result, carried_out
from linearize.data.text import read_if_text
from linearize.data.text_quality import quality_of
from linearize.graph.state import same_modes
from linearize.plan import Plan, When
from linearize.planning.request import Method, Request
from linearize.running.outputs import OutputChoice
from linearize.training.losses import Evaluate

__all__ = ["Result", "compress"]


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
    output: OutputChoice = None,
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
    result, store = carried_out(model, cast("Iterable[Any]", data), request)
    store.forget()
    return result

"""`linearize compress MODEL --data DATA --flops 0.5 --out DIR`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from linearize import checks, zoo
from linearize.checkpoint import save
from linearize.cli import blockwise, common
from linearize.cli.opened import folder_for, is_random, opened, output_parts, required
from linearize.cli.text import ColumnOption, ContextOption, TokenizerOption, evaluation_of, pair_of
from linearize.compression import Result, carried_out, check_request
from linearize.data.documents import is_text
from linearize.errors import UsageError
from linearize.finetune import finetune
from linearize.planning.request import Request
from linearize.planning.resume import facts_of, fingerprint
from linearize.running.order import Repeated
from linearize.storage.folders import clear, write_text
from linearize.training.state import EPOCH_FILE

__all__ = ["compress"]

_SHARE = 0.6  # of linear channels, where nothing else is asked for
_RATE = 1e-3  # of training before
_REPORTS = "report.json", "report.html"
_EPOCHS = 10
_TRAIN_FIRST = 15  # epochs for a model that comes with random weights


def compress(
    model: common.Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="digits, a folder with idx .gz files, a folder with one subfolder of images per class, or text: "
            "a .txt, .jsonl or .parquet file, or a folder of these. With --engine blockwise also a .safetensors file "
            "with the inputs by name.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the models, the plan and the report.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Budget: fraction of the original's measured latency, such as 0.7.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Budget: how many times as fast, measured, such as 1.5.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: fraction of the original's FLOPs.")] = None,
    params: Annotated[float | None, typer.Option(help="Budget: fraction of the original's parameters.")] = None,
    activations: Annotated[
        float | None, typer.Option(help="Budget: fraction of the original's nonlinear unit evaluations.")
    ] = None,
    decode: Annotated[
        float | None, typer.Option(help="Budget: how many times as many tokens per second it writes, such as 1.5.")
    ] = None,
    prefill: Annotated[
        float | None, typer.Option(help="Budget: fraction of the original's time to the first token.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Budget: fraction of the bytes of the original's weights and cache.")
    ] = None,
    serving: Annotated[
        str | None,
        typer.Option(metavar="B,T", help="Batch size and context for these three. Default: 1 and the data's length."),
    ] = None,
    linear: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: share of channels that become linear. 0.6 if there is no budget."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Epochs of fine-tuning. 0 skips it. Default: 10, or 0 for text and a budget."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="plan|gates|both",
            help="What decides for a budget: a plan before training, gates during training, or gates from the plan on.",
        ),
    ] = "plan",
    candidates: Annotated[
        int,
        typer.Option(min=1, help="Plans of different kinds to train for a tenth of the epochs, to take one."),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only make a plan: show the options and the choice.")
    ] = False,
    uniform: Annotated[bool, typer.Option("--uniform", help="Keep equal widths in all layers of equal shape.")] = False,
    target: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Use only what this format of `linearize export` can hold.")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure latencies in onnxruntime or openvino. Default: in PyTorch."),
    ] = None,
    stock: Annotated[
        bool,
        typer.Option(
            "--stock",
            help="Use ordinary layers only. A transformers model is also saved as a folder for from_pretrained.",
        ),
    ] = False,
    train: Annotated[
        int | None,
        typer.Option(min=0, help="Epochs of training before compressing. Default: 15 for random weights, else 0."),
    ] = None,
    modules: Annotated[bool, typer.Option(help="Whole modules, such as attention, may become one linear map.")] = True,
    family: Annotated[
        list[str] | None,
        typer.Option(help="A kind of replacement that may be chosen, such as heads. Default: all. Can be repeated."),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART[=WEIGHT]",
            help="A part of the output that counts: logits, 'boxes*' or depth=2. Default: all. Can be repeated.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help="whole, or blockwise: an hf:FOLDER from disk to disk, with one of its blocks in memory at a time.",
        ),
    ] = "whole",
    search: Annotated[int, typer.Option(min=0, help="Number of other plans to try with the real loss.")] = 16,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. Default: 1e-3, or 3e-4 with a budget.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Number of images (default 64) or blocks of text (8) in a batch.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this number of images or blocks.")] = None,
    tokenizer: TokenizerOption = None,
    context: ContextOption = None,
    column: ColumnOption = None,
    model_arg: common.ModelArgument = None,
    pretrained: common.PretrainedOption = None,
    seed: common.SeedOption = 0,
    json: common.JsonOption = False,
) -> None:
    """Compress a model to a budget, and save the smaller model, the plan and a report.

    Without a budget, 60% of the channels become linear. A model with random weights is trained on the data first. If
    the command is interrupted, give it again to continue.

    Example: [bold]linearize compress timm:test_vit -a img_size=32 --data digits --flops 0.6 --out runs/vit[/bold]
    """
    decides: Any = method  # Request says so if it is none
    budgets: dict[str, Any] = {
        "latency": latency,
        "speedup": speedup,
        "flops": flops,
        "params": params,
        "activations": activations,
        "decode": decode,
        "prefill": prefill,
        "memory": memory,
    }
    if checks.choice("--engine", engine, ("whole", "blockwise")) == "blockwise":
        given = {name: value for name, value in {**budgets, "linear": linear}.items() if value is not None}
        told = {
            "dry-run": dry_run, "train": train, "target": target, "family": family, "output": output, "lr": lr,
            "method": method != "plan", "candidates": candidates > 1, "runtime": runtime, "serving": serving,
        }  # fmt: skip
        blockwise.run(
            model, data, folder_for(required(out)), given, stock=stock, batch=batch, seed=seed, json=json,
            reading={"tokenizer": tokenizer, "context": context, "column": column},
            refused=[name for name, value in told.items() if value], size=size, limit=limit,
        )  # fmt: skip
        return
    if linear is None and all(value is None for value in budgets.values()):
        linear = _SHARE
    if linear is not None and dry_run:
        raise UsageError("--dry-run", "found without a budget", "Pass --flops 0.5, or another budget.")
    unfinished = None if out is None or dry_run else out / "unfinished"
    parts = output_parts(output)
    trains = method in ("gates", "both") or candidates > 1
    if epochs is None:
        epochs = 0 if is_text(data) and linear is None and not trains else _EPOCHS
    if trains and not epochs:
        found = f"found 0 with --method {method}" if candidates == 1 else f"found 0 with --candidates {candidates}"
        raise UsageError("--epochs", found, "Pass --epochs 10, or another number: it is decided in training.")
    with common.named_as_typed():
        request = Request(
            **budgets, serving=pair_of(serving), linear=linear,
            dry_run=dry_run, uniform=uniform, stock=stock, target=target, runtime=runtime,
            modules=modules, families=family or None, output=parts,
            search=search, method=decides, candidates=candidates,
            finetune={"epochs": epochs, **({} if lr is None else {"lr": lr})} if epochs else None,
            seed=seed, progress=common.say,
        )  # fmt: skip
    if not dry_run:
        required(out)
    folder = None if out is None else folder_for(out)
    sizes: dict[str, Any] = {"batch": batch, "size": size, "limit": limit}
    first = train if train is not None else (_TRAIN_FIRST if is_random(model, pretrained) else 0)
    reading = {"tokenizer": tokenizer, "context": context, "column": column}
    network, source = opened(
        model, data, model_arg, pretrained, parts, reading, seed=seed, labels=bool(first or epochs), **sizes
    )
    evaluate = evaluation_of(network, source)
    trained_in: Path | None = None
    if first:
        check_request(network, source.train, request)
        common.say(f"train {first} epochs first: the weights are random" if train is None else f"train {first} epochs")
        rate = _RATE if lr is None else lr
        facts = facts_of(Repeated(source.train, seed))
        key = fingerprint(
            network, facts, {"seed": seed, "data": data, "epochs": first, "lr": rate, "output": parts} | sizes | reading
        )
        trained_in = None if unfinished is None else unfinished / f"first-{key[:12]}"
        torch.manual_seed(seed)
        finetune(
            network, source.train, epochs=first, lr=rate, output=parts, evaluate=evaluate, on_epoch=_tell,
            checkpoint_dir=trained_in, resume=trained_in is not None,
        )  # fmt: skip
    result, store = carried_out(network, source.train, replace(request, evaluate=evaluate, checkpoint_dir=unfinished))
    if folder is not None:
        _write(folder, network, result, dry_run=dry_run)
        if stock and not dry_run and hasattr(result.model, "save_pretrained"):
            zoo.stock_copy(result.model).save_pretrained(folder / "stock")  # type: ignore[operator]
    if trained_in is not None:  # only now that the results are safe, and only what is ours
        clear(trained_in, [EPOCH_FILE])
    store.forget()
    _show(result, folder, dry_run=dry_run, json=json)


def _show(result: Result, folder: Path | None, *, dry_run: bool, json: bool) -> None:
    if json:
        where = {} if folder is None or dry_run else {"model": str(folder / "compressed.safetensors")}
        common.print_json({**where, **result.report.to_dict()})
        return
    for table in result.report.options.values() if dry_run else ():
        typer.echo(f"{table}\n")
    typer.echo(str(result.report))
    if folder is not None:
        names = ["plan.json", *_REPORTS, *([] if dry_run else ["original.safetensors", "compressed.safetensors"])]
        typer.echo(f"written to {folder}: {', '.join(names)}")


def _tell(record: dict[str, float]) -> None:
    told = [f"{name} {record[name]:.4f}" for name in ("loss", "accuracy", "perplexity") if name in record]
    common.say(f"  epoch {record['epoch']:.0f}, {', '.join(told)}")


def _write(folder: Path, original: nn.Module, result: Result, *, dry_run: bool) -> None:
    if not dry_run:
        save(original, folder / "original.safetensors")
        save(result.model, folder / "compressed.safetensors")
    write_text(folder / "plan.json", result.plan.to_json() + "\n")
    for name in _REPORTS:
        result.report.save(folder / name)

"""`linearize compress MODEL --data DATA --flops 0.5 --out DIR`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from linearize import zoo
from linearize.checkpoint import save
from linearize.cli import common
from linearize.compress import Result, carried_out
from linearize.data import DataSource
from linearize.errors import UsageError
from linearize.finetune import finetune
from linearize.planning.request import Request
from linearize.planning.resume import facts_of, fingerprint
from linearize.running.models import evaluating
from linearize.running.order import Repeated
from linearize.running.outputs import Choice, Meaning, main_part
from linearize.storage.folders import clear, write_text
from linearize.training.state import EPOCH_FILE

__all__ = ["compress"]

_SHARE = 0.6  # of linear channels, where nothing else is asked for
_RATE = 1e-3  # of training before
_TRAIN_FIRST = 15  # epochs for a model that comes with random weights


def compress(
    model: common.Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="digits, a folder with idx .gz files, or a folder with one subfolder of images per class.",
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
    linear: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: share of channels that become linear. 0.6 if there is no budget."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning. 0 skips it.")] = 10,
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
    search: Annotated[int, typer.Option(min=0, help="Number of other plans to try with the real loss.")] = 16,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. Default: 1e-3, or 3e-4 with a budget.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of images in a batch.")] = 64,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this number of images.")] = None,
    model_arg: common.ModelArgument = None,
    pretrained: common.Pretrained = None,
    seed: common.Seed = 0,
    json: common.Json = False,
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
    }
    if linear is None and all(value is None for value in budgets.values()):
        linear = _SHARE
    if linear is not None and dry_run:
        raise UsageError("--dry-run", "found without a budget", "Pass --flops 0.5, or another budget.")
    if not epochs and (method in ("gates", "both") or candidates > 1):
        found = f"found 0 with --method {method}" if candidates == 1 else f"found 0 with --candidates {candidates}"
        raise UsageError("--epochs", found, "Pass --epochs 10, or another number: it is decided in training.")
    unfinished = None if out is None or dry_run else out / "unfinished"
    parts = _parts(output)
    with common.named_as_typed():
        request = Request(
            **budgets, linear=linear, dry_run=dry_run, uniform=uniform, stock=stock, target=target,
            modules=modules, families=family or None, output=parts,
            search=search, method=decides, candidates=candidates,
            finetune={"epochs": epochs, **({} if lr is None else {"lr": lr})} if epochs else None,
            seed=seed, progress=common.say,
        )  # fmt: skip
    if out is None and not dry_run:
        raise UsageError("--out", "is missing", "Pass a folder for the results, or --dry-run.")
    folder = None if out is None else _folder(out)
    sizes: dict[str, Any] = {"batch": batch, "size": size, "limit": limit}
    network, source = _open(model, data, model_arg, pretrained, parts, seed=seed, **sizes)
    first = train if train is not None else (_TRAIN_FIRST if _is_random(model, pretrained) else 0)
    trained_in: Path | None = None
    if first:
        common.say(f"train {first} epochs first: the weights are random" if train is None else f"train {first} epochs")
        rate = _RATE if lr is None else lr
        facts = facts_of(Repeated(source.train, seed))
        key = fingerprint(network, facts, seed, data, first, rate, parts, *sizes.values())
        trained_in = None if unfinished is None else unfinished / f"first-{key[:12]}"
        torch.manual_seed(seed)
        finetune(
            network, source.train, epochs=first, lr=rate, output=parts, evaluate=source.test, on_epoch=_tell,
            checkpoint_dir=trained_in, resume=trained_in is not None,
        )  # fmt: skip
    result, notes = carried_out(
        network, source.train, replace(request, evaluate=source.test, checkpoint_dir=unfinished)
    )
    if folder is not None:
        _write(folder, network, result, dry_run=dry_run)
        if stock and not dry_run and hasattr(result.model, "save_pretrained"):
            zoo.stock_copy(result.model).save_pretrained(folder / "stock")  # type: ignore[operator]
    if trained_in is not None:  # only now that the results are safe, and only what is ours
        clear(trained_in, [EPOCH_FILE])
    notes.forget()
    if json:
        where = {} if folder is None or dry_run else {"model": str(folder / "compressed.safetensors")}
        common.print_json({**where, **result.report.to_dict()})
        return
    for table in result.report.options.values() if dry_run else ():
        typer.echo(f"{table}\n")
    typer.echo(str(result.report))
    if folder is not None:
        names = ["plan.json", "report.json", *([] if dry_run else ["original.safetensors", "compressed.safetensors"])]
        typer.echo(f"written to {folder}: {', '.join(names)}")


def _parts(texts: list[str] | None) -> dict[str, float | str] | None:
    """Parts of the output, each with a weight, or with its kind."""
    found: dict[str, float | str] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        try:
            found[name] = float(value or 1)
        except ValueError:
            found[name] = value  # a kind, or nothing that the choice takes
    return found or None


def _folder(out: Path) -> Path:
    """The folder, made before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "Pass a folder that can be written."
        raise UsageError("--out", f"cannot make the folder {str(out)!r} ({error.strerror})", remedy) from error
    return out


def _open(
    spec: str,
    data: str,
    arguments: list[str] | None,
    pretrained: bool | None,
    parts: Choice,
    *,
    seed: int,
    **options: Any,
) -> tuple[nn.Module, DataSource]:
    """The model and its data; a new timm model gets as many classes as the data has."""
    network = common.open_model(spec, arguments, pretrained=pretrained, seed=seed)
    source = common.data_for(network, data, seed=seed, **options)
    given = [text.partition("=")[0] for text in arguments or []]
    if spec.startswith("timm:") and "num_classes" not in given:
        more = [*(arguments or []), f"num_classes={source.num_classes}"]
        network = common.open_model(spec, more, pretrained=pretrained, seed=seed)
    _check_classes(network, source, parts)
    return network, source


def _check_classes(network: nn.Module, source: DataSource, parts: Choice) -> None:
    with evaluating(network):
        batch = next(iter(source.test))
        names = source.test.keywords
        output = network(batch[0]) if names is None else network(**{names[0]: batch[names[0]]})
    Meaning.of(network, parts).parts(output)  # raises if there is no such part
    classes = main_part(output).tensor.shape[-1]
    if classes < source.num_classes:
        found = f"found {classes} outputs for {source.num_classes} classes"
        raise UsageError(type(network).__name__, found, f"Try -a num_labels={source.num_classes}, or other data.")


def _is_random(spec: str, pretrained: bool | None) -> bool:
    return (spec.startswith("timm:") and not pretrained) or pretrained is False


def _tell(record: dict[str, float]) -> None:
    common.say(f"  epoch {record['epoch']:.0f}, loss {record['loss']:.4f}, accuracy {record['accuracy']:.4f}")


def _write(folder: Path, original: nn.Module, result: Result, *, dry_run: bool) -> None:
    if not dry_run:
        save(original, folder / "original.safetensors")
        save(result.model, folder / "compressed.safetensors")
    write_text(folder / "plan.json", result.plan.to_json() + "\n")
    result.report.save(folder / "report.json")

"""`linearize compress MODEL --data DATA --linear 0.6 --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from linearize.checkpoint import save
from linearize.cli import common
from linearize.compress import Result
from linearize.compress import compress as compress_model
from linearize.data import DataSource
from linearize.errors import UsageError
from linearize.finetune import finetune
from linearize.running.models import evaluating
from linearize.training.losses import main_output

__all__ = ["compress"]

_TRAIN_FIRST = 15  # epochs for a model that comes with random weights


def compress(
    model: common.Model,
    data: Annotated[str, typer.Option(metavar="DATA", help="digits, a folder of idx .gz files, or of images.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the models and the report.")],
    linear: Annotated[float, typer.Option(help="Share of channels that shall be linear.")] = 0.6,
    epochs: Annotated[int, typer.Option(min=0, help="Of fine-tuning; 0 makes channels linear without any.")] = 10,
    train: Annotated[
        int | None, typer.Option(min=0, help="Epochs of training before; without: 15 for random weights, else 0.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 64,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many images.")] = None,
    model_arg: common.ModelArgument = None,
    pretrained: common.Pretrained = None,
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Make a share of a model's channels linear, fold them away, and save the smaller model.

    A model with random weights is trained on the data first.

    Example: [bold]linearize compress timm:test_vit -a img_size=32 --data digits --linear 0.6 --out runs/vit[/bold]
    """
    if not 0 < linear <= 1:
        raise UsageError("--linear", f"found {linear}", "Pass a share above 0 and up to 1.")
    folder = _folder(out)
    network, source = _open(model, data, model_arg, pretrained, batch=batch, size=size, limit=limit, seed=seed)
    first = train if train is not None else (_TRAIN_FIRST if _is_random(model, pretrained) else 0)
    if first:
        common.say(f"train {first} epochs first: the weights are random" if train is None else f"train {first} epochs")
        torch.manual_seed(seed)
        finetune(network, source.train, epochs=first, lr=lr, evaluate=source.test, on_epoch=_tell)
    result = compress_model(
        network,
        source.train,
        linear=linear,
        finetune={"epochs": epochs, "lr": lr} if epochs else None,
        evaluate=source.test,
        seed=seed,
        progress=common.say,
    )
    _write(folder, network, result)
    if json:
        common.print_json({"model": str(folder / "compressed.safetensors"), **result.report.to_dict()})
    else:
        typer.echo(str(result.report))
        typer.echo(f"written: {folder / 'original.safetensors'}, compressed.safetensors, plan.json, report.json")


def _folder(out: Path) -> Path:
    """The folder, made before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "Pass a folder that can be written."
        raise UsageError("--out", f"cannot make the folder {str(out)!r} ({error.strerror})", remedy) from error
    return out


def _open(
    spec: str, data: str, arguments: list[str] | None, pretrained: bool | None, *, seed: int, **options: Any
) -> tuple[nn.Module, DataSource]:
    """The model and its data; a new timm model gets as many classes as the data has."""
    network = common.open_model(spec, arguments, pretrained=pretrained, seed=seed)
    source = common.data_for(network, data, seed=seed, **options)
    given = [text.partition("=")[0] for text in arguments or []]
    if spec.startswith("timm:") and "num_classes" not in given:
        more = [*(arguments or []), f"num_classes={source.num_classes}"]
        network = common.open_model(spec, more, pretrained=pretrained, seed=seed)
    _check_classes(network, source)
    return network, source


def _check_classes(network: nn.Module, source: DataSource) -> None:
    with evaluating(network):
        batch = next(iter(source.test))
        names = source.test.keywords
        output = network(batch[0]) if names is None else network(**{names[0]: batch[names[0]]})
    classes = main_output(output).shape[-1]
    if classes < source.num_classes:
        found = f"found {classes} outputs for {source.num_classes} classes"
        raise UsageError(type(network).__name__, found, f"Try -a num_labels={source.num_classes}, or other data.")


def _is_random(spec: str, pretrained: bool | None) -> bool:
    return (spec.startswith("timm:") and not pretrained) or pretrained is False


def _tell(record: dict[str, float]) -> None:
    common.say(f"  epoch {record['epoch']:.0f}, loss {record['loss']:.4f}, accuracy {record['accuracy']:.4f}")


def _write(folder: Path, original: nn.Module, result: Result) -> None:
    save(original, folder / "original.safetensors")
    save(result.model, folder / "compressed.safetensors")
    (folder / "plan.json").write_text(result.plan.to_json() + "\n", encoding="utf-8")
    result.report.save(folder / "report.json")

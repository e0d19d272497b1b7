"""`linearize inspect MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from linearize.analysis.core import Core, core_network
from linearize.cli import common
from linearize.cost import Cost, cost
from linearize.errors import LinearizeError
from linearize.summary import Summary, summary

__all__ = ["inspect"]


def inspect(
    model: common.Model,
    model_arg: common.ModelArgument = None,
    pretrained: common.PretrainedOption = None,
    shape: common.ShapeOption = None,
    batch: common.BatchOption = 1,
    seed: common.SeedOption = 0,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw which channels are nonlinear in each layer (.png, .svg, .pdf)."),
    ] = None,
    json: common.JsonOption = False,
) -> None:
    """List the activations of a model, and what each would collapse to, or why it cannot.

    A row shows the activation's name, its channels, how many of them are linear, and the form that they would take when
    they are collapsed, or the reason why they cannot be collapsed.

    Example: [bold]linearize inspect timm:vit_tiny_patch16_224[/bold]
    """
    draw = picture is not None
    hollow = common.open_hollow(model, model_arg, pretrained=pretrained)
    try:
        network = hollow or common.open_model(model, model_arg, pretrained=pretrained, seed=seed)
        found, price, core = _read(network, shape, batch, seed, draw)
    except LinearizeError:
        if hollow is None:
            raise
        network = common.open_model(model, model_arg, pretrained=pretrained, seed=seed)  # its code may want values
        found, price, core = _read(network, shape, batch, seed, draw)
    if core is not None and picture is not None:
        core.draw(picture, model)
    if json:
        more = {} if core is None else {"core": core.to_dict()}
        common.print_json({"model": model, **found.to_dict(), "cost": price.to_dict(), **more})
        return
    typer.echo(str(found))
    size = sum(p.numel() * torch.empty((), dtype=p.dtype).element_size() for p in network.parameters())
    typer.echo(f"{price.parameters:,} parameters ({size / 1e6:.1f} MB), {price.flops:,} FLOPs at batch size {batch}")
    if core is not None:
        typer.echo(f"effective depth {core.depth:.2f}, {core.share:.1%} of the channels nonlinear: {picture}")


def _read(
    network: nn.Module, shape: str | None, batch: int, seed: int, draw: bool
) -> tuple[Summary, Cost, Core | None]:
    inputs = common.inputs_for(network, batch=batch, shape=shape, seed=seed)
    return summary(network, inputs), cost(network, inputs), core_network(network, inputs) if draw else None

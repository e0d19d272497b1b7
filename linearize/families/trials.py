"""Trials on a copy of a model: whether what is smaller is what was made idle, judged by outputs under rough weights.

Weights are random and large, so that no mistake hides behind a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from linearize.graph import capture
from linearize.graph.capture import Inputs
from linearize.graph.protect import untouched
from linearize.running.models import batches_of, call, device_of, eagerly, evaluating, move

__all__ = ["TOLERANCE", "apart", "outputs_of", "roughened", "run_watched"]

TOLERANCE = 1e-2
"""Of what a change does to an output: rounding is far below, and what a wrong reading does far above."""

_ROUNDING = 1e3  # units of rounding that an effect must at least have


@torch.no_grad()
def roughened(model: nn.Module, parameters: Iterable[Tensor]) -> nn.Module:
    """The model, in float32 at least, after random numbers were added to some of its parameters, each once.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> before = layer.weight.clone()
        >>> torch.equal(roughened(layer, [layer.weight]).weight, before)
        False
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = model.float()
    generator = torch.Generator().manual_seed(0)
    done: set[int] = set()
    for parameter in parameters:
        if id(parameter) in done or not parameter.is_floating_point():
            continue
        done.add(id(parameter))
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(noise * 2 / (parameter.shape[-1] if parameter.dim() > 1 else 4) ** 0.5)
    return model


def outputs_of(model: nn.Module, inputs: Inputs, around: AbstractContextManager[Any] | None = None) -> list[Tensor]:
    """All tensors that a model puts out in eval mode, without gradients; nothing about it changes."""
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    args, kwargs = move(inputs, device_of(model), kinds[0] if kinds else None)
    with evaluating(model), untouched(model), around or nullcontext():
        return capture.tensors_of(model(*args, **kwargs))


def run_watched(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable[..., None]]], batch: Any) -> None:
    """Run a model once in eval mode, and show hooks what modules are given and give; nothing about it changes.

    Args:
        model: any.
        hooks: modules of it, each with a function of (module, args, kwargs, output).
        batch: as for `linearize.convert`.

    Examples:
        >>> seen = []
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> run_watched(net, [(net[0], lambda _, args, kwargs, output: seen.append(output.shape))], torch.ones(1, 2))
        >>> seen
        [torch.Size([1, 3])]
    """
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        with eagerly(), evaluating(model), untouched(model):
            call("model", model, batches_of(batch)[0])
    finally:
        for handle in handles:
            handle.remove()


def apart(whole: Sequence[Tensor], expected: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    """What tells outputs apart, relative to what the change does; None if nothing does.

    Args:
        whole: outputs before the change.
        expected: outputs where a part was made idle.
        found: outputs where that part was taken away.

    Examples:
        >>> x = torch.ones(2)
        >>> apart([x], [2 * x], [2 * x]), apart([x], [2 * x], [3 * x])
        (None, 'an output is off by 1 of what the change does to it')
    """
    if len(expected) != len(found):
        return "another number of outputs comes out"
    seen = False
    for before, a, b in zip(whole, expected, found, strict=True):
        if a.shape != b.shape:
            return f"an output of shape {tuple(a.shape)} becomes one of {tuple(b.shape)}"
        if not a.is_floating_point() or not a.numel():
            continue
        effect = float((before - a).abs().nan_to_num(0.0).max())
        if effect <= _ROUNDING * torch.finfo(a.dtype).eps * float(a.abs().nan_to_num(0.0, 0.0, 0.0).max()):
            continue
        seen = True
        same = (a == b) | (a.isnan() & b.isnan())  # scores that are masked by an infinity, and what comes of them
        worst = float((a - b).abs().masked_fill(same, 0).nan_to_num(torch.inf).max()) / effect
        if not worst <= TOLERANCE:
            return f"an output is off by {worst:.2g} of what the change does to it"
    return None if seen else "what is taken away is not to be seen in the output"

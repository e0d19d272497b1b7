"""The models of the sweep: each name, its family, and how a small one of it is built with inputs that fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from linearize.graph.capture import Inputs

# Smallest first: a reduced input finds the same activations and the same algebra in a fraction of the time.
SIZES = (64, 96, 128, 192, 224, 256)


def timm_names() -> list[tuple[str, str]]:
    """Every name of timm with its family, which is the file that defines it."""
    import timm

    pairs = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    return sorted(pairs.items(), key=lambda pair: (pair[1], pair[0]))


def timm_model(name: str, megabytes: float) -> tuple[nn.Module, Inputs, str]:
    """A timm model at the smallest size that it takes, in float64; on the meta device if it is larger than `megabytes`.

    Raises:
        RuntimeError: it takes no size at all.
    """
    from linearize import zoo

    last: Exception | None = None
    for options, size in timm_sizes(name):
        try:
            with torch.device("meta"):
                hollow = zoo.create(f"timm:{name}", pretrained=False, **options).eval()
            with torch.no_grad():
                hollow(torch.empty(2, *size, device="meta"))
        except Exception as error:  # whatever a model says to a size that it does not take
            last = error
            continue
        weight = 8e-6 * sum(p.numel() for p in hollow.parameters())
        note = "x".join(str(n) for n in size)
        if weight > megabytes:
            return hollow, ((torch.empty(2, *size, device="meta"),), {}), note
        torch.manual_seed(0)
        model = zoo.create(f"timm:{name}", pretrained=False, **options).eval().double()
        return model, ((torch.randn(2, *size, dtype=torch.float64),), {}), note
    raise RuntimeError(f"takes no input size: {last}")


def timm_sizes(name: str) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Options and input sizes to try for a timm model, the cheapest first."""
    import timm

    config = timm.models.get_pretrained_cfg(name)
    own = tuple(config.input_size) if config is not None else (3, 224, 224)
    for size in SIZES:
        if len(own) == 3 and size < own[-1]:
            yield {"img_size": size}, (own[0], size, size)
            yield {}, (own[0], size, size)
    yield {}, own

"""A transformers model from its folder without its weights: they are on the meta device, everything else is real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.errors import UsageError
from linearize.zoo import transformers_models
from linearize.zoo.building import parameters_on_meta

__all__ = ["hollow", "without_cache"]


def hollow(folder: Path) -> nn.Module:
    """The model of a folder's `config.json`, in eval mode, of the class that it names.

    Raises:
        UsageError: the folder holds no model of transformers.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(str(folder), "the folder holds no config.json", "Pass a folder that save_pretrained wrote.")
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        model = transformers_models.create(str(folder), pretrained=False)
    return model.eval()


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside this context, no part of a transformers model keeps keys and values, as its configurations say.

    Examples:
        >>> with without_cache(nn.Linear(2, 2)):
        ...     pass
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            configs[id(config)] = config
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True

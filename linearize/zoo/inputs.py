"""The model inside its wrappers, and example inputs for models of timm and transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from linearize.errors import CaptureError
from linearize.zoo import timm_models, transformers_inputs, transformers_models


def example_inputs(model: nn.Module, *, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs that the model's forward takes: ``(args, kwargs)`` with ``batch`` samples, small where allowed.

    Tensors are on the device of the model's parameters, even if it is meta. Floating tensors have their dtype.

    Raises:
        CaptureError: the model comes from neither timm nor transformers, or its inputs cannot be derived.

    Examples:
        >>> from linearize.zoo import create
        >>> args, kwargs = example_inputs(create("timm:test_vit"))
        >>> args[0].shape, kwargs
        (torch.Size([2, 3, 160, 160]), {})
    """
    model = unwrap(model)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    try:
        if transformers_models.is_transformers(model):
            return transformers_inputs.example_inputs(model, batch=batch, like=like)
        if timm_models.is_timm(model):
            return timm_models.example_inputs(model, batch=batch, like=like)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, MemoryError) as error:
        found = f"its inputs cannot be made from what it says of itself ({type(error).__name__}: {error!s:.120})"
        raise CaptureError(name, found, "Pass example_inputs=.") from error
    found = "it is neither a timm nor a transformers model, so its inputs are not known"
    raise CaptureError(name, found, "Pass example_inputs= as a tensor, a tuple, or a dict of keyword arguments.")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and ``torch.compile`` wrappers.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True
    """
    while True:
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner

"""Checks of arguments that are modules, devices or batches, and of PyTorch's current mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.checks.values import refuse
from linearize.errors import DataError, UsageError


def module(name: str, value: Any) -> nn.Module:
    """Check for a module of torch.

    Raises:
        UsageError: otherwise.
    """
    if not isinstance(value, nn.Module):
        raise UsageError(name, f"found a {type(value).__name__}", "Pass a torch.nn.Module.")
    return value


def dtype(name: str, value: Any) -> torch.dtype:
    """Check for a floating type of torch.

    Raises:
        UsageError: otherwise.
    """
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        refuse(name, value, "a floating type such as torch.float64 or torch.bfloat16")
    return value


def device(name: str, value: Any) -> torch.device:
    """Check for a device that can be used here.

    Raises:
        UsageError: there is no such device, or it holds no values.
    """
    expected = "a device such as 'cpu' or 'cuda:0' that this machine has"
    if isinstance(value, bool) or not isinstance(value, str | torch.device | int):
        refuse(name, value, expected)
    try:
        found = torch.device(value)
        if found.type == "meta":
            refuse(name, value, expected)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        refuse(name, value, expected)
    return found


def batches(name: str, value: Any) -> Iterable[Any]:
    """Check for batches that can be read several times.

    Raises:
        DataError: it cannot be iterated, or only once.
    """
    if isinstance(value, Iterator):
        found = f"found a {type(value).__name__}, which can be read only once"
        raise DataError(name, found, "Pass a list of batches or a DataLoader, for instance list(batches).")
    if isinstance(value, str | bytes | dict) or hasattr(value, "__array__") or not hasattr(value, "__iter__"):
        remedy = "Pass an iterable of batches: tensors, tuples (inputs, labels), or dicts of keyword arguments."
        raise DataError(name, f"found a {type(value).__name__}", remedy)
    batched: Iterable[Any] = value
    return batched


def normal_mode(name: str) -> None:
    """Check that new tensors have values, and can have gradients.

    Raises:
        UsageError: inside torch.inference_mode(), or with the meta device as the default.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError(name, "found torch.inference_mode()", "Call it outside: it needs gradients.")
    if torch.get_default_device().type == "meta":
        found = "found the meta device as torch's default, on which tensors have no values"
        raise UsageError(name, found, "Call it outside of torch.device('meta').")


def evaluation(name: str, value: Any) -> None:
    """Check for a function of a model, or batches that can be read several times.

    Raises:
        UsageError: neither of these.
    """
    if callable(value):
        return
    plain = isinstance(value, Iterator | str | bytes | Mapping) or hasattr(value, "__array__")
    if plain or not hasattr(value, "__iter__"):
        found = f"found a {type(value).__name__}"
        raise UsageError(
            name, found, "Pass batches with labels, such as a list or a DataLoader, or a function of a model."
        )


def with_values(name: str, nest: Any) -> Any:
    """Inputs whose tensors have values.

    Raises:
        UsageError: one of them is on the meta device.
    """
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(nest)):
        raise UsageError(name, "found tensors without values (meta device)", "Pass real ones.")
    return nest


def weights(name: str, model: nn.Module) -> None:
    """Check that the parameters and buffers have values.

    Raises:
        UsageError: one of them is on the meta device.
    """
    for place, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            found = f"found no values in {place} (meta device): the model is offloaded, or was never filled"
            raise UsageError(name, found, "Load all its weights first.")

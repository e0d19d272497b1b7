"""A narrower timm model as a stock one: the arguments of its constructor that give its widths, found by trying."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from linearize.errors import CheckpointError, UsageError
from linearize.zoo import timm_models
from linearize.zoo.building import parameters_on_meta
from linearize.zoo.plain import unpack
from linearize.zoo.stock_config import Shapes, pairs

__all__ = ["TimmArguments", "arguments_of", "shapes_before", "with_copies"]

TimmArguments = tuple[str, dict[str, Any]]
"""The name of an architecture, and arguments of `timm.create_model`."""


def arguments_of(model: nn.Module) -> TimmArguments | None:
    """The arguments with which timm makes a model of these shapes; None if there are none.

    Numbers that the constructor takes, such as `mlp_ratio`, are scaled by the ratio of widths, one after the other.

    Examples:
        >>> model = timm_models.create("test_vit", mlp_ratio=2.0)
        >>> arguments_of(model)
        ('test_vit', {'mlp_ratio': 2.0})
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for recipe in timm_models.candidates(model):
        name = str(recipe["name"]).partition(".")[0]
        found = _found(name, dict(unpack(recipe["kwargs"])), type(model), wanted)
        if found is not None:
            return name, found
    return None


def shapes_before(model: nn.Module) -> Shapes:
    """Shapes of the state of the model as timm makes it without other arguments; nothing if it is not known."""
    for recipe in timm_models.candidates(model):
        found = _shapes(str(recipe["name"]).partition(".")[0], dict(unpack(recipe["kwargs"])))
        if found:
            return found
    return {}


def _found(name: str, kwargs: dict[str, Any], kind: type[nn.Module], wanted: Shapes) -> dict[str, Any] | None:
    now = _shapes(name, kwargs)
    while now and now != wanted:
        left = _left(now, wanted)
        widths = sorted({size for shape in now.values() for size in shape if size > 1})
        for trial in _trials(kind, kwargs, pairs(now, wanted), widths):
            then = _shapes(name, trial)
            if then and _left(then, wanted) < left:
                kwargs, now = trial, then
                break
        else:
            return None
    return kwargs if now else None


def _left(now: Shapes, wanted: Shapes) -> int:
    """How many tensors do not have the shape that is wanted."""
    return sum(now.get(key) != wanted.get(key) for key in now.keys() | wanted.keys())


def _trials(
    kind: type[nn.Module], kwargs: dict[str, Any], sizes: list[tuple[int, int]], widths: list[int]
) -> Iterator[dict[str, Any]]:
    """The arguments with one number in proportion to another width; a quarter more, since constructors round down."""
    for name, parameter in inspect.signature(kind).parameters.items():
        if isinstance(parameter.default, float) and parameter.default > 0:
            for new in dict.fromkeys(new for _, new in sizes):
                for size in (new, new + 0.25):
                    yield from ({**kwargs, name: size / width} for width in widths)


def _shapes(name: str, kwargs: dict[str, Any]) -> Shapes:
    """Shapes of the state of a model of these arguments; nothing if there is no such model."""
    try:
        with parameters_on_meta():
            made = timm_models.create(name, **kwargs)
    except UsageError:  # arguments that the constructor refuses
        return {}
    return {key: tuple(value.shape) for key, value in made.state_dict().items()}


def with_copies(arguments: TimmArguments, model: nn.Module) -> nn.Module:
    """A model of these arguments with copies of all tensors, in eval mode.

    Raises:
        CheckpointError: it has other tensors.
    """
    name, kwargs = arguments
    with torch.random.fork_rng(devices=[]):
        made = timm_models.create(name, **kwargs)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    try:
        made.load_state_dict(state, assign=True)
    except RuntimeError as error:
        found = f"timm's {name} with {kwargs} holds other tensors"
        raise CheckpointError(type(model).__name__, found, "Save it with linearize.save instead.") from error
    return made.eval()

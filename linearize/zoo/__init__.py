"""All knowledge of timm and transformers: example inputs, recipes that rebuild a model, and models by name.

Importing this package imports neither library; a model's own class tells which one it comes from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from linearize.errors import LinearizeError, UsageError
from linearize.zoo import timm_models, transformers_models
from linearize.zoo.building import NO_LIMIT, Limit, parameters_on_meta
from linearize.zoo.inputs import example_inputs, unwrap
from linearize.zoo.resolve import create
from linearize.zoo.stock import stock_copy
from linearize.zoo.structure import compare, forget_parameters, plain_tensors, put_tensor

__all__ = ["Limit", "candidates", "create", "example_inputs", "rebuild", "recipe", "skeleton", "stock_copy", "unwrap"]

Recipe = dict[str, Any]
"""How to build a model again: plain data for JSON, with the key ``library``."""


def candidates(model: nn.Module) -> list[Recipe]:
    """Recipes that may build the model, not yet checked. Empty for a model from neither library."""
    model = unwrap(model)
    remembered = model.__dict__.get("_linearize_recipe")
    found = [remembered] if isinstance(remembered, dict) else []
    if transformers_models.is_transformers(model):
        return found + transformers_models.candidates(model)
    if timm_models.is_timm(model):
        return found + [recipe for recipe in timm_models.candidates(model) if recipe not in found]
    return found


def recipe(model: nn.Module) -> Recipe | None:
    """How to build ``model`` again. It is tried, and must give the same modules, names and shapes. None if it fails.

    Plain attributes and tensors outside the state dict may differ from the rebuilt model. Files store them.

    Examples:
        >>> recipe(create("timm:test_vit", num_classes=10))
        {'library': 'timm', 'name': 'test_vit', 'kwargs': {'num_classes': 10}}
        >>> recipe(nn.Linear(2, 2)) is None
        True
    """
    model = unwrap(model)
    for candidate in candidates(model):
        try:
            fresh = skeleton(candidate)
        except UsageError:
            continue
        if compare(fresh, model).problem is None:
            return candidate
    return None


def skeleton(recipe: Recipe, limit: Limit = NO_LIMIT) -> nn.Module:
    """The model of a recipe in eval mode: parameters on the meta device, other tensors real on the CPU.

    Args:
        recipe: as `recipe` gives it.
        limit: how much may be created.

    Raises:
        UsageError: the recipe is not one of ours, its library cannot build it, or it goes over the limit.
    """
    # Nobody who loads or looks at a model expects the next random numbers to change.
    with torch.random.fork_rng(devices=[]):
        try:
            with parameters_on_meta(limit):
                return _build(recipe, limit)
        except UsageError as error:
            if error.__cause__ is None or isinstance(error.__cause__, (LinearizeError, MemoryError)):
                raise
        # A constructor that computes with its own parameters: build it in full, then forget the values.
        with parameters_on_meta(limit, move=False):
            model = _build(recipe, limit)
    forget_parameters(model)
    return model


def rebuild(recipe: Recipe, device: str | torch.device = "meta") -> nn.Module:
    """Build the model of a recipe on ``device``, in eval mode. No weights are loaded, and nothing is downloaded.

    On the meta device nothing takes memory, including buffers and plain tensors. On any other device the weights are as
    the library initialises them.

    Raises:
        UsageError: the recipe is not one of ours, or its library cannot build it.

    Examples:
        >>> model = rebuild({"library": "timm", "name": "test_vit", "kwargs": {"num_classes": 10}})
        >>> model.head.weight.device, model.num_classes
        (device(type='meta'), 10)
    """
    if torch.device(device).type != "meta":
        return _build(recipe).to(device)
    model = skeleton(recipe).to("meta")
    for module in model.modules():
        for path, tensor in plain_tensors(module).items():
            put_tensor(module, path, tensor.to("meta"))
    return model


def _build(recipe: Recipe, limit: Limit = NO_LIMIT) -> nn.Module:
    library = recipe.get("library") if isinstance(recipe, dict) else None
    if library == "timm":
        return timm_models.build(recipe).eval()
    if library == "transformers":
        return transformers_models.build(recipe, limit).eval()
    raise UsageError("recipe", f"found the library {library!r:.40}", "Known are 'timm' and 'transformers'.")

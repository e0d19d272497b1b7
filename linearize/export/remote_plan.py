"""How a model differs from one of its class and configuration, as plain data that a generated file rebuilds it from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from linearize.export.remote_file import LAYERS, WRAPPING, rebuild
from linearize.surgery.specs import spec_of
from linearize.zoo.plain import is_plain
from linearize.zoo.stock import is_ours, library_class
from linearize.zoo.structure import plain_attributes
from linearize.zoo.transformers_models import is_transformers
from linearize.zoo.unlike import Unlike

__all__ = ["plan_of", "stock_skeleton"]

Plan = dict[str, Any]
_LEFT_OUT = {"whole", "inplace"}  # what tools that change a model ask for, and a loaded model is not


def stock_skeleton(model: nn.Module) -> nn.Module:
    """A model of the same class and configuration, on the meta device."""
    kind: Any = library_class(type(model))
    config: Any = model.config
    with torch.device("meta"):
        made: nn.Module = kind(copy.deepcopy(config))
    return made.eval()


def plan_of(model: nn.Module) -> Plan:
    """What makes the model of one of its class and configuration: layers by path, and numbers that modules keep.

    Raises:
        Unlike: a layer is none that a generated file can hold, or the model is none of transformers.
    """
    name = type(model).__name__
    kind = library_class(type(model))
    if not is_transformers(model) or kind.__module__.partition(".")[0] != "transformers":
        raise Unlike(name, "is no model of transformers")
    stock = stock_skeleton(model)
    layers: list[dict[str, Any]] = []
    _visit(model, stock, "", layers)
    plan: Plan = {"layers": layers, "attributes": []}
    rebuild(stock, plan)
    plan["attributes"] = _attributes(model, stock)
    ours = {key: tuple(value.shape) for key, value in stock.state_dict().items()}
    for key, value in model.state_dict().items():
        if ours.get(key) != tuple(value.shape):
            raise Unlike(key, f"is of shape {tuple(value.shape)}, which no layer of the plan gives")
    return plan


def _visit(module: nn.Module, stock: nn.Module, path: str, layers: list[dict[str, Any]]) -> None:
    """Collect what differs at a path or below it."""
    same = library_class(type(module)) is type(stock)
    if same and _shapes(module) == _shapes(stock) and _geometry(module) == _geometry(stock):
        if type(module) is not type(stock):
            _check_rewritten(module, stock, path)
        for name, child in stock.named_children():
            own = module._modules.get(name)
            if own is None:
                raise Unlike(f"{path}.{name}".strip("."), "is gone")
            _visit(own, child, f"{path}.{name}".strip("."), layers)
        return
    layers.append(_entry(module, stock, path))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    held = {**module._parameters, **module._buffers}
    return {name: tuple(value.shape) for name, value in held.items() if value is not None}


def _geometry(module: nn.Module) -> list[Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups") if hasattr(module, "kernel_size") else ()
    return [getattr(module, name) for name in names]


def _check_rewritten(module: nn.Module, stock: nn.Module, path: str) -> None:
    """A forward that was rewritten to call functions as children is the same forward, unless these are more."""
    for name, child in module.named_children():
        if name not in stock._modules and (is_ours(child) or list(child.parameters())):
            found = f"has a rewritten forward that calls a {type(child).__name__}"
            raise Unlike(f"{path}.{name}".strip("."), found)
        kept = stock._modules.get(name)
        if kept is None and type(child).__name__ != "Elementwise":
            raise Unlike(f"{path}.{name}".strip("."), f"is a {type(child).__name__} of a rewritten forward")


def _entry(module: nn.Module, stock: nn.Module, path: str) -> dict[str, Any]:
    kind = type(module).__name__
    if kind not in LAYERS or not (is_ours(module) or type(module).__module__.startswith("torch.nn")):
        raise Unlike(path, f"is a {kind}, which a generated file does not hold")
    if kind.endswith("Activation") and kind in WRAPPING and type(module.activation) is not type(stock):
        raise Unlike(path, f"acts by {type(module.activation).__name__}, where its class has {type(stock).__name__}")
    spec = {name: value for name, value in spec_of(module).items() if name not in _LEFT_OUT}
    layer = spec.pop("type")
    return {"path": path, "layer": layer, **spec}


def _attributes(model: nn.Module, stock: nn.Module) -> list[list[Any]]:
    """Plain numbers that modules of transformers keep, where they differ."""
    found = []
    rebuilt = dict(stock.named_modules())
    for path, module in model.named_modules():
        other = rebuilt.get(path)
        if other is None or is_ours(module) or type(module).__module__.startswith("torch.nn"):
            continue
        had = plain_attributes(other)
        for name, value in plain_attributes(module).items():
            simple = isinstance(value, bool | int | float | str) and is_plain(value)
            if simple and name in had and had[name] != value and not name.startswith("_") and name != "training":
                found.append([path, name, value])
    return found

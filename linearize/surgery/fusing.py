"""Keep a model's own fusing (`fuse()`, `reparameterize`, `switch_to_deploy`) correct where a norm was folded away.

Such code reads a convolution and the norm after it, and makes one convolution of them. So a folded norm is replaced by
a norm that does nothing, with numbers to match: folding it in once more changes nothing. Some of that code assumes that
a convolution before a norm has no bias, and drops the bias that collapsing has added. If a class does its own folding,
the bias is therefore an addition in the norm's place until the model is fused. A convolution that carries a merged term
past the activation reads as the ordinary convolution that it replaces.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linearize.sites.record import Step
from linearize.sites.site import Fold, Port, Site
from linearize.surgery.carriers import CarryConv, CarryLinear
from linearize.surgery.specs import build, replace_module, spec_of

_STOCK = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_READS = "running_var"  # what every code that folds a batch norm reads


def keep_readable(model: nn.Module, sites: Iterable[Site]) -> list[Step]:
    """Put a readable norm where one was folded into the layer before it. Returns the steps."""
    steps: list[Step] = []
    for port, fold in dict.fromkeys(pair for site in sites for pair in _norms(site)):
        owner = model.get_submodule(fold.module.rpartition(".")[0])
        layer = model.get_submodule(port.module)
        if type(owner).__module__.startswith("torch.") or type(layer) not in _STOCK:
            continue
        width, bias = len(layer.weight), layer.bias  # type: ignore[arg-type]
        shift = isinstance(bias, Tensor) and any(folds_by_itself(type(m)) for m in _owners(model, fold.module))
        spec = {"type": "FoldedNorm", "channels": width, "axis": -1 - port.dims, "shift": shift}
        norm: Any = build(spec, nn.Identity()).to(layer.weight.device, layer.weight.dtype)  # type: ignore[arg-type]
        if shift:
            norm.bias = bias
            steps.append(_put(model, port.module, {**spec_of(layer), "bias": False}, weight=layer.weight))
        replace_module(model, fold.module, norm)
        steps.append({"path": fold.module, "module": spec})
    return steps + _whole_carriers(model, sites)


def _norms(site: Site) -> Iterator[tuple[Port, Fold]]:
    for port, folds in ((site.producer, site.folds), (site.up, site.up_folds)):
        last = folds[-1] if folds else None  # the one next to the activation: those before it are nothing any more
        if port is not None and last is not None and last.var is not None and not last.children and len(folds) == 1:
            yield port, last


def _whole_carriers(model: nn.Module, sites: Iterable[Site]) -> list[Step]:
    """Layers that carry, with a norm beside them: they read as the ordinary layers that they stand for."""
    steps: list[Step] = []
    for path in dict.fromkeys(port.module for site in sites for port in site.consumers):
        layer = model.get_submodule(path)
        beside = model.get_submodule(path.rpartition(".")[0]).children()
        if isinstance(layer, (CarryLinear, CarryConv)) and any(hasattr(module, _READS) for module in beside):
            held = dict(layer.inner.named_parameters())
            steps.append(_put(model, path, {**spec_of(layer), "whole": True}, **held))
    return steps


def _put(model: nn.Module, path: str, spec: dict[str, Any], **values: Any) -> Step:
    with torch.device("meta"):
        layer: Any = build(spec, nn.Identity())
    inner = getattr(layer, "inner", layer)
    for name, value in values.items():
        setattr(inner, name, value)
    replace_module(model, path, layer)
    return {"path": path, "module": spec}


def _owners(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules around a place, the model itself included."""
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)


def folds_by_itself(kind: type[nn.Module]) -> bool:
    """True if a class has its own code, besides its forward, that reads the statistics of batch norms.

    Examples:
        >>> folds_by_itself(nn.Sequential)
        False
    """
    own = [base for base in kind.__mro__ if not base.__module__.startswith("torch.")]
    values = [value for base in own for name, value in vars(base).items() if name not in {"__init__", "forward"}]
    functions = [inspect.unwrap(getattr(value, "__func__", value)) for value in values if callable(value)]
    return any(isinstance(function, types.FunctionType) and _reads(function) for function in functions)


def _reads(function: types.FunctionType, depth: int = 2) -> bool:
    names = set(_names(function.__code__))
    if _READS in names:
        return True
    called = (function.__globals__.get(name) for name in names)
    mine = [f for f in called if isinstance(f, types.FunctionType) and not f.__module__.startswith("torch")]
    return depth > 0 and any(_reads(other, depth - 1) for other in mine)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from (constant for constant in code.co_consts if constant == _READS)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)

"""Modules as plain data: a short list of allowed layers, how each is described, and how it is built again.

A saved model holds only such descriptions. Building one runs no code from the file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from linearize.errors import CheckpointError
from linearize.gating.gate import ChannelGate
from linearize.sites.record import Step, record_of
from linearize.surgery import attributes, carriers, fused, layers, only, skipped, smaller
from linearize.surgery.folds import neutralize
from linearize.surgery.rewrite import hold_function, rewrite_calls
from linearize.surgery.schemas import check_options
from linearize.surgery.subclass import keep_attributes
from linearize.tensors import held

Spec = dict[str, Any]

# They change a module instead of replacing it.
IN_PLACE = (
    "Rewrite", "Held", "Kept", "Neutral", fused.UNFUSED, attributes.ATTRIBUTES, attributes.SETTINGS, skipped.SHORTENED,
    smaller.SMALLER,
)  # fmt: skip
_DEEPEST = 30  # activations inside activations
_COPIES = 20  # modules that a step copies, on the average: an activation is one, or a few
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_MATRIX = ("in_features", "out_features")
# Classes of linear layers, and what their constructors take by name besides the geometry of the layer inside.
_MATRICES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Linear": (nn.Linear, ()),
    "CarryLinear": (carriers.CarryLinear, ("start", "whole")),
    "OnesLinear": (carriers.OnesLinear, ("at", "ones")),
    "OnlyLinear": (only.OnlyLinear, ("keyword", "nones", "caches")),
}
_CONVOLUTIONS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "CarryConv": (carriers.CarryConv, ("start", "whole")),
    "InputCarryConv": (carriers.InputCarryConv, ("ones",)),
    "SameConv": (carriers.SameConv, ()),
    "BorderConv": (carriers.BorderConv, ()),
    "BorderSameConv": (carriers.BorderSameConv, ()),
    "OnlyConv": (only.OnlyConv, ("keyword", "nones")),
}
_STOCK_CONVOLUTIONS: dict[str, type[nn.Module]] = {f"Conv{n}d": getattr(nn, f"Conv{n}d") for n in (1, 2, 3)}


def spec_of(module: nn.Module) -> Spec:
    """The description of a module of the allow-list; `build` makes the module again, with other weights.

    Raises:
        CheckpointError: the module is of another class.

    Examples:
        >>> spec_of(nn.Linear(2, 3, bias=False))
        {'type': 'Linear', 'in_features': 2, 'out_features': 3, 'bias': False}
    """
    name = type(module).__name__
    if type(module) is _MATRICES.get(name, (None,))[0] or type(module) is _STOCK_CONVOLUTIONS.get(name):
        stock = name in _STOCK_CONVOLUTIONS
        return _linear_spec(name, module, _CONV if stock else _MATRIX, () if stock else _MATRICES[name][1])
    if type(module) is _CONVOLUTIONS.get(name, (None,))[0]:
        return _linear_spec(f"{name}{module.dims}d", module, _CONV, _CONVOLUTIONS[name][1])
    if isinstance(module, nn.Identity):
        return {"type": "Identity"}
    if type(module) is skipped.Skipped:
        plain = {"keyword": module.keyword, "nones": module.nones, "rows": module.rows}
        return {"type": "Skipped", **plain, "indices": list(module.indices)}
    if type(module) is skipped.Silent:
        return {"type": "Silent", "keyword": module.keyword, "nones": module.nones}
    if isinstance(module, carriers.Ones):
        return {"type": "Ones", "width": module.width}
    if isinstance(module, layers.Elementwise):
        return {"type": "Elementwise", "function": module.function, "options": module.options}
    if isinstance(module, layers.PartialActivation):
        return {"type": "PartialActivation", "keep": module.keep, "axis": module.axis, "inplace": module.inplace}
    if isinstance(module, layers.MaskedActivation):
        return {"type": "MaskedActivation", "channels": module.linear.numel(), "axis": module.axis}
    if isinstance(module, layers.FoldedNorm):
        return {"type": "FoldedNorm", "channels": module.num_features, "axis": module.axis, "shift": module.shift}
    if isinstance(module, layers.BlendedActivation):
        return {"type": "BlendedActivation", "channels": module.alpha.numel(), "axis": module.axis}
    if isinstance(module, ChannelGate):
        site = module.site.to_dict() if module.site is not None else None
        return {
            "type": "ChannelGate",
            "channels": module.channels,
            "axis": module.axis,
            "gated_unit": module.gated_unit,
            "site": site,
        }
    raise CheckpointError(name, "is no layer that linearize puts into a model", f"Known: {sorted(_BUILDERS)}.")


def _linear_spec(name: str, module: nn.Module, geometry: tuple[str, ...], extra: tuple[str, ...]) -> Spec:
    inner = module.inner if isinstance(module, carriers.Around) else module
    values = {name: getattr(inner, name) for name in geometry} | {name: getattr(module, name) for name in extra}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"type": name, **plain, "bias": getattr(module, "bias", None) is not None}


def build(spec: Spec, current: nn.Module) -> nn.Module:
    """Build the module of a description. `current` is the module in its place now, which activations wrap.

    Raises:
        CheckpointError: the description names no known layer, or lacks what that layer needs.
    """
    kind = spec.get("type")
    builder = _BUILDERS.get(kind) if isinstance(kind, str) else None
    if builder is None:
        raise CheckpointError(f"{kind!s:.80}", "is no layer that linearize knows", f"Known: {sorted(_BUILDERS)}.")
    options = {name: value for name, value in spec.items() if name != "type"}
    try:
        check_options(str(kind), options, _names(str(kind)))
        return builder(current, options)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        shown = f"cannot be built from {options!s:.200} ({error!s:.200})"
        raise CheckpointError(str(kind), shown, "The file is damaged: save it again.") from error


def _names(kind: str) -> tuple[str, ...] | None:
    """Names of all that a linear layer's description may hold; None for layers with a schema of their own."""
    if kind in _MATRICES:
        return (*_MATRIX, *_MATRICES[kind][1], "bias")
    if kind in _STOCK_CONVOLUTIONS:
        return (*_CONV, "bias")
    name = kind[:-2] if kind[-2:] in ("1d", "2d", "3d") else ""
    return (*_CONV, *_CONVOLUTIONS[name][1], "bias") if name in _CONVOLUTIONS else None


def _matrix(kind: type[nn.Module]) -> Callable[[nn.Module, dict[str, Any]], nn.Module]:
    return lambda current, options: kind(**_tuples(options))


def _convolution(kind: type[nn.Module], dims: int) -> Callable[[nn.Module, dict[str, Any]], nn.Module]:
    return lambda current, options: kind(dims=dims, **_tuples(options))


def _partial(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    # Files of version 1 say so where the original did not, too.
    inplace = bool(options.get("inplace")) and any(getattr(module, "inplace", False) for module in current.modules())
    return layers.PartialActivation(current, **{**options, "inplace": inplace})


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _identity(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Forward code may look at `.weight` of the layer that stood here (transformers does): None says there is none."""
    module = nn.Identity()
    for name in ("weight", "bias"):
        if name in current._parameters or held(current, name) is not None:
            module.register_parameter(name, None)
    return module


def _children(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    """What remains of a module whose own map was folded into a neighbour: its children, one after the other."""
    return nn.Sequential(OrderedDict((name, current.get_submodule(name)) for name in options["names"]))


def _gate(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    from linearize.sites.site import Site

    site = Site.from_dict(options["site"]) if options.get("site") else None
    return ChannelGate(current, options["channels"], options["axis"], gated_unit=options["gated_unit"], site=site)


_BUILDERS: dict[str, Callable[[nn.Module, dict[str, Any]], nn.Module]] = {
    **{name: _matrix(kind) for name, (kind, _) in _MATRICES.items()},
    **{name: _matrix(kind) for name, kind in _STOCK_CONVOLUTIONS.items()},
    **{f"{name}{n}d": _convolution(kind, n) for name, (kind, _) in _CONVOLUTIONS.items() for n in (1, 2, 3)},
    "Identity": _identity,
    "Ones": lambda current, options: carriers.Ones(**options),
    "Elementwise": lambda current, options: layers.Elementwise(**options),
    "PartialActivation": _partial,
    "MaskedActivation": lambda current, options: layers.MaskedActivation(current, **options),
    "FoldedNorm": lambda current, options: layers.FoldedNorm(**options),
    "BlendedActivation": lambda current, options: layers.BlendedActivation(current, **options),
    "Children": _children,
    "Neutral": neutralize,
    "ChannelGate": _gate,
    "Rewrite": rewrite_calls,
    "Held": hold_function,
    "Kept": lambda current, options: keep_attributes(current, **options),
    fused.UNFUSED: fused.unfuse,
    attributes.ATTRIBUTES: attributes.attributes_step,
    attributes.SETTINGS: attributes.settings_step,
    skipped.SHORTENED: skipped.shortened_step,
    smaller.SMALLER: smaller.smaller_step,
    "Skipped": skipped.skipped,
    "Silent": lambda current, options: skipped.Silent(**options),
}


def replay(model: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """Replace modules of `model` in place, one step after the other.

    Raises:
        CheckpointError: a step names a path that the model does not have, a layer that cannot be built, or the steps
            nest or copy layers without end.
    """
    left = _COPIES * (len(steps) + 50)
    for step in steps:
        path = step.get("path")
        if not isinstance(path, str) or not isinstance(step.get("module"), dict):
            found = f"found a step of another form: {step!s:.200}"
            raise CheckpointError(str(path), found, "The file is damaged: save it again.")
        try:
            current = model.get_submodule(path)
        except AttributeError as error:
            remedy = "Load it onto the model that it was made from."
            raise CheckpointError(path, "the plan names a module that the model does not have", remedy) from error
        left -= _copied(step["module"], current)
        if left < 0:
            raise CheckpointError(path, "the plan copies layers without end", "Check where the file came from.")
        replace_module(model, path, build(step["module"], current))
    return model


def _copied(spec: Spec, current: nn.Module) -> int:
    """How many modules a step may copy: what it wraps, or what a forward calls. Copies of copies double."""
    calls = spec.get("calls")
    if not isinstance(calls, list):
        return _size(spec, current)
    targets = [call.get("target") for call in calls if isinstance(call, dict) and not call.get("function")]
    children = dict(current.named_modules())
    return sum(_size(spec, children[target]) for target in targets if target in children)


def _size(spec: Spec, module: nn.Module) -> int:
    """Modules in a module, if they are not nested without end."""
    if max(path.count(".") for path, _ in module.named_modules()) > _DEEPEST:
        raise CheckpointError(str(spec.get("type")), "the plan nests layers without end", "Check where it came from.")
    return sum(1 for _ in module.modules())


def all_steps(model: nn.Module) -> list[Step]:
    """Every change of the module tree since the base model, gates included; `replay` repeats them."""
    record = record_of(model)
    gated = [
        {"path": path, "module": spec_of(module)}
        for path, module in model.named_modules()
        if isinstance(module, ChannelGate)
    ]
    return [*(record.steps if record is not None else []), *gated]


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`. It takes over the training mode of the old module."""
    parent, _, name = path.rpartition(".")
    current = model.get_submodule(path)
    if current is module:  # rewritten in place, perhaps the model itself
        return
    module.train(current.training)
    setattr(model.get_submodule(parent), name, module)

"""The schema of each layer's description in a file, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from linearize.graph.ops import ACTIVATIONS
from linearize.schema import (
    Check,
    Unfit,
    array,
    boolean,
    identifier,
    integer,
    mapping,
    number,
    one_of,
    optional,
    path,
    struct,
    text,
    union,
)
from linearize.sites.schema import SITE

__all__ = ["check_options"]

_SIZES = array(integer(0, 2**16), 3, 1)
_STEPS = array(integer(1, 2**16), 3, 1)
# By name, whatever the layer.
_FIELDS: dict[str, Check] = {
    **dict.fromkeys(("in_features", "out_features", "in_channels", "out_channels", "groups", "channels"), integer(1)),
    **dict.fromkeys(("start", "at", "ones", "width", "keep"), integer()),
    **dict.fromkeys(("kernel_size", "stride", "dilation"), _STEPS),
    "padding": union(one_of("same", "valid"), _SIZES),
    "bias": boolean,
    "whole": boolean,
    "caches": boolean,
    "nones": integer(0, 64),
    "keyword": union(one_of(""), identifier),
    "axis": integer(-16, -1),
    "inplace": boolean,
    "gated_unit": boolean,
}
_OPTIONS = mapping(identifier, union(optional(boolean), number(), one_of("none", "tanh")), 16)
_LARGEST_CONSTANT = 2**16  # a number that a forward may count to


def _child(value: Any, where: str) -> None:
    """A new child's name, which the generated forward says: it must not hide what every module has."""
    identifier(value, where)
    if hasattr(nn.Module, value):
        raise Unfit(where, value, "a name that modules have not")


def _constant(value: Any, where: str) -> None:
    if type(value) is float:
        return number()(value, where)
    return union(optional(boolean), integer(-_LARGEST_CONSTANT, _LARGEST_CONSTANT), text(200))(value, where)


def _method(value: Any, where: str) -> None:
    """The name of a method: `__call__` is one."""
    if value != "__call__":
        identifier(value, where)


def _number_name(value: Any, where: str) -> None:
    """The name of an attribute, perhaps with a place in a list behind a dot."""
    name, dot, index = value.partition(".") if type(value) is str else ("", "", "")
    identifier(name, where)
    if name.startswith("_") or (dot and not (index.isdecimal() and index.isascii() and len(index) < 4)):
        raise Unfit(where, value, "the name of a number")


# Where the call stands in a source: what does not fit that source is refused there.
_PLACE = struct(
    {"method": _method, "index": integer(0, 100_000), "callee": text(1000), "reads": text(100)},
    {"child": boolean, "arguments": array(text(100), 100)},
)

_CALL = struct(
    {"child": _child, "target": path, "index": integer(0, 10_000), "of": integer(1, 10_000)},
    {
        "function": optional(one_of(*sorted(ACTIVATIONS))),
        "options": optional(_OPTIONS),
        "place": _PLACE,
    },
)
_ANY = union(optional(boolean), integer(-(2**24)), number(), identifier, array(integer(-(2**24)), 1000))
_NAMES = array(identifier, 20)
_KEPT = array(integer(0, 10_000), 10_000)
_SPECIAL: dict[str, Check] = {
    "Identity": struct({}),
    "Ones": struct({"width": integer(1)}),
    "Elementwise": struct({"function": one_of(*sorted(ACTIVATIONS))}, {"options": optional(_OPTIONS)}),
    "PartialActivation": struct({"keep": integer(), "axis": _FIELDS["axis"]}, {"inplace": boolean}),
    "MaskedActivation": struct({"channels": integer(1), "axis": _FIELDS["axis"]}),
    "BlendedActivation": struct({"channels": integer(1), "axis": _FIELDS["axis"]}),
    "Children": struct({"names": array(path, 100)}),
    "ChannelGate": struct(
        {"channels": integer(1), "axis": _FIELDS["axis"], "gated_unit": boolean},
        {"site": optional(SITE)},
    ),
    "Held": struct({"attribute": identifier}),
    "Kept": struct({}),
    "FoldedNorm": struct({"channels": integer(1), "axis": _FIELDS["axis"], "shift": boolean}),
    "Neutral": struct({"values": mapping(identifier, one_of(0, 1, 0.0, 1.0), 100)}),
    "Unfused": struct({}),
    "Settings": struct({"attribute": identifier, "numbers": _NAMES, "lists": _NAMES, "keep": _KEPT}),
    "Shortened": struct({"keep": _KEPT}),
    "Smaller": struct({"shapes": mapping(identifier, array(integer(1, 2**24), 8, 1), 100)}),
    "Silent": struct({}, {"keyword": _FIELDS["keyword"], "nones": _FIELDS["nones"]}),
    "Skipped": struct(
        {},
        {"keyword": _FIELDS["keyword"], "nones": _FIELDS["nones"], "rows": boolean, "indices": array(integer(), 100)},
    ),
    "Attributes": struct({"values": mapping(_number_name, integer(0), 100)}),
    "Rewrite": struct(
        {"calls": array(_CALL, 1000, 1)},
        {"concrete": optional(mapping(identifier, _constant, 100))},
    ),
}


def check_options(kind: str, options: Mapping[str, Any], names: Sequence[str] | None) -> None:
    """Check the description of a layer of a kind.

    Args:
        kind: its name.
        options: what the description says besides.
        names: of a plain layer, all that it may say.

    Raises:
        Unfit: something is missing, too much, of another type, or out of range.
    """
    if names is not None:
        checks = {name: _FIELDS.get(name, _ANY) for name in names}
        struct({}, checks)(dict(options), kind)
        _check_convolution(kind, options)
    elif kind in _SPECIAL:
        _SPECIAL[kind](dict(options), kind)
        _check_calls(options.get("calls") or ())
    else:
        mapping(identifier, _FIELDS.get(kind, _ANY), 100)(dict(options), kind)


def _check_convolution(kind: str, options: Mapping[str, Any]) -> None:
    dims = int(kind[-2]) if kind[-2:] in ("1d", "2d", "3d") else 0
    for name in ("kernel_size", "stride", "dilation", "padding"):
        value = options.get(name)
        if dims and isinstance(value, (list, tuple)) and len(value) != dims:
            raise Unfit(f"{kind}.{name}", f"of {len(value)} numbers", f"of {dims}")
    for name in ("in_channels", "out_channels"):
        if options.get(name, 0) % options.get("groups", 1):
            raise Unfit(f"{kind}.{name}", options[name], f"a multiple of {options['groups']} groups")


def _check_calls(calls: Sequence[Mapping[str, Any]]) -> None:
    seen: set[str] = set()
    for call in calls:
        if call["index"] >= call["of"]:
            raise Unfit("index", call["index"], f"below {call['of']}")
        if call["child"] in seen:
            raise Unfit("child", call["child"], "a name of its own")
        seen.add(call["child"])

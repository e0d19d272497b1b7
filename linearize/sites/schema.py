"""The schemas of the records in a file: sites, steps, tensors outside the state dict."""

from __future__ import annotations

from typing import Any

from linearize.algebra.constants import expression_of
from linearize.schema import (
    Check,
    Unfit,
    array,
    boolean,
    each,
    identifier,
    integer,
    number,
    one_of,
    optional,
    path,
    plain_data,
    scalar,
    struct,
    text,
    union,
)

__all__ = ["EXTRA", "SITE", "STEP"]


def _option(value: Any, where: str) -> None:
    """A scalar, or the infinity that a bound may be."""
    if value not in (float("inf"), -float("inf")):
        scalar(value, where)


_KINDS = one_of("linear", "conv1d", "conv2d", "conv3d")
_POSITIONS = integer(0, 2**48)
_NAME = text(500)

_PORT = struct(
    {
        "module": path, "kind": _KINDS, "start": integer(), "stop": integer(1), "total": integer(1),
        "transposed": boolean, "positions": _POSITIONS,
    },
    {"folds": array(each(integer(0, 1000), integer(), integer(1)), 1000), "part": integer(0, 1000)},
)  # fmt: skip


def _expression(value: Any, where: str) -> None:
    """A constant that is computed from parameters; a name, a number or a known operation."""
    plain_data(union(number(), path), depth=45, entries=1000)(value, where)
    expression_of(value)


_FOLD = struct(
    {"module": path},
    {
        "children": array(path, 100), "weight": optional(path), "bias": optional(path), "mean": optional(path),
        "var": optional(path), "eps": number(), "scale": optional(_expression), "shift": optional(_expression),
        "neutral": array(each(path, one_of(0, 1, 0.0, 1.0)), 100),
    },
)  # fmt: skip
_SITE = struct(
    {
        "name": _NAME, "module": path, "activation": _NAME, "channels": integer(), "axis": integer(-16, -1),
        "order": integer(), "positions": _POSITIONS,
    },
    {
        "call": optional(integer()), "target": _NAME, "function": optional(identifier),
        "options": array(each(identifier, plain_data(_option, depth=4, entries=1000)), 100), "gated_unit": boolean,
        "ungated": optional(text()), "reason": optional(text()), "producer": optional(_PORT), "up": optional(_PORT),
        "consumers": array(_PORT, 10_000), "folds": array(_FOLD, 1000), "up_folds": array(_FOLD, 1000),
        "consumer_folds": array(_FOLD, 1000), "parts": integer(1), "bent": boolean, "steady": boolean,
        "direct": boolean, "saved": number(),
    },
)  # fmt: skip


def SITE(value: Any, where: str) -> None:  # noqa: N802 - a schema, as the others
    """A site of a record, or of a gate: types and ranges, and ports that lie within their modules."""
    _SITE(value, where)
    if not value["channels"]:  # there is none where nobody knows the channel axis
        for name in ("producer", "up", "consumers"):
            if value.get(name):
                raise Unfit(f"{where}.{name}", "of 0 channels", "one of a site with channels")
        if value.get("ungated") is None:
            raise Unfit(f"{where}.channels", 0, "that of an activation with a gate")
    for name in ("producer", "up"):
        if value.get(name) is not None:
            _check_port(value[name], value, f"{where}.{name}")
    for index, port in enumerate(value.get("consumers", ())):
        _check_port(port, value, f"{where}.consumers[{index}]")


def _check_port(port: dict[str, Any], site: dict[str, Any], where: str) -> None:
    if not port["start"] < port["stop"] <= port["total"]:
        raise Unfit(where, f"{port['start']} to {port['stop']} of {port['total']}", "a range of features")
    if (port["stop"] - port["start"]) * site.get("parts", 1) % site["channels"]:
        raise Unfit(where, f"{port['stop'] - port['start']} features", f"those of {site['channels']} channels")


# What any layer's description may hold; a layer's own schema is in `surgery/specs.py`.
_VALUE: Check = union(
    optional(text(200)), boolean, integer(-(2**24)), number(), plain_data(scalar, depth=8, entries=100_000)
)  # fmt: skip
_MODULE = struct({"type": identifier}, {})


def _module(value: Any, where: str) -> None:
    if not isinstance(value, dict) or len(value) > 100:
        raise Unfit(where, value, "the description of a layer")
    _MODULE({"type": value["type"]} if "type" in value else {}, where)
    for name, item in value.items():
        identifier(name, f"a key of {where}")
        _VALUE(item, f"{where}.{name}")


STEP = struct({"path": path, "module": _module})
"""A change of the module tree."""


_KEY = union(integer(-(2**31), 2**31), text(200))


def EXTRA(value: Any, where: str) -> None:  # noqa: N802 - a schema, as the others
    """A tensor outside the state dict: its name in the file, the module, and where it hangs there."""
    each(text(), path, array(_KEY, 20, 1))(value, where)
    identifier(value[2][0], f"{where}[2][0]")

"""What files of results may contain: they come from other machines, and from strangers."""

from __future__ import annotations

from linearize.schema import (
    array,
    boolean,
    integer,
    mapping,
    number,
    one_of,
    optional,
    plain_data,
    scalar,
    struct,
    text,
    union,
)
from linearize.suite.matrix import DTYPES, WAYS, WORK

__all__ = ["FORMAT", "RECORD", "RECORD_IDENTITY"]

FORMAT = 1

_MOST = 2**50  # parameters
_AMOUNT = optional(number(0))
_SPREAD = struct({"median": number(0), "q1": number(0), "q3": number(0)})

_CELL = struct(
    {
        "work": one_of(*WORK),
        "way": one_of(*WAYS),
        "dtype": one_of(*DTYPES),
        "batch": integer(1),
        "shape": text(100),
        "length": integer(),
        "new_tokens": integer(),
        "threads": integer(),
    }
)
_MEASURED = struct(
    {
        "seconds": _SPREAD,
        "ratio": optional(_SPREAD),
        "per_second": _AMOUNT,
        "peak_bytes": _AMOUNT,
        "joules": _AMOUNT,
        "samples": array(number(0)),
    },
    {"first_token": _SPREAD, "first_token_ratio": optional(_SPREAD), "tokens_per_second": _AMOUNT},
)
_WATCHED = struct({"slowed": array(text(200))}, dict.fromkeys(
    ("clock_mhz", "memory_clock_mhz", "power_w", "temperature_c", "load"), optional(array(number(), 3, 3))
))  # fmt: skip
RECORD_IDENTITY = struct(
    {
        "format": one_of(FORMAT),
        "suite": plain_data(scalar),
        "models": mapping(text(), struct({"class": text(), "parameters": integer(0, _MOST)})),
        "about": plain_data(scalar),
        "device": text(),
    }
)
RECORD = struct(
    {
        "format": one_of(FORMAT),
        "cell": _CELL,
        "models": mapping(text(), union(struct({"left_out": text()}), _MEASURED)),
        "steady": boolean,
        "warmup": integer(),
        "rounds": integer(),
        "watched": _WATCHED,
        "environment": plain_data(scalar),
        "time": text(100),
    }
)

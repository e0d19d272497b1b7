"""Checks of arguments. Each check returns the argument, or raises an error.

Public functions check their arguments before they do anything. The message names the argument, the value found, and
what it must be.
"""

from linearize.checks.torch_values import (
    batches,
    device,
    dtype,
    evaluation,
    module,
    normal_mode,
    weights,
    with_values,
)
from linearize.checks.values import (
    boolean,
    choice,
    folder,
    function,
    is_number,
    is_whole,
    number,
    path,
    patterns,
    plain_number,
    refuse,
    seed,
    share,
    whole,
    wholes,
)

__all__ = [
    "batches",
    "boolean",
    "choice",
    "device",
    "dtype",
    "evaluation",
    "folder",
    "function",
    "is_number",
    "is_whole",
    "module",
    "normal_mode",
    "number",
    "path",
    "patterns",
    "plain_number",
    "refuse",
    "seed",
    "share",
    "weights",
    "whole",
    "wholes",
    "with_values",
]

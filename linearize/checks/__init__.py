"""Checks of arguments, in one vocabulary: each gives the argument back, or says what was found and what to pass.

Public functions check what they are called with before they do anything. A message names the argument, the value
found, and what it must be.
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
    plain,
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
    "plain",
    "refuse",
    "seed",
    "share",
    "weights",
    "whole",
    "wholes",
    "with_values",
]

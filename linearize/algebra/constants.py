"""Constants that a forward computes from parameters and numbers, as plain data, such as `weight * rsqrt(var + eps)`.

An expression is the name of a tensor, a number, or an operation with its operands. Its value is one number per channel,
or one number for all channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A name, a number, or (operation, operands...).
Expression = str | float | tuple[Any, ...]

_DEEPEST = 40
_OF_TWO = ("add", "sub", "mul", "div", "pow")
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
}


def expression_of(data: Any, depth: int = 0) -> Expression:
    """An expression from plain data with lists in it, as JSON gives it.

    Raises:
        ValueError: it is none.

    Examples:
        >>> expression_of(["mul", "weight", ["rsqrt", ["add", "var", 1e-5]]])
        ('mul', 'weight', ('rsqrt', ('add', 'var', 1e-05)))
    """
    if isinstance(data, (str, int, float)) and not isinstance(data, bool):
        return data if isinstance(data, str) else float(data)
    known = isinstance(data, (list, tuple)) and data and isinstance(data[0], str) and data[0] in OPERATIONS
    if not known or depth > _DEEPEST or len(data) - 1 != (2 if data[0] in _OF_TWO else 1):
        raise ValueError(f"found {str(data)[:60]!r}, which is no constant that is known here")
    return (data[0], *(expression_of(value, depth + 1) for value in data[1:]))


def evaluate(expression: Expression, tensor: Callable[[str], Tensor]) -> Tensor:
    """The value of an expression in float64: (C,), or (1,) if it is the same for all channels.

    Args:
        expression: what to compute.
        tensor: gives the tensor of a name.

    Examples:
        >>> evaluate(("mul", "w", 2.0), {"w": torch.ones(3, 1)}.__getitem__).tolist()
        [2.0, 2.0, 2.0]
    """
    if isinstance(expression, str):
        return tensor(expression).double().reshape(-1)
    if not isinstance(expression, tuple):
        return torch.tensor([expression], dtype=torch.float64)
    operands = [evaluate(value, tensor) for value in expression[1:]]
    place = next((value.device for value in operands if value.numel() > 1), operands[0].device)
    return OPERATIONS[expression[0]](*(value.to(place) for value in operands))


def names_in(expression: Expression | None) -> tuple[str, ...]:
    """The names of the tensors in an expression.

    Examples:
        >>> names_in(("add", "a", ("mul", 2.0, "b")))
        ('a', 'b')
    """
    if isinstance(expression, str):
        return (expression,)
    parts: Sequence[Any] = expression[1:] if isinstance(expression, tuple) else ()
    return tuple(name for part in parts for name in names_in(part))


def with_names(expression: Expression | None, rename: Callable[[str], str]) -> Expression | None:
    """The same expression of tensors with other names."""
    if isinstance(expression, str):
        return rename(expression)
    if isinstance(expression, tuple):
        return (expression[0], *(with_names(part, rename) for part in expression[1:]))
    return expression

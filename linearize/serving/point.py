"""The batch size and the context at which a model that generates is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize import checks
from linearize.errors import UsageError
from linearize.zoo.caches import generates
from linearize.zoo.inputs import unwrap
from linearize.zoo.text import is_encoder_decoder, longest_context, vocabulary

__all__ = ["Point", "check_serving", "read_point", "size_of"]

_SHORTEST = 4


@dataclass(frozen=True)
class Point:
    """Where decoding, prefill and memory are measured.

    Attributes:
        batch: texts that are written at the same time.
        context: tokens of each text.
    """

    batch: int = 1
    context: int = 512

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}"


def read_point(given: Any) -> Point:
    """A point from a pair of numbers.

    Raises:
        UsageError: it is none.

    Examples:
        >>> read_point((8, 1024))
        Point(batch=8, context=1024)
    """
    if isinstance(given, Point):
        return given
    numbers = checks.wholes("serving", given)
    if len(numbers) != 2 or numbers[1] < _SHORTEST:
        refused = f"a pair of a batch size and a context of at least {_SHORTEST} tokens, such as (8, 1024)"
        checks.refuse("serving", given, refused)
    return Point(*numbers)


def size_of(batch: Any) -> tuple[int, int]:
    """Texts and tokens of a batch: the sizes of its first tensor of two axes or more; (1, 1) if there is none.

    Examples:
        >>> import torch
        >>> size_of({"input_ids": torch.zeros(2, 16)})
        (2, 16)
    """
    found = [leaf.shape for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() >= 2]
    return (int(found[0][0]), int(found[0][1])) if found else (1, 1)


def check_serving(model: nn.Module, point: Point, name: str) -> None:
    """Check that a model can be measured at a point.

    Raises:
        UsageError: it does not generate text from text alone, or was made for a shorter context.
    """
    inner = unwrap(model)
    if not generates(inner) or vocabulary(inner) is None:
        found = f"found a {type(inner).__name__}, which does not generate text"
        raise UsageError(
            name, found, "Pass a model of transformers with generate(), or another budget, such as flops=."
        )
    if is_encoder_decoder(inner):
        found = f"found a {type(inner).__name__}, whose decoder reads what an encoder gives"
        raise UsageError(name, found, "Pass another budget, such as latency=.")
    most = longest_context(inner)
    if most is not None and point.context > most:
        found = f"found a context of {point.context}, and the model was made for {most} tokens"
        raise UsageError("serving", found, "Pass a shorter one.")

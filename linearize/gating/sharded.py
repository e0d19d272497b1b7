"""Parameters that FSDP has spread over processes (`DTensor`): read as a whole, and written as a whole.

Every process holds a part of such a tensor. Reading the whole asks all of them, so all must read at the same point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError, UsageError

__all__ = ["REMEDY", "check_unsharded", "is_sharded", "put", "unsharded"]

REMEDY = (
    "Take linearize.integrations.whole_state(model) on all processes, load it into the same model that is not sharded, "
    "and go on with that."
)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes.

    Examples:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return hasattr(tensor, "full_tensor")


def check_unsharded(model: nn.Module, error: type[LinearizeError] = UsageError) -> None:
    """Check that no parameter is spread over processes.

    Raises:
        LinearizeError: one is; of the class `error`.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise error(name, f"is sharded over processes ({type(parameter).__name__})", REMEDY)


def unsharded(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it if it is spread over processes. Gradients flow back to each part.

    Examples:
        >>> unsharded(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    spread: Any = tensor
    full: Tensor = spread.full_tensor() if is_sharded(tensor) else tensor
    return full


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Write values into a tensor: those of a whole one, of which each process keeps its part.

    Examples:
        >>> at = torch.zeros(2)
        >>> put(at, torch.ones(2))
        >>> at.tolist()
        [1.0, 1.0]
    """
    spread: Any = tensor
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(spread.to_local()), spread.device_mesh, spread.placements)
    tensor.copy_(values)

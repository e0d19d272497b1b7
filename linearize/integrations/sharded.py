"""Models that FSDP2 (`fully_shard`) has spread over processes: all of their tensors, for a model that is not."""

from __future__ import annotations

from torch import Tensor, nn

from linearize import checks
from linearize.gating.sharded import unsharded

__all__ = ["whole_state"]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, with whole tensors on the CPU, under the names that an unsharded model has.

    Every process must call it at the same point, and every process gets all of it: `linearize.collapse`, `summary` and
    `save` then work on an unsharded copy, on one process or on all.

    Args:
        model: with gates or without, sharded by `torch.distributed.fsdp.fully_shard` or not at all.

    Raises:
        UsageError: it is no module.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> again = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> again.load_state_dict(whole_state(net))
        <All keys matched successfully>
    """
    state: dict[str, Tensor] = checks.module("model", model).state_dict()
    return {name: unsharded(tensor.detach()).cpu() for name, tensor in state.items()}

"""One loop for everything that is trained here: from random weights, fine-tuning, and searching while training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["epochs", "pace", "train"]

_WARMUP = 0.05
_DECAY = 0.05


def pace(step: int, total: int) -> float:
    """The learning rate of a step relative to the largest: a short rise, then a cosine to 0.

    Example:
        >>> pace(0, 100) < pace(5, 100) > pace(50, 100) > pace(99, 100)
        True
    """
    rise = max(1, round(_WARMUP * total))
    return min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / total)) / 2


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    lr: float,
    *,
    gates: Iterable[nn.Parameter] = (),
    gate_lr: float = 0.02,
    constant: bool = False,
    keep_norms: bool = False,
    after: Callable[[int], bool] = lambda _: False,
) -> int:
    """Train a model in place with AdamW, and leave it in eval mode.

    Args:
        model: anything.
        loss: of the model at a step.
        steps: how many.
        lr: the largest learning rate.
        gates: parameters with a constant learning rate of their own, and no decay.
        gate_lr: that rate.
        constant: keep the rate of the weights too.
        keep_norms: batch norms use and keep the statistics that they have.
        after: called with the number of steps done; True ends training.

    Returns:
        The number of steps done.
    """
    special = list(gates)
    chosen = {id(gate) for gate in special}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": _DECAY},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if special:
        groups.append({"params": special, "weight_decay": 0.0, "lr": gate_lr})
    optimizer = torch.optim.AdamW(groups, lr=lr)
    model.train()
    for module in model.modules() if keep_norms else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    done = 0
    for step in range(steps):
        for group in optimizer.param_groups[:2]:
            group["lr"] = lr if constant else lr * pace(step, steps)
        value = loss(model, step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        done = step + 1
        if after(done):
            break
    model.eval()
    optimizer.zero_grad()
    return done


def epochs(count: int, batch: int, seed: int) -> Callable[[int], Sequence[int]]:
    """Which samples a step takes: every epoch in another order, which the seed decides."""
    each = max(1, count // batch)
    orders: dict[int, list[int]] = {}

    def pick(step: int) -> Sequence[int]:
        epoch, place = divmod(step, each)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(1000 * seed + epoch)
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        return orders[epoch][place * batch :][:batch]

    return pick

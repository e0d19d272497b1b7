"""Least squares on what a consumer of hidden channels reads: which channels to remove, and what the others then do.

Shape letters: C hidden channels, K that stay, O outputs of the consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.hidden import Hidden, cut
from benchmarks.peers.subject import Subject
from linearize.running.batches import read_batch
from linearize.running.models import evaluating

__all__ = ["consumed", "refit", "removal", "sizes", "weight_of"]

_RIDGE = 1e-3
_AT_A_TIME = 64  # of the channels that are left, one part in so many goes at a time


def weight_of(model: nn.Module, hidden: Hidden) -> Tensor:
    """The consumer's matrix (O, C), float64."""
    consumer: Any = model.get_submodule(hidden.consumer)
    found: Tensor = consumer.weight.detach().double().flatten(1)
    return found


def sizes(model: nn.Module, hidden: Hidden) -> Tensor:
    """Norm of the producers' rows times norm of the consumer's column, (C,)."""
    found: Tensor = weight_of(model, hidden).norm(dim=0)
    for path in hidden.producers:
        producer: Any = model.get_submodule(path)
        rows: Tensor = producer.weight.detach().double().flatten(1)
        found = found * rows.norm(dim=1)
    return found


def consumed(subject: Subject) -> list[tuple[Tensor, Tensor]]:
    """Mean (C,) and covariance (C, C) of what each consumer reads on the calibration data; padding left out."""
    sums: dict[str, list[Any]] = {hidden.consumer: [0, 0.0, 0.0] for hidden in subject.hidden}
    mask: list[Tensor | None] = [None]

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            rows = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
            if mask[0] is not None and rows.shape[:-1] == mask[0].shape:
                rows = rows[mask[0].bool()]
            rows = rows.reshape(-1, rows.shape[-1]).double()
            held = sums[path]
            held[0] += len(rows)
            held[1] = held[1] + rows.sum(0)
            held[2] = held[2] + rows.t() @ rows

        return see

    handles = [subject.model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in sums]
    with evaluating(subject.model):
        for raw in subject.calibration:
            batch = read_batch(subject.model, raw)
            mask[0] = batch.kwargs.get("attention_mask")
            subject.model(*batch.args, **batch.kwargs)
    for handle in handles:
        handle.remove()
    means = [(s / n, p / n) for n, s, p in sums.values()]
    return [(mean, product - mean.outer(mean)) for mean, product in means]


def _ridged(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal()
    return covariance + torch.diag(_RIDGE * scale + 1e-9 * scale.mean() + 1e-30)


@torch.no_grad()
def refit(model: nn.Module, hidden: Hidden, keep: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Remove all channels but `keep` (K,), in place, and fit the consumer to what it computed before."""
    whole = weight_of(model, hidden)
    system = _ridged(covariance[keep][:, keep])
    fitted = torch.linalg.solve(system, covariance[keep] @ whole.t()).t()
    shift = whole @ mean - fitted @ mean[keep]
    cut(model, hidden, keep)
    consumer: Any = model.get_submodule(hidden.consumer)
    consumer.weight.copy_(fitted.reshape(consumer.weight.shape))
    if consumer.bias is not None:
        consumer.bias.add_(shift)
    elif hidden.norm is not None:
        norm: Any = model.get_submodule(hidden.norm)
        norm.running_mean.sub_(shift)


def removal(weight: Tensor, _: Tensor, covariance: Tensor) -> Tensor:
    """How late each channel goes if always those go whose removal, all others refitted, costs least: (C,).

    One after the other, but several at a time while many are left.
    """
    inverse, w = torch.linalg.inv(_ridged(covariance)), weight.clone()
    late = torch.zeros(len(covariance), dtype=torch.float64)
    left = torch.ones(len(covariance), dtype=torch.bool)
    while bool(left.any()):
        costs = w.square().sum(0) / inverse.diagonal().clamp(min=1e-30)
        costs = costs.masked_fill(~left, torch.inf)
        gone = costs.argsort()[: max(1, int(left.sum()) // _AT_A_TIME)]
        late[gone] = len(left) - left.sum() + torch.arange(len(gone), dtype=late.dtype)
        left[gone] = False
        passed = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        w = (w - w[:, gone] @ passed) * left
        inverse = inverse - inverse[:, gone] @ passed
    return late

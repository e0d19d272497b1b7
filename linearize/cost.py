"""The cost of a model: parameters and floating point operations, counted exactly. `benchmark` measures latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize import checks
from linearize.errors import UsageError
from linearize.graph.capture import Inputs
from linearize.graph.protect import untouched
from linearize.running.models import batches_of, call, evaluating
from linearize.zoo.experts import grouped_products

__all__ = ["Cost", "cost", "flops_of_modules"]


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass.

    Attributes:
        parameters: number of parameters. Shared ones are counted once.
        flops: additions and multiplications in matrix products, convolutions and attention, for the whole
            batch. Elementwise operations are not counted.
    """

    parameters: int
    flops: int

    def to_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def cost(model: nn.Module, inputs: Any) -> Cost:
    """Count the parameters and FLOPs of a model in eval mode. The model is not changed.

    The operations are counted on meta tensors, so nothing is computed. A model that cannot run on them runs on real
    tensors.

    Args:
        model: any module.
        inputs: one batch: a tensor, a tuple, or a dict of keyword arguments.

    Raises:
        UsageError: there is not exactly one batch, or the model does not run on it.

    Examples:
        >>> cost(nn.Linear(3, 5), torch.zeros(2, 3))
        Cost(parameters=20, flops=60)
    """
    checks.module("model", model)
    batches = batches_of(inputs)
    if len(batches) != 1:
        raise UsageError("inputs", f"found {len(batches)} batches", "Pass one batch.")
    return Cost(sum(p.numel() for p in model.parameters()), _flops(model, batches[0]))


def flops_of_modules(model: nn.Module, inputs: Any) -> dict[str, int]:
    """FLOPs of every module that runs, by path, including its children. The path "" is the model.

    Examples:
        >>> flops_of_modules(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), torch.zeros(2, 3))
        {'': 60, '0': 60}
    """
    counts = _counted(model, batches_of(inputs)[0]).get_flop_counts()
    root = type(model).__name__
    found = {name.removeprefix(root).removeprefix("."): sum(ops.values()) for name, ops in counts.items()}
    return {path: flops for path, flops in sorted(found.items()) if path != "Global"}


def _flops(model: nn.Module, batch: Inputs) -> int:
    return int(_counted(model, batch).get_total_flops())


def _counted(model: nn.Module, batch: Inputs) -> Any:
    """The counter of one run."""
    from torch.utils.flop_counter import FlopCounterMode

    # The counter knows neither the attention of CPUs, nor products of which each row takes a matrix of several.
    more: dict[Any, Callable[..., int]] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention}
    more |= dict.fromkeys((torch.ops.aten._grouped_mm, *grouped_products()), _of_rows)
    with evaluating(model), untouched(model), _without_gradients(model):
        try:
            with FlopCounterMode(display=False, custom_mapping=more) as counter:
                _run_on_meta(model, batch)
        except Exception:  # whatever a model does with the values in its tensors, it can do only for real
            with FlopCounterMode(display=False, custom_mapping=more) as counter:
                call("model", model, batch)
    return counter


def _of_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of an attention, from shapes (B, H, T, D): products of queries and keys, and the weighing of values."""
    rows = math.prod(query[:-1])
    return int(2 * rows * key[-2] * (query[-1] + value[-1]))


def _of_rows(rows: Any, matrices: Any, *_: Any, **__: Any) -> int:
    """FLOPs of rows (S, D), each times one of several matrices (E, D, O): as many as with a single matrix."""
    return int(2 * math.prod(rows) * matrices[-1])


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """The counter hooks onto gradients of whatever requires them, which fails for a parameter that is passed on."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad = True


def _run_on_meta(model: nn.Module, batch: Inputs) -> None:
    """Run the model with all its tensors replaced for the time of the call."""

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta")

    tensors = {
        name: meta(tensor)
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
    args, kwargs = pytree.tree_map_only(Tensor, meta, batch)
    torch.func.functional_call(model, tensors, args, kwargs, tie_weights=False)

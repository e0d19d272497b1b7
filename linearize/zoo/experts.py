"""What is known of mixtures of experts: products of many matrices at once, and settings that count experts and widths.

transformers' modules say in plain numbers how many experts there are, and so do its configurations: when all mixtures
of a model have become alike, these say the truth again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from linearize.sites.record import Step
from linearize.surgery.attributes import ATTRIBUTES, SETTINGS, fewer_in, set_attributes
from linearize.surgery.smaller import SMALLER

__all__ = ["grouped_products", "retold", "smaller_in"]

# Settings and attributes that count experts, and that give the width of each: the first that there is.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "intermediate_size")
_INPUTS = ("hidden_size", "d_model")


def grouped_products() -> tuple[Any, ...]:
    """Ops of a library that multiply each row by one of several matrices, if that library is loaded.

    Examples:
        >>> isinstance(grouped_products(), tuple)
        True
    """
    own = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return () if own is None else (own,)


def smaller_in(steps: list[Step]) -> set[str]:
    """Paths of modules whose own tensors have become smaller."""
    return {step["path"] for step in steps if step["module"]["type"] == SMALLER}


def retold(model: nn.Module, steps: list[Step]) -> Iterator[Step]:
    """Make configurations and counts of whole models say what has become of their experts, in place; step by step.

    Args:
        model: in which experts have gone or become narrower; where they differ from layer to layer, nothing is said.
        steps: what was done to it.
    """
    banks = smaller_in(steps)
    for where, holder in model.named_modules():
        config: Any = vars(holder).get("config")
        inside = [path for path in banks if not where or path.startswith(f"{where}.")]
        if not hasattr(config, "to_dict") or not inside:
            continue
        sizes = {size for path, module in holder.named_modules() if path and (size := _size(module, config))}
        if len(sizes) != 1:
            continue
        count, width = sizes.pop()
        for names, value in ((_COUNTS, count), (_WIDTHS, width)):
            numbers = _changed(config, names, value)
            if numbers:
                fewer_in(holder, "config", numbers, [], range(value))
                spec = {
                    "type": SETTINGS,
                    "attribute": "config",
                    "numbers": numbers,
                    "lists": [],
                    "keep": [*range(value)],
                }
                yield {"path": where, "module": spec}
        own = {name: count for name in _COUNTS if type(before := vars(holder).get(name)) is int and before > count}
        if own and not any(path == where for path in banks):
            set_attributes(holder, own)
            yield {"path": where, "module": {"type": ATTRIBUTES, "values": own}}


def _size(module: nn.Module, config: Any) -> tuple[int, int] | None:
    """How many experts a module holds in its own parameters, and how wide they are; None if it holds none."""
    found = [parameter for parameter in module._parameters.values() if parameter is not None and parameter.dim() == 3]
    if len(found) < 2 or len({len(parameter) for parameter in found}) > 1:
        return None
    inputs = next((value for name in _INPUTS if type(value := getattr(config, name, None)) is int), 0)
    count, least = len(found[0]), min(parameter[0].numel() for parameter in found)
    return count, least // inputs if inputs and least % inputs == 0 else 0


def _changed(config: Any, names: tuple[str, ...], value: int) -> list[str]:
    """The setting that gives a size, if it gives a larger one. Names may stand for one another: one is enough."""
    known: Mapping[str, str] = getattr(config, "attribute_map", {})
    there = [known.get(name, name) for name in names if type(getattr(config, name, None)) is int]
    return [name for name in there[:1] if 0 < value < getattr(config, name)]

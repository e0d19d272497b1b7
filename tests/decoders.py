"""Small decoders whose layers differ, for the tests of exports."""

from __future__ import annotations

from typing import Any

from torch import nn

from linearize.surgery.only import OnlyLinear


def biased(model: Any) -> Any:
    """Biases that do something."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def narrow(model: Any, layer: int, width: int) -> Any:
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, width, bias=False), nn.Linear(32, width, bias=False)
    mlp.down_proj = nn.Linear(width, 32, bias=False)
    return model


def matrix(*, zero: bool = False) -> OnlyLinear:
    made = OnlyLinear(32, 32, bias=False, keyword="hidden_states", nones=1)
    if zero:
        nn.init.zeros_(made.linear.weight)
    return made


def without_attention(model: Any, layer: int, *, zero: bool) -> Any:
    model.model.layers[layer].self_attn = matrix(zero=zero)
    return model


def fewer_groups(model: Any, layer: int) -> Any:
    """One layer with a single head of keys and values for its four queries."""
    attention = model.model.layers[layer].self_attn
    attention.k_proj, attention.v_proj = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    attention.num_key_value_groups = 4
    return model

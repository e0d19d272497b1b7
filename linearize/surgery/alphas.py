"""Check the alphas of a model before it collapses: in range, and how many are between 0 and 1."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from linearize.errors import CollapseError
from linearize.gating.gate import ChannelGate

__all__ = ["check_alphas"]


def check_alphas(found: Mapping[str, ChannelGate]) -> None:
    """Check the alphas of a model's gates, by site name; warn of those who will be collapsed half way.

    Raises:
        CollapseError: an alpha is outside [0, 1].
    """
    for name, gate in found.items():
        _check_range(name, gate)
    _warn_of_blends(found)


def _check_range(name: str, gate: ChannelGate) -> None:
    alpha = gate.alpha.detach()[~gate.frozen]
    odd = alpha[~((alpha >= 0) & (alpha <= 1))]
    if odd.numel():
        remedy = "Call prior.step() after each step of the optimizer, or clamp alpha."
        raise CollapseError(name, f"found alpha {float(odd[0]):g}, outside [0, 1]", remedy)


def _warn_of_blends(found: Mapping[str, ChannelGate]) -> None:
    """Channels that stopped on their way to a line cost more than before, and can never be folded away."""
    blends = {name: count for name, gate in found.items() if (count := int(gate.half_way.sum()))}
    if not blends:
        return
    total = sum(gate.channels for gate in found.values())
    more = ", ..." if len(blends) > 3 else ""
    some = ", ".join(f"{name} ({count})" for name, count in list(blends.items())[:3]) + more
    text = (
        f"{sum(blends.values())} of {total} channels have an alpha between 0 and 1, at {some}: "
        "they keep a blend of activation and line, which costs more than either. "
        "To decide them, call gate.round_() on linearize.gates(model).values(), or train on until the prior has."
    )
    warnings.warn(text, stacklevel=4)

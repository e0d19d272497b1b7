"""What goes wrong with gates in a training loop without a word, and is said here: once, and by numbers.

A gate's alpha is a parameter like others to all that trains models: adapters freeze it, optimizers let it decay, rates
are scaled by the depth of a layer, and accumulation of gradients adds a penalty more than once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.gating.gate import ChannelGate

__all__ = ["Counted", "tell_of_frozen", "tell_of_optimizer"]

_MORE = 1e-3  # a penalty divided by the number of batches is counted once up to rounding
_SCALED = 1.5  # above this, a loss is scaled for half precision, and nobody knows by what


def tell_of_frozen(gates: Sequence[ChannelGate]) -> None:
    """Warn of gates whose alpha somebody has excluded from training.

    Examples:
        >>> gate = ChannelGate(torch.nn.ReLU(), 4).requires_grad_(False)
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     tell_of_frozen([gate])
        >>> print(str(told[0].message).partition(":")[0])
        1 of 1 gates (act 0) are not trained
    """
    names = [_name(gate, place) for place, gate in enumerate(gates) if not gate.alpha.requires_grad]
    if names:
        text = (
            f"{len(names)} of {len(gates)} gates ({_some(names)}) are not trained: their alpha needs no gradient, as "
            "get_peft_model and requires_grad_(False) leave it, so that no penalty moves it. Call "
            "gate.alpha.requires_grad_(True) on linearize.gates(model).values(), before the optimizer is made."
        )
        warnings.warn(text, stacklevel=4)


def tell_of_optimizer(gates: Sequence[ChannelGate], optimizer: Any) -> None:
    """Warn of alphas that an optimizer does not have, lets decay, or moves at a rate that depends on their depth."""
    home = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    named = [(_name(gate, place), home.get(id(gate.alpha))) for place, gate in enumerate(gates)]
    remedy = (
        "Give them a group of their own: linearize.param_groups(model), or "
        "linearize.integrations.gates_apart(optimizer, model) before a scheduler is made."
    )
    for names, what in (
        ([name for name, group in named if group is None], "is not in the optimizer, and only prior.step() moves it"),
        (
            [name for name, group in named if group is not None and group.get("weight_decay", 0)],
            "decays, which draws channels back from their line",
        ),
        (
            [name for name, group in named if group is not None and group.get("lr_scale", 1.0) != 1.0],
            "moves at a rate scaled by the depth of its layer",
        ),
    ):
        if names:
            text = f"the alpha of {len(names)} of {len(gates)} gates ({_some(names)}) {what}. {remedy}"
            warnings.warn(text, stacklevel=4)


class Counted:
    """How often a penalty counts between two steps: gradients that flow into it tell, whatever the loop does."""

    def __init__(self) -> None:
        self.flown: list[Tensor] = []
        self.told = False

    def watch(self, penalty: Tensor) -> None:
        """Note the gradient that will arrive at a penalty."""
        if penalty.requires_grad and not self.told and not torch.compiler.is_compiling():
            penalty.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self.flown.append(gradient.detach())

    def settle(self) -> None:
        """A step of the prior: warn, the first time, if its penalty counted more than once."""
        flown, self.flown = self.flown, []
        if len(flown) < 2 or self.told:
            return
        weights = torch.stack([gradient.float().cpu() for gradient in flown])
        if float(weights.max()) > _SCALED or float(weights.sum()) <= 1 + _MORE:
            return
        self.told = True
        text = (
            f"the penalty of the prior was added {len(flown)} times before prior.step(), and counts "
            f"{float(weights.sum()):g} times. Where gradients accumulate, divide it like the rest of the loss, add it "
            "once, or leave it to linearize.integrations.attach(prior, optimizer)."
        )
        warnings.warn(text, stacklevel=3)

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        return Counted()

    def __getstate__(self) -> dict[str, Any]:
        return {"flown": [], "told": self.told}


def _name(gate: ChannelGate, place: int) -> str:
    return gate.site.name if gate.site is not None else f"act {place}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

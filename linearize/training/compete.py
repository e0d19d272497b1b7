"""Channels of all layers compete for a given number of linear places, on a schedule.

Every channel is in one of three states: *free* (it can still be chosen), *driven* (it was chosen, and its alpha moves
to 1), or *frozen*. Shape letters: T channels of all gates together, in order of execution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.errors import TrainingError, UsageError
from linearize.gating.gate import ChannelGate
from linearize.gating.sharded import put, unsharded

__all__ = ["SCHEDULES", "Competition", "channel_costs"]

# Share of the way that is gone when the share u of the time is: from 0 to 1, never backwards.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,  # slow, fast, slow
    "cubic": lambda u: 1 - (1 - u) ** 3,  # early, when there is most time left to recover (Zhu and Gupta, 2017)
}


def channel_costs(gates: Sequence[ChannelGate]) -> Tensor:
    """Multiply-adds saved by collapsing each channel, float64 (T,), on the CPU.

    Raises:
        UsageError: a gate does not know its site, or no channel would save anything.
    """
    rows = []
    for index, gate in enumerate(gates):
        if gate.site is None:
            remedy = "Count channels instead, or put the gates in with linearize.convert."
            raise UsageError(f"gate {index}", "found no site, so what its channels cost is unknown", remedy)
        saved = 0.0 if gate.site.reason else gate.site.saved
        rows.append(torch.full((gate.channels,), saved, dtype=torch.float64))
    costs = torch.cat(rows)
    if not costs.sum() > 0:
        raise UsageError("SparsityPrior", "found no channel that saves cost if collapsed", "Count channels instead.")
    return costs


class Competition:
    """Reach an exact share of linear channels (or of their cost) at step `steps`.

    At each step the schedule says how much must be won by then; the free channels of the highest score win
    it. A winner's alpha is led to 1 in a straight line over `ramp * steps` steps, and frozen there. The
    others' alpha is kept below `1 - step / steps`, so that at the end every channel is either linear or the
    plain activation.

    Args:
        gates: in order of execution.
        goal: the worth that is linear at the end: the first set of channels that reaches it.
        steps: number of calls of `advance` until then.
        schedule: one of `SCHEDULES`.
        ramp: share of the steps that a winner takes from its alpha to 1.
        worth: (T,) float64, what each channel counts towards the goal.
        weight: (T,) factor on each channel's score.
        ease: (T,) head start of each channel's score, in [0, 1].
    """

    def __init__(
        self,
        gates: Sequence[ChannelGate],
        *,
        goal: float,
        steps: int,
        schedule: str,
        ramp: float,
        worth: Tensor,
        weight: Tensor,
        ease: Tensor,
    ) -> None:
        self.gates, self.steps = list(gates), steps
        self.shape = SCHEDULES[schedule]
        self.ramp = min(round(ramp * steps), steps - 1)
        self.worth, self.weight, self.ease = worth, weight, ease
        self.won = self._frozen()
        self.start = torch.zeros_like(self.won, dtype=torch.int64)  # step at which a channel won
        self.origin = torch.ones_like(worth)  # its alpha then
        self.before = float(worth[self.won].sum())
        self.after = goal * (1 - 1e-12)  # sums of costs are rounded: do not take one channel more for that
        if self.before > goal:
            share, target = self.before / float(worth.sum()), goal / float(worth.sum())
            found = f"found a share of {share:.4f} frozen already, above the target {target:.4f}"
            raise UsageError("SparsityPrior", found, "Raise the target.")

    def _frozen(self) -> Tensor:
        return torch.cat([gate.frozen.to(self.worth.device) for gate in self.gates])

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Choose winners, lead their alphas on, hold the others below the bound; `step` starts at 1."""
        device = self._follow()
        alpha = torch.cat([unsharded(gate.alpha).to(device, torch.float64) for gate in self.gates])
        self.won |= self._frozen()  # the user may freeze channels at any time
        share = self.shape(min(1.0, step / (self.steps - self.ramp)))
        need = self.before + (self.after - self.before) * share
        new = self._winners(alpha, need)
        self.start.masked_fill_(new, step)
        self.origin = torch.where(new, alpha.clamp(0, 1), self.origin)
        self.won |= new

        gone = ((step - self.start).double() / self.ramp).clamp(max=1) if self.ramp else self.won.double()
        bound = max(0.0, 1 - step / self.steps)
        driven = self.origin + (1 - self.origin) * gone
        alpha = torch.where(self.won, torch.maximum(alpha, driven), alpha.clamp(max=bound)).clamp(0, 1)
        done = self.won & (alpha >= 1)  # of itself, before it was led there, or because its time was over
        sizes = [gate.channels for gate in self.gates]
        for gate, values, mask in zip(self.gates, alpha.split(sizes), done.split(sizes), strict=True):
            put(gate.alpha, values)
            gate.linearize_(mask | gate.frozen.to(device))

    def _follow(self) -> torch.device:
        """Go where the first gate is: the model may have been moved."""
        device = self.gates[0].alpha.device
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        for name in ("worth", "weight", "ease", "won", "start", "origin"):
            setattr(self, name, getattr(self, name).to(device))
        return device

    def _winners(self, alpha: Tensor, need: Tensor | float) -> Tensor:
        """The free channels, best score first, until their worth and that of those who won reaches `need`.

        Equal scores go to the channel that is executed first. Nothing here waits for the device.
        """
        score = ((alpha + self.ease) * self.weight).masked_fill(self.won, -math.inf)
        order = torch.argsort(score, descending=True, stable=True)
        worth = self.worth.masked_fill(self.won, 0)[order]
        reached = (self.worth * self.won).sum() + worth.cumsum(0) - worth
        chosen = (reached < need) & (worth > 0)
        return torch.zeros_like(self.won).scatter(0, order, chosen)

    def state_dict(self) -> dict[str, Any]:
        """What `advance` needs besides the gates."""
        return {"won": self.won, "start": self.start, "origin": self.origin, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            TrainingError: it was taken from another number of channels.
        """
        if any(state[name].shape != self.won.shape for name in ("won", "start", "origin")):
            found = f"found the state of {len(state['won'])} channels, but the model has {len(self.won)}"
            raise TrainingError("SparsityPrior", found, "Resume with the model and the options of that run.")
        self.won, self.start = state["won"].clone(), state["start"].clone()
        self.origin, self.before = state["origin"].clone(), float(state["before"])
        self._follow()

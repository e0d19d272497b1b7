"""The path from a model to its planned state: gates and weights move together on a schedule while the model trains.

At the start, the model is unchanged. At the end, it is the closed form of the plan, plus everything that training has
added on the way. It is used like a prior: `finetune` calls `step` after each step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize import checks
from linearize.errors import TrainingError, UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.training.compete import SCHEDULES

__all__ = ["PlannedPath"]


@dataclass(frozen=True)
class _Move:
    """A parameter, and how far it has to go in all."""

    parameter: nn.Parameter
    way: Tensor


class PlannedPath:
    """Moves chosen channels from their activation to their line, and weights by a given difference, in `steps` steps.

    What training adds to the weights is kept: only the planned difference is added, bit by bit.

    Args:
        model: gated.
        masks: by site name, the channels that shall be linear, bool (C,). Their slope and intercept must be set.
        ways: by parameter name, the difference that is to be added in all.
        steps: calls of `step` until then.
        schedule: one of `SCHEDULES`, the pace.

    Raises:
        UsageError: a name is unknown, or an argument out of range.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 4), ChannelGate(nn.ReLU(), 4), nn.Linear(4, 2))
        >>> path = PlannedPath(model, {"1": torch.ones(4, dtype=torch.bool)}, {"2.bias": torch.ones(2)}, steps=3)
        >>> for _ in range(3):
        ...     path.step()  # after optimizer.step()
        >>> model[1].linear.all().item(), path.share
        (True, 1.0)
    """

    kind = "path"
    competition = None  # it has a schedule of its own

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        ways: Mapping[str, Tensor],
        *,
        steps: int,
        schedule: str = "cosine",
    ) -> None:
        checks.choice("schedule", schedule, tuple(SCHEDULES))
        checks.whole("steps", steps, 1)
        named, parameters = gates(model), dict(model.named_parameters())
        unknown = [*(set(masks) - set(named)), *(set(ways) - set(parameters))]
        if unknown:
            raise UsageError("PlannedPath", f"found {unknown[0]!r}, which the model does not have", "Check the names.")
        self.gates: list[ChannelGate] = list(named.values())
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        self.steps, self.steps_taken = steps, 0
        self._named = named
        self._shape = SCHEDULES[schedule]
        self._moves = {
            name: _Move(parameters[name], way.to(parameters[name])) for name, way in ways.items() if way.numel()
        }

    def __call__(self) -> Tensor:
        """The penalty: none."""
        return torch.zeros((), device=self.gates[0].alpha.device if self.gates else None)

    @torch.no_grad()
    def step(self) -> None:
        """Go one step of the path. At the last step the channels are frozen as linear."""
        before = self._gone()
        self.steps_taken += 1
        now = self._gone()
        for move in self._moves.values():
            move.parameter.add_(move.way.to(move.parameter), alpha=now - before)
        for name, gate in self._named.items():
            mask = self.masks.get(name)
            if mask is None:
                gate.alpha.masked_fill_(~gate.frozen, 0)
                continue
            mask = mask.to(gate.alpha.device)
            gate.alpha.copy_(torch.where(mask, now, 0.0).to(gate.alpha).masked_fill(gate.frozen, 1))
            if now >= 1:
                gate.linearize_(mask)

    def _gone(self) -> float:
        return self._shape(min(1.0, self.steps_taken / self.steps)) if self.steps_taken < self.steps else 1.0

    @property
    def share(self) -> float:
        """Share of channels that are linear now."""
        linear = sum(int(gate.linear.sum()) for gate in self.gates)
        return linear / max(1, sum(gate.channels for gate in self.gates))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in addition to the model."""
        ways = {name: move.way for name, move in self._moves.items()}
        plain = {"kind": self.kind, "steps_taken": self.steps_taken, "steps": self.steps}
        return {**plain, "ways": ways, "masks": dict(self.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            TrainingError: the state is of another kind of prior, or of another way.
        """
        same = state["kind"] == self.kind and state["steps"] == self.steps
        masks = state["masks"].keys() == self.masks.keys() and all(
            torch.equal(mask.cpu(), self.masks[name].cpu()) for name, mask in state["masks"].items()
        )
        if not same or not masks or set(state["ways"]) != set(self._moves):
            found = "found the state of another prior or of another plan"
            raise TrainingError("PlannedPath", found, "Resume with the plan and the options of that run.")
        if any(way.shape != self._moves[name].way.shape for name, way in state["ways"].items()):
            found = "found the ways of parameters of other shapes"
            raise TrainingError("PlannedPath", found, "Resume with the plan and the options of that run.")
        self.steps_taken = int(state["steps_taken"])
        for name, way in state["ways"].items():
            move = self._moves[name]
            self._moves[name] = _Move(move.parameter, way.to(move.way))

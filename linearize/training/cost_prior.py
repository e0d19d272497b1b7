"""A sparsity prior on cost: channels of all sites compete for what a budget leaves, and may come back until the end.

It is used like the other priors: `finetune` adds `prior()` to the loss and calls `prior.step()` after each step of the
optimizer. Three things come together:

- *The wish.* Each channel has a wish to go. It begins with the order that the planner predicts. Then the optimizer
  moves it: alpha has the gradient of the loss, and a pull towards going in proportion to the cost that goes with the
  channel. What the optimizer makes of the two (AdamW divides by the size of the gradients, so that a channel which
  matters hardly moves) is added to the wish. The pull is as strong as the median channel's gradient.
- *The decision.* A number of times, at a cost that falls on a schedule to the aim, the channels of the largest wish go,
  and no others. One that is gone can be kept again: nothing is frozen before the last decision.
- *The move.* Until the next decision, alpha goes in a straight line to 1 or 0. The weights that read the channels go
  with it: those of the others take over what they can predict of a channel that goes, and hand it back to one that
  returns (`Slot.hand_over`).

Sources: the prior of Ali Mehmeti-Goepel and Disselhoff, "Nonlinear Advantage", ICML 2023; for the return of channels
Evci et al., "Rigging the Lottery", ICML 2020. Shape letters: C channels of a gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import TrainingError
from linearize.gating.gate import ChannelGate, gates
from linearize.training.auction import PriceOf, chosen
from linearize.training.compete import SCHEDULES
from linearize.training.slots import Slot, before_any_cut

__all__ = ["CostPrior"]

_DECISIONS = 20
# How far a wish goes that training pulls one way all the time: half of the way from the last place to the first. With
# more, short trainings were worse: a single channel's gradient does not know what the others would make up for.
_REACH = 0.5
_MARGIN = 0.05  # a channel changes sides for no smaller difference
_MEMORY = 0.9  # of the mean of squared gradients


class CostPrior:
    """Lets channels go until the cost of a model is within a budget, in `steps` calls of `step`.

    Args:
        model: gated. Its gates have the lines that channels go to.
        slots: what may move.
        price: the share of the original's cost that is left, for the numbers of channels gone, by slot.
        aim: the share that may be left at the end.
        steps: calls of `step` until all is decided.
        gone: by slot, channels that are gone already, and the share then is `aim` from the start; None for none.
    """

    kind = "cost"
    competition = None  # it has decisions of its own

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        price: PriceOf,
        *,
        aim: float,
        steps: int,
        gone: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.price, self.aim, self.steps = model, price, aim, steps
        self.slots = {slot.name: slot for slot in slots}
        self.gates: list[ChannelGate] = list(gates(model).values())
        self._named = gates(model)
        none = {name: torch.zeros(slot.channels, dtype=torch.bool) for name, slot in self.slots.items()}
        self.start = none if gone is None else {name: gone[name].cpu() for name in self.slots}
        self.gone = {name: mask.clone() for name, mask in self.start.items()}
        self.moving = gone is None  # the cost falls; else it is where it shall be
        self.wish = before_any_cut(self.slots, self.start)
        self.whole = price(self._counts(none)) if self.moving else aim
        self.steps_taken, self.weight, self.frozen = 0, 0.0, False
        self.points: list[dict[str, float]] = []
        self._squares = {name: torch.zeros(slot.channels, dtype=torch.float64) for name, slot in self.slots.items()}
        self._heard: list[float] = []
        savings = [slot.saving for slot in slots for _ in range(slot.channels)]
        mean = sum(savings) / max(1, len(savings))
        self._pull = {name: slot.saving / mean for name, slot in self.slots.items()}
        self._from = {name: self._alpha(name) for name in self.slots}  # where the present move began
        self._left = {name: self._alpha(name) for name in self._named}  # as the last step left it
        self._ways: dict[str, Tensor] = {}

    def __call__(self) -> Tensor:
        """The penalty: what the channels that are there cost, by the weight of this step."""
        total = torch.zeros((), device=self.gates[0].alpha.device if self.gates else None)
        for name in self.slots if self.weight and not self.frozen else ():
            gate = self._named[name]
            total = total + self._pull[name] * (1 - gate.alpha).masked_fill(gate.frozen, 0).sum().to(total)
        return self.weight * total

    def hear(self, record: Mapping[str, float]) -> None:
        """Record the task loss of a step for the curve in the report. The penalty is no part of it."""
        if not self.frozen:
            self._heard.append(record["loss"] - record.get("prior", 0.0))

    @torch.no_grad()
    def step(self) -> None:
        """Read the wishes, decide if it is time to, and move on. After `steps` calls nothing changes any more."""
        self.steps_taken += 1
        if not self.frozen:
            self._read()
        for name, alpha in self._left.items():  # the optimizer's change was a wish, and is no more than that
            self._named[name].alpha.copy_(alpha)
        if self.frozen:
            return
        cuts = [index * self.steps // self._decisions for index in range(self._decisions + 1)]
        index = next(i for i in range(self._decisions) if cuts[i] < self.steps_taken <= cuts[i + 1])
        length, place = cuts[index + 1] - cuts[index], self.steps_taken - cuts[index]
        if place == 1:
            share = SCHEDULES["cosine"]((index + 1) / self._decisions)
            self._decide(self.whole + (self.aim - self.whole) * share if share < 1 else self.aim)
        self._move(place, length)
        if self.steps_taken >= self.steps:
            self._freeze()

    @torch.no_grad()
    def finish(self, aim: float | None = None) -> None:
        """Decide at once, for another aim if one is given, and freeze. Channels that are frozen stay gone."""
        self.aim = self.aim if aim is None else aim
        self._decide(self.aim)
        self._move(1, 1)
        self._freeze()

    @property
    def share(self) -> float:
        """The share of the cost that is left, as promised, once the present move is over."""
        return self.price(self._counts(self.gone))

    @property
    def _decisions(self) -> int:
        return min(_DECISIONS, self.steps)

    def _counts(self, gone: Mapping[str, Tensor]) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in gone.items()}

    def _alpha(self, name: str) -> Tensor:
        return self._named[name].alpha.detach().double().cpu().clone()

    def _read(self) -> None:
        """Add to the wishes what the optimizer did to alpha since the last step, and weigh the penalty anew."""
        changes = {
            name: (self._alpha(name) - self._left[name]).masked_fill(self._fixed(name), 0) for name in self.slots
        }
        largest = max((float(change.abs().max()) for change in changes.values()), default=0.0)
        for name, change in changes.items():
            if largest > 0:
                self.wish[name] = self.wish[name] + change * (_REACH / largest / self.steps)
        ratios = []
        for name in self.slots:
            gradient, free = self._named[name].alpha.grad, ~self._fixed(name)
            if gradient is None:
                continue
            own = gradient.detach().double().cpu() + self.weight * self._pull[name]  # without that of the penalty
            self._squares[name] = _MEMORY * self._squares[name] + (1 - _MEMORY) * own.square()
            seen = self._squares[name] / (1 - _MEMORY**self.steps_taken)
            ratios.append(seen[free].sqrt() / self._pull[name])
        self.weight = float(torch.cat(ratios).median()) if ratios and sum(map(len, ratios)) else 0.0

    def _fixed(self, name: str) -> Tensor:
        return self._named[name].frozen.cpu() | self.slots[name].held

    def _decide(self, share: float) -> None:
        """Choose who is gone at a share of the cost, and find the ways of the weights that belong to it."""
        before = self.gone
        stays = {name: torch.where(self._named[name].frozen.cpu(), torch.inf, _MARGIN) for name in self.slots}
        scores = {n: torch.where(before[n], wish + stays[n], wish) for n, wish in self.wish.items()}
        self.gone = chosen(self.slots, scores, self.price, share, fill=share == self.aim)  # on the way it would churn
        self._from = {name: self._left[name].clone() for name in self.slots}
        self._ways = self._found_ways(before)
        went = sum(int((self.gone[name] & ~before[name]).sum()) for name in self.slots)
        back = sum(int((before[name] & ~self.gone[name]).sum()) for name in self.slots)
        point = {"step": float(self.steps_taken), "asked": share, "share": self.share, "went": went, "back": back}
        if self._heard:
            point["loss"] = sum(self._heard) / len(self._heard)
        self._heard = []
        self.points.append({name: float(value) for name, value in point.items()})

    def _found_ways(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How far parameters have to go, by name, for those that stay to take over, and to hand back."""
        moved = [n for n, slot in self.slots.items() if slot.hand_over and not torch.equal(before[n], self.gone[n])]
        own = dict(self.model.named_parameters())
        touched = {touch for name in moved for touch in self.slots[name].touches}
        held = {name: own[name].detach().clone() for name in sorted(touched)}
        for name in moved:
            hand_over = self.slots[name].hand_over
            if hand_over is not None:
                hand_over(self.model, before[name], self.gone[name])
        ways = {name: own[name].detach() - value for name, value in held.items()}
        for name, value in held.items():
            own[name].copy_(value)
        return {name: way for name, way in ways.items() if bool((way != 0).any())}

    def _move(self, place: int, length: int) -> None:
        """Go one of so many steps of the present move."""
        own = dict(self.model.named_parameters())
        for name, way in self._ways.items():
            own[name].add_(way.to(own[name]), alpha=1 / length)
        for name in self.slots:
            goal, gate = self.gone[name].double(), self._named[name]
            alpha = self._from[name] + (goal - self._from[name]) * (place / length) if place < length else goal
            gate.alpha.copy_(torch.where(self._fixed(name), 1.0, alpha))
            self._left[name] = self._alpha(name)
        if place == length:
            self._ways = {}

    def _freeze(self) -> None:
        self.frozen = True
        for name, mask in self.gone.items():
            gate = self._named[name]
            gate.linearize_(mask.to(gate.frozen.device))
            self._left[name] = self._alpha(name)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in addition to the model."""
        plain = ("kind", "steps_taken", "steps", "aim", "weight", "frozen")
        held = ("gone", "wish", "_squares", "_from", "_left", "_ways")
        state = {name: getattr(self, name) for name in plain} | {name: dict(getattr(self, name)) for name in held}
        return {**state, "points": [dict(point) for point in self.points], "heard": list(self._heard)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            TrainingError: the state is of another kind of prior, or of other slots.
        """
        same = state["kind"] == self.kind and state["steps"] == self.steps and set(state["wish"]) == set(self.slots)
        if not same or any(len(wish) != self.slots[name].channels for name, wish in state["wish"].items()):
            found = "found the state of another prior or of other sites"
            raise TrainingError("CostPrior", found, "Resume with the model and the options of that run.")
        for name in ("gone", "wish", "_squares", "_from", "_left", "_ways"):
            setattr(self, name, {key: value.clone() for key, value in state[name].items()})
        self.steps_taken, self.weight, self.aim = int(state["steps_taken"]), float(state["weight"]), float(state["aim"])
        self.frozen, self.points = bool(state["frozen"]), [dict(point) for point in state["points"]]
        self._heard = list(state["heard"])

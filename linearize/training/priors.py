"""Sparsity priors: they pull the channels of a gated model to their straight line, and freeze them there.

A training loop of your own needs only these lines::

    prior = SparsityPrior(model, kind="target", target=0.6, steps=epochs * len(loader))
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, gate_lr=1e-2, weight_decay=0.05))
    loss = criterion(model(x), y) + prior()     # instead of the criterion alone
    prior.step()                                # after optimizer.step()

Sources: "paper" is the prior of Ali Mehmeti-Goepel and Disselhoff, "Nonlinear Advantage", ICML 2023;
"folding" that of Dror et al., "Layer Folding", BMVC 2022. Shape letters: T channels of all gates together, in
order of execution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from linearize import checks
from linearize.errors import TrainingError, UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.gating.groups import groups_of
from linearize.gating.sharded import put, unsharded
from linearize.training.compete import SCHEDULES, Competition, channel_costs
from linearize.training.told import Counted, tell_of_frozen

if TYPE_CHECKING:
    from linearize.calibrate import Calibration

__all__ = ["SparsityPrior", "param_groups"]

PriorKind = Literal["paper", "folding", "target"]
PriorUnit = Literal["channels", "cost"]
Together = Literal["channels", "sites", "blocks"]


class SparsityPrior:
    """A penalty on nonlinear channels, and the freezing of linear channels after each optimizer step.

    The penalty of each kind, over the channels that are not frozen:

    - "paper": `weight * sum |1 - alpha| ** p`
    - "folding": `weight * sum |1 - alpha ** 2|`
    - "target": as "paper", but `weight` may be 0, because `step` itself moves channels to 1. At call number `steps`,
      exactly the share `target` of the channels is linear, and all others have alpha 0. See `compete.py`.

    Args:
        model: a model with gates.
        kind: see above.
        weight: factor of the penalty; if None, 1e-4, or 0 for "target".
        p: exponent of "paper" and "target".
        target: "target" only: share in (0, 1] that is linear at the end. `by` says what is counted. A number of
            channels is rounded to the nearest integer, and up at one half. For cost, the first set of channels
            that reaches the share is taken.
        steps: "target" only: number of calls of `step` until the share is reached.
        schedule: "target" only: how fast channels are chosen: "linear", "cosine" or "cubic" (the earliest).
        ramp: "target" only: share of the steps in which a chosen channel moves from its alpha to 1.
        by: "target" only: count "channels", or "cost", the multiply-adds that collapsing them saves.
        cost_weighted: multiply the penalty and the score of each channel by the cost that collapsing it saves,
            relative to the average channel.
        calibration: the result of `linearize.calibrate`. With "target", it raises the score of channels whose line
            fits well: the channel with the smallest residual of all layers gets 1 more, that with the largest 0.
        tolerance: a channel whose alpha is at least `1 - tolerance` after a step is frozen.
        together: which channels share one alpha: "channels" (each has its own), "sites" (all of a site, as in "Layer
            Folding"), or "blocks" (all sites that share maps, such as an inverted residual, as in Fu et al.,
            "DepthShrinker", ICML 2022). A block becomes linear as a whole and collapses into one map. Not for
            "target".

    Raises:
        UsageError: an argument is out of range or does not belong to the kind, or the model has no gates, or no
            costs are known for it.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 4), ChannelGate(nn.ReLU(), 4), nn.Linear(4, 2))
        >>> prior = SparsityPrior(model, kind="target", target=0.5, steps=10)
        >>> for _ in range(10):
        ...     prior.step()  # after optimizer.step()
        >>> model[1].linear
        tensor([ True,  True, False, False])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: PriorKind = "paper",
        weight: float | None = None,
        p: float = 0.5,
        target: float | None = None,
        steps: int | None = None,
        schedule: str = "cosine",
        ramp: float = 0.2,
        by: PriorUnit = "channels",
        cost_weighted: bool = False,
        calibration: Calibration | None = None,
        tolerance: float = 1e-3,
        together: Together = "channels",
    ) -> None:
        checks.choice("kind", kind, get_args(PriorKind))
        weight = (0.0 if kind == "target" else 1e-4) if weight is None else weight
        checks.number("weight", weight, least=0)
        checks.number("p", p, above=0)
        checks.number("tolerance", tolerance, above=0)
        if tolerance >= 1:
            checks.refuse("tolerance", tolerance, "a number between 0 and 1")
        checks.choice("by", by, get_args(PriorUnit))
        checks.choice("together", together, get_args(Together))
        checks.boolean("cost_weighted", cost_weighted)
        if kind == "target" and together != "channels":
            checks.refuse("together", together, '"channels" with kind="target"')
        named = gates(checks.module("model", model))
        if not named:
            raise UsageError("SparsityPrior", "found no gate in the model", "Pass linearize.convert(model).")
        for gate in named.values():
            gate.check()
        self.kind, self.weight, self.p, self.tolerance = kind, float(weight), float(p), float(tolerance)
        self.gates = list(named.values())
        self.steps_taken = 0
        self._counted, self._begun = Counted(), False
        self._tied: list[list[ChannelGate]] = []
        if together != "channels":
            groups = groups_of(model) if together == "blocks" else [[name] for name in named]
            self._tied = [[named[name] for name in group] for group in groups]
        sizes = [gate.channels for gate in self.gates]
        ones = torch.ones(sum(sizes), dtype=torch.float64)
        costs = channel_costs(self.gates) if cost_weighted or by == "cost" else ones
        relative = costs / costs.mean() if cost_weighted else ones
        self._weights = relative.split(sizes) if cost_weighted else None
        self.competition: Competition | None = None
        if kind != "target":
            for name, value in (("target", target), ("steps", steps)):
                if value is not None:
                    checks.refuse(name, value, 'it with kind="target" only')
            return
        checks.share("target", target, positive=True)
        checks.whole("steps", steps, 1)
        checks.choice("schedule", schedule, tuple(SCHEDULES))
        if not checks.is_number(ramp) or not 0 <= ramp < 1:
            checks.refuse("ramp", ramp, "a share of the steps, from 0 to below 1")
        worth = costs if by == "cost" else ones
        goal = (target or 0) * float(worth.sum())
        self.competition = Competition(
            self.gates,
            goal=goal if by == "cost" else math.floor(goal + 0.5),
            steps=steps or 1,
            schedule=schedule,
            ramp=ramp,
            worth=worth,
            weight=relative,
            ease=_ease(named, calibration) if calibration is not None else 0 * ones,
        )

    def __call__(self) -> Tensor:
        """The penalty: a scalar to add to the loss.

        The slope of `|1 - alpha| ** p` is infinite at 1 for p < 1, so the distance is kept from falling
        below the tolerance; a channel that comes so close is frozen by `step` and leaves the sum.

        Warns:
            UserWarning: gates are not trained, which is told once.
        """
        self._begin()
        total = torch.zeros((), dtype=torch.float32, device=self.gates[0].alpha.device)
        if self.weight == 0:
            return total
        for index, gate in enumerate(self.gates):
            alpha = unsharded(gate.alpha)
            if self.kind == "folding":
                distance = (1 - alpha.square()).abs()
            else:
                distance = (1 - alpha).abs().clamp(min=self.tolerance) ** self.p
            if self._weights is not None:
                distance = distance * self._weights[index].to(distance)
            total = total + distance.masked_fill(gate.frozen, 0).sum().to(total)
        penalty = self.weight * total
        self._counted.watch(penalty)
        return penalty

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            tell_of_frozen(self.gates)

    @torch.no_grad()
    def step(self) -> None:
        """Call this after the optimizer's step. It clips alpha to [0, 1] and freezes the channels that reached 1.

        With "target" it also chooses channels by the schedule, and moves them on.

        Warns:
            UserWarning: since the last step the penalty counted more than once in the gradients.
        """
        self._begin()
        self._counted.settle()
        self.steps_taken += 1
        if self.competition is not None:
            self.competition.advance(self.steps_taken)
            return
        for group in self._tied:
            alphas = [unsharded(gate.alpha) for gate in group]
            mean = torch.cat([alpha[~gate.frozen] for gate, alpha in zip(group, alphas, strict=True)]).mean()
            for gate, alpha in zip(group, alphas, strict=True):
                put(gate.alpha, torch.where(gate.frozen, alpha, mean))
        for gate in self.gates:
            alpha = unsharded(gate.alpha).clamp(0, 1)
            put(gate.alpha, alpha)
            gate.linearize_(gate.frozen | (alpha >= 1 - self.tolerance))

    @property
    def share(self) -> float:
        """Share of channels that are linear now. On a GPU, this call waits for the device."""
        linear = torch.stack([gate.linear.sum().cpu() for gate in self.gates]).sum()
        return float(linear) / sum(gate.channels for gate in self.gates)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in addition to the model, as numbers and tensors."""
        state: dict[str, Any] = {"kind": self.kind, "steps_taken": self.steps_taken, "weight": self.weight}
        if self.competition is not None:
            state["competition"] = self.competition.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. The state of the model is loaded separately.

        Raises:
            TrainingError: the state is of another kind of prior or of other gates.
        """
        if state["kind"] != self.kind:
            found = f"found the state of a prior of kind {state['kind']!r}, not {self.kind!r}"
            raise TrainingError("SparsityPrior", found, "Resume with the options of that run.")
        if self.competition is not None:
            self.competition.load_state_dict(state["competition"])
        self.steps_taken, self.weight = int(state["steps_taken"]), float(state["weight"])


def param_groups(
    model: nn.Module, lr: float = 1e-3, gate_lr: float = 1e-2, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with weight decay for matrices and kernels only (no biases, norms or gates).

    Args:
        model: with or without gates. Parameters without gradient are left out. Shared parameters come once.
        lr: learning rate of everything except the gates.
        gate_lr: learning rate of the gates' alpha. It moves in [0, 1], however large the weights are.
        weight_decay: of parameters with two or more dimensions.

    Returns:
        Up to three groups, named "decay", "plain" and "gates". Empty groups are left out.

    Raises:
        UsageError: a rate is negative or not finite, or nothing in the model can be trained.

    Examples:
        >>> [group["name"] for group in param_groups(nn.Linear(2, 2), lr=1e-3)]
        ['decay', 'plain']
    """
    for name, value in {"lr": lr, "gate_lr": gate_lr, "weight_decay": weight_decay}.items():
        checks.number(name, value, least=0)
    checks.module("model", model)
    alphas = {id(module.alpha) for module in model.modules() if isinstance(module, ChannelGate)}
    kinds: dict[str, dict[str, Any]] = {
        "decay": {"lr": lr, "weight_decay": weight_decay},
        "plain": {"lr": lr, "weight_decay": 0.0},
        "gates": {"lr": gate_lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in kinds}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "gates" if id(parameter) in alphas else "decay" if parameter.dim() >= 2 else "plain"
            members[kind].append(parameter)
    if not any(members.values()):
        raise UsageError("param_groups", "found no parameter to train", "Set requires_grad on some of them.")
    return [{"name": name, "params": members[name], **kinds[name]} for name in kinds if members[name]]


def _ease(named: Mapping[str, ChannelGate], calibration: Calibration) -> Tensor:
    """Each channel's place by the residual of its line, over all layers: 1 for the least, 0 for the most; float64 (T,).

    Not the share of variance that the line explains: a few channels of a trained network carry values so large that
    the small part their line leaves outweighs all other channels together (docs/benchmarks.md).
    """
    if not isinstance(getattr(calibration, "sites", None), Mapping):
        checks.refuse("calibration", calibration, "what linearize.calibrate returned")
    rows = []
    for name, gate in named.items():
        site = calibration.sites.get(name)
        if site is None or len(site.residual) != gate.channels:
            found = "found no calibration of this gate" if site is None else "found another number of channels"
            raise UsageError(name, found, "Pass what calibrate returned for this very model.")
        rows.append(site.residual.double().cpu())
    residual = torch.cat(rows)
    place = torch.searchsorted(residual.sort().values, residual)  # channels with equal residuals share a place
    return 1 - place.double() / max(1, len(residual) - 1)

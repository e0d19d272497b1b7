"""Which channels lose their activation under a budget in nonlinear units: by plan, by SNL, at random.

A method's model has gates, which stay as they are while it is fine-tuned.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import linearize
from benchmarks.peers.subject import Candidate, Method, Subject
from benchmarks.peers.training import train
from benchmarks.runs import Plain
from linearize.planning.budget import Budget
from linearize.planning.carry_out import site_choices
from linearize.planning.search import searched
from linearize.planning.settle import settle
from linearize.planning.surveying import Wanted, survey

__all__ = ["planned", "selective", "share_left", "spread"]

_EVERY = 5  # steps between looks at the units that are left
_GROWTH = 1.15  # of the penalty, where a look sees too little progress
_LINEAR = 0.99  # alphas from here on count as 1
_GATE_RATE = 0.02
_TRIALS = 24  # plans tried with the real loss, on four batches


def units_of(gated: nn.Module) -> dict[str, int]:
    """Nonlinear units of each channel, by site."""
    return {name: gate.site.positions if gate.site is not None else 1 for name, gate in linearize.gates(gated).items()}


def share_left(gated: nn.Module) -> float:
    """Nonlinear units that are left over all."""
    units, named = units_of(gated), linearize.gates(gated)
    left = sum(units[name] * int((~gate.linear).sum()) for name, gate in named.items())
    return left / sum(units[name] * gate.channels for name, gate in named.items())


def freeze(gated: nn.Module) -> nn.Module:
    """The model with its gates as they are: linear channels for good, all others nonlinear."""
    for gate in linearize.gates(gated).values():
        mask = gate.linear
        gate.alpha.requires_grad_(False).zero_()
        gate.linearize_(mask)
    return gated


def planned(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
    """This project's plan: channels go to their lines, or out beside a refit and a skip, by what costs least."""
    gated = linearize.convert(subject.model, subject.example)
    wanted = Wanted("activations", seed=subject.seed)
    found = survey(subject.model, gated, subject.calibration, subject.example, wanted, progress=False)
    made = []
    for budget in budgets:
        around = searched(found, budget * found.total, subject.calibration, trials=_TRIALS, seed=subject.seed)
        settled = settle(around, Budget("activations", budget), subject.example)
        told: Plain = {"choices": [str(choice) for choice in site_choices(settled.choice).values()]}
        made.append(Candidate(budget, freeze(settled.gated).eval(), settled.reached, settled.met, told=told))
    return made


def spread(subject: Subject, budgets: Sequence[float], *, equal: bool) -> list[Candidate]:
    """Channels drawn at random, over the whole network or, with `equal`, the same share in each layer."""
    fitted = linearize.convert(subject.model, subject.example)
    linearize.calibrate(fitted, subject.calibration, progress=False)
    units = units_of(fitted)
    made = []
    for budget in budgets:
        model = copy.deepcopy(fitted)
        named = linearize.gates(model)
        generator = torch.Generator().manual_seed(subject.seed)
        every = [(name, channel) for name, gate in named.items() for channel in range(gate.channels)]
        order = torch.randperm(len(every), generator=generator).tolist()
        if equal:
            order = _layer_by_layer(order, every, {name: gate.channels for name, gate in named.items()})
        most = budget * sum(units[name] for name, _ in every)
        masks = {name: torch.ones(gate.channels, dtype=torch.bool) for name, gate in named.items()}
        for name, channel in (every[place] for place in order):
            if units[name] <= most:
                most -= units[name]
                masks[name][channel] = False
        for name, mask in masks.items():
            named[name].linearize_(mask)
        made.append(_candidate(budget, model))
    return made


def _layer_by_layer(order: Sequence[int], every: Sequence[tuple[str, int]], channels: Mapping[str, int]) -> list[int]:
    """The same order, but so that all layers have lost about the same share of their channels at any time."""
    seen = dict.fromkeys(channels, 0)
    keys = {}
    for place in order:
        name = every[place][0]
        seen[name] += 1
        keys[place] = seen[name] / channels[name]
    return sorted(order, key=lambda place: keys[place])


def selective(search: int, weight: float = 0.3) -> Method:
    """Selective network linearization, of channels (Cho et al., ICML 2022): an L1 penalty on 1 - alpha, which grows.

    Weights and alphas train by the loss of fine-tuning plus the penalty, each channel counting by its units. Whenever
    the units that are left have not fallen by their share, the penalty grows by a factor. When they are within the
    budget, alphas are rounded by a threshold and stay. Lines have slope 1 and intercept 0.

    Args:
        search: the most steps; then the channels with the largest alphas go, whatever is missing.
        weight: of the penalty at the start.
    """

    def method(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
        gated = linearize.convert(subject.model, subject.example)
        named, units = linearize.gates(gated), units_of(gated)
        total = sum(units[name] * gate.channels for name, gate in named.items())
        penalty, last, made = [weight], [1.0], list[Candidate]()

        def loss(model: nn.Module, step: int) -> Tensor:
            kept = [units[name] * (1 - gate.alpha).sum() for name, gate in named.items()]
            return subject.loss(model, step) + penalty[0] * torch.stack(kept).sum() / total

        def after(done: int) -> bool:
            for gate in named.values():
                gate.alpha.data.clamp_(0, 1)
            left = _rounded_share(gated)
            while len(made) < len(budgets) and left <= budgets[len(made)]:
                made.append(_rounded(budgets[len(made)], gated, subject.steps - done))
            if done % _EVERY == 0:
                if last[0] - left < _EVERY / search:
                    penalty[0] *= _GROWTH
                last[0] = left
            return len(made) == len(budgets)

        alphas = [gate.alpha for gate in named.values()]
        done = train(gated, loss, search, subject.lr, gates=alphas, gate_lr=_GATE_RATE, constant=True, after=after)
        return made + [_rounded(b, gated, subject.steps - done, force=True) for b in budgets[len(made) :]]

    return method


def _rounded_share(gated: nn.Module) -> float:
    units, named = units_of(gated), linearize.gates(gated)
    left = sum(units[name] * int((gate.alpha < _LINEAR).sum()) for name, gate in named.items())
    return left / sum(units[name] * gate.channels for name, gate in named.items())


def _rounded(budget: float, gated: nn.Module, steps: int, *, force: bool = False) -> Candidate:
    """A copy with its alphas rounded: by the threshold, or by whatever threshold the budget asks for."""
    model = copy.deepcopy(gated)
    named, units = linearize.gates(model), units_of(model)
    threshold = _LINEAR
    if force:
        pairs = [(float(a), units[name]) for name, gate in named.items() for a in gate.alpha.detach()]
        most = budget * sum(count for _, count in pairs)
        for alpha, count in sorted(pairs):
            most -= count
            if most < 0:
                threshold = alpha
                break
    for gate in named.values():
        gate.linearize_(gate.alpha.detach() >= threshold)
    found = _candidate(budget, model)
    found.steps, found.told = steps, {"forced": force, "threshold": threshold}
    return found


def _candidate(budget: float, gated: nn.Module) -> Candidate:
    left = share_left(freeze(gated))
    return Candidate(budget, gated.eval(), left, left <= budget + 1e-9)

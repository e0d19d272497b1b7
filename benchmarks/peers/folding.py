"""Layer folding: whole activations become linear under a penalty, and what they stood between is folded into one map.

Dror et al., "Layer Folding: Neural Network Depth Reduction using Activation Linearization", BMVC 2022, on the gates and
the collapsing of this project: one alpha per activation, slope 1, intercept 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import linearize
from benchmarks.peers.subject import Candidate, Method, Subject
from benchmarks.peers.training import train
from linearize.gating.groups import groups_of

__all__ = ["layer_folding"]

_GATE_RATE = 0.02
_TOP = 1 - 1e-6


def layer_folding(weight: float = 1.0) -> Method:
    """The method: half of the fine-tuning steps search, with weights and alphas training; the rest is fine-tuning.

    The penalty is `weight` times the mean of 1 - alpha. Stretches become linear in the order of their alphas, ties by
    the mean over the search, until the FLOPs are within the budget; all other alphas go back to 0. Collapsing
    leaves what would cost more.
    """

    def method(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
        gated = linearize.convert(subject.model, subject.example)
        named = linearize.gates(gated)
        groups = [group for group in groups_of(gated) if all(_collapsible(named[name]) for name in group)]
        half = subject.steps // 2
        order = _search(subject, gated, groups, half, weight)
        made: list[Candidate] = []
        nearest, reached, count = subject.model, 1.0, 0
        for budget in budgets:
            while reached > budget and count < len(order):
                count += 1
                nearest = _folded(gated, [name for group in order[:count] for name in group])
                reached = subject.share(nearest)
            model = made[-1].model if made and made[-1].told["linear"] == count else nearest
            told = {"linear": count, "of": len(order)}
            made.append(Candidate(budget, model, reached, reached <= budget, steps=subject.steps - half, told=told))
        return made

    return method


def _collapsible(gate: linearize.ChannelGate) -> bool:
    return gate.site is not None and gate.site.reason is None and bool(gate.site.consumers)


def _search(
    subject: Subject, gated: nn.Module, groups: Sequence[Sequence[str]], steps: int, weight: float
) -> list[Sequence[str]]:
    """Train weights and alphas, one alpha for each activation; the groups, those that want to be linear first."""
    named = linearize.gates(gated)
    for gate in named.values():
        gate.alpha.requires_grad_(False)
    alphas = {name: named[name].alpha for group in groups for name in group}
    for alpha in alphas.values():
        alpha.requires_grad_(True)
        alpha.register_hook(lambda gradient: gradient.sum().expand_as(gradient))  # all channels move together
    sums = dict.fromkeys(alphas, 0.0)

    def loss(model: nn.Module, step: int) -> Tensor:
        return subject.loss(model, step) + weight * torch.stack([1 - alpha.mean() for alpha in alphas.values()]).mean()

    def after(_: int) -> bool:
        for name, alpha in alphas.items():
            alpha.data.clamp_(0, 1)
            sums[name] += float(alpha.detach().mean())
        return False

    train(gated, loss, steps, subject.lr, gates=alphas.values(), gate_lr=_GATE_RATE, after=after)

    def wish(group: Sequence[str]) -> tuple[float, float]:
        last = sum(min(float(alphas[name].detach().mean()), _TOP) for name in group) / len(group)
        return last, sum(sums[name] for name in group) / len(group)

    return sorted(groups, key=wish, reverse=True)


def _folded(gated: nn.Module, linear: Sequence[str]) -> nn.Module:
    """The collapsed model in which some activations are linear and all others are what they were."""
    model = copy.deepcopy(gated)
    for name, gate in linearize.gates(model).items():
        gate.alpha.data.zero_()
        if name in linear:
            gate.linearize_(torch.ones(gate.channels, dtype=torch.bool))
    return linearize.collapse(model).eval()

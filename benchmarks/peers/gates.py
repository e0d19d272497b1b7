"""This project's gates: channels go under a prior on what they cost, from the model as it is, or from a plan on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

import linearize
from benchmarks.peers.ours import alone, settled_for, surveyed
from benchmarks.peers.subject import Candidate, Method, Subject
from benchmarks.peers.training import train
from benchmarks.runs import Plain
from linearize.planning.budget import Budget
from linearize.planning.carry_out import site_choices
from linearize.planning.deciding import Deciding, from_nothing, from_plan

__all__ = ["gates"]

_DECIDES = 0.7  # of the steps of fine-tuning, as in `compress`; the rest is left to the collapsed model
_GATE_RATE = 0.01


def gates(*, both: bool, cache: Path | None = None, exclude: str | None = None) -> Method:
    """The method whose budgets are fractions of FLOPs. The steps in which gates decide count as fine-tuning.

    Args:
        both: start in the state of the plan that the method "plan" finds.
        cache: file of measured latencies.
        exclude: pattern of sites that stay as they are.
    """

    def method(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
        found = surveyed(subject, "flops", cache, exclude, timed=False)
        made = []
        for share in budgets:
            budget = Budget("flops", share)
            if both:
                plan = settled_for(subject, found, budget)
                goal, choices = plan.gated, site_choices(plan.choice)
                start = from_plan(found, budget, goal, choices, plan.reached, batch=subject.example)
            else:
                start = from_nothing(found, budget, batch=subject.example)
            made.append(_decided(subject, start, share))
        return made

    return method


def _decided(subject: Subject, start: Deciding, share: float) -> Candidate:
    start.rehearse()
    steps = max(1, int(_DECIDES * subject.steps))
    prior = start.prior(steps)

    def loss(model: nn.Module, step: int) -> Tensor:
        return subject.loss(model, step) + prior()

    def after(_: int) -> bool:
        prior.step()
        return False

    alphas = [gate.alpha for gate in linearize.gates(start.model).values()]
    train(start.model, loss, steps, subject.lr, gates=alphas, gate_lr=_GATE_RATE, after=after)
    end = start.end(prior)
    told: Plain = {name: sum(point[name] for point in prior.points) for name in ("went", "back")}
    return Candidate(share, alone(end.small), end.reached, end.met, steps=subject.steps - steps, told=told)

"""Budgets for the FLOPs of a model's FFNs, and FFNs that become one linear map each."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

import linearize
from benchmarks.peers.hidden import channels_of, cut
from benchmarks.peers.subject import Candidate, Subject
from benchmarks.runs import Plain
from linearize.families.option import Option
from linearize.planning.carry_out import collapsed, edited, planned
from linearize.planning.surveying import Wanted, survey

__all__ = ["of_hidden", "one_by_one", "relabelled"]


def of_hidden(subject: Subject, budgets: Sequence[float]) -> dict[float, float]:
    """Fractions of the whole model's FLOPs, and those of the hidden layers' FLOPs that they are."""
    model = copy.deepcopy(subject.model)
    removed = []
    for hidden in subject.hidden:
        channels = channels_of(model, hidden)
        removed.append(channels // 2 / channels)
        cut(model, hidden, torch.arange(channels - channels // 2))
    part = (1 - subject.share(model)) / (sum(removed) / len(removed))
    return {1 - (1 - budget) * part: budget for budget in budgets}


def relabelled(found: Plain, names: dict[float, float]) -> Plain:
    """The rows with budgets as they are called."""
    return {**found, "rows": [{**row, "budget": names[row["budget"]]} for row in found["rows"]]}


def one_by_one(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
    """Whole FFNs become one linear map each, fitted by least squares; those first that harm the output least."""
    gated = linearize.convert(subject.model, subject.example)
    wanted = Wanted("flops", seed=subject.seed, modules=False)
    found = survey(subject.model, gated, subject.calibration, subject.example, wanted, progress=False)
    linear: list[Option] = []
    for group in found.groups:
        whole = [option for option in group.options if all(choice.keep == 0 for choice in option.choices)]
        if whole:
            linear.append(min(whole, key=lambda option: option.loss))
    linear.sort(key=lambda option: option.loss)
    made: list[Candidate] = []
    model, reached, count = subject.model, 1.0, 0
    for budget in budgets:
        while reached > budget and count < len(linear):
            count += 1
            choices = {choice.site: choice for option in linear[:count] for choice in option.choices}
            planned_state = edited(found, choices)
            model = collapsed(planned_state, planned(planned_state, choices))
            reached = subject.share(model)
        told = {"linear": count, "of": len(linear)}
        if made and made[-1].told == told and made[-1].model is not None:
            model = made[-1].model
        made.append(Candidate(budget, model, reached, reached <= budget, told=told))
    return made

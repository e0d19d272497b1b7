"""Torch-Pruning: structured pruning by a dependency graph (Fang et al., "DepGraph", CVPR 2023), by its documentation.

One graph serves all budgets: pruning goes on in small steps, and whenever the FLOPs have come below a budget the model
is copied.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.peers.subject import Candidate, Method, Subject, labelled_loss
from linearize.running.batches import read_batch
from linearize.running.outputs import main_part

__all__ = ["torch_pruning"]

_STEPS = 60
_MOST = 0.97  # of the channels
_BATCHES = 2  # whose gradients rank the channels before each step


def torch_pruning(scope: Literal["all", "hidden"], importance: Literal["magnitude", "taylor"]) -> Method:
    """The method with one of two rules.

    Args:
        scope: "all" prunes whatever the library can, heads of attention declared, the last layer left; "hidden" only
            the channels that the plans here may change too.
        importance: "magnitude" is local and equal in all layers, "taylor" is global, by gradients of the task's loss
            (Molchanov et al., CVPR 2019), taken anew before each step.
    """

    def method(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
        model = copy.deepcopy(subject.model)
        made: list[Candidate] = []
        failed = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pruner = _pruner(subject, model, scope, importance)
                for step in range(_STEPS):
                    if importance == "taylor":
                        _gradients(subject, model, step)
                    pruner.step()
                    _declare_heads(model, pruner)
                    reached = subject.share(model)
                    model.zero_grad()
                    while len(made) < len(budgets) and reached <= budgets[len(made)]:
                        made.append(Candidate(budgets[len(made)], _checked(subject, model), reached, met=True))
                    if len(made) == len(budgets):
                        return made
                nearest = _checked(subject, model)
            except Exception as error:  # whatever it raises is the result
                failed, nearest, reached = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", None, 1.0
        return made + [Candidate(budget, nearest, reached, failed=failed) for budget in budgets[len(made) :]]

    return method


def _pruner(subject: Subject, model: nn.Module, scope: str, importance: str) -> Any:
    import torch_pruning as tp

    known = dict(model.named_modules())
    ignored = [known[name] for name in subject.last]
    if scope == "hidden":
        free = {name for hidden in subject.hidden for name in (*hidden.producers, *hidden.between)}
        maps = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
        ignored = [module for name, module in known.items() if isinstance(module, maps) and name not in free]
    taylor = importance == "taylor"
    rule = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance()
    return tp.pruner.BasePruner(
        model,
        subject.example,
        importance=rule,
        global_pruning=taylor,
        pruning_ratio=_MOST,
        max_pruning_ratio=_MOST,
        iterative_steps=_STEPS,
        ignored_layers=ignored,
        num_heads={known[name]: heads for name, heads in subject.heads.items()},
    )


def _gradients(subject: Subject, model: nn.Module, step: int) -> None:
    model.zero_grad()
    count = len(subject.calibration)
    for turn in range(_BATCHES):
        place = (step * _BATCHES + turn) % count
        _loss(model, subject.calibration[place], subject.seed + place).backward()


def _loss(model: nn.Module, raw: Any, seed: int) -> torch.Tensor:
    """The task's loss; without labels a random projection of the output, to which the same expansion applies."""
    batch = read_batch(model, raw)
    if batch.labels is not None:
        return labelled_loss(model, raw)
    output = main_part(model(*batch.args, **batch.kwargs)).tensor
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return (output * probe).sum() / len(output)


def _declare_heads(model: nn.Module, pruner: Any) -> None:
    """Attention of timm keeps its sizes as numbers, which the caller sets, as in the library's own examples."""
    for module in model.modules():
        qkv: Any = getattr(module, "qkv", None)
        if isinstance(qkv, nn.Linear) and qkv in pruner.num_heads:
            attention: Any = module
            attention.num_heads = pruner.num_heads[qkv]
            attention.head_dim = qkv.out_features // (3 * attention.num_heads)
            attention.attn_dim = attention.num_heads * attention.head_dim
            attention.scale = attention.head_dim**-0.5


def _checked(subject: Subject, model: nn.Module) -> nn.Module:
    """A copy that has been seen to run."""
    found = copy.deepcopy(model).eval()
    batch = read_batch(found, subject.calibration[0])
    with torch.no_grad():
        found(*batch.args, **batch.kwargs)
    return found

"""NVIDIA ModelOpt's FastNAS: widths by a sensitivity of each layer, by its documentation.

The library narrows one layer at a time and notes how far the score falls at each width. Then it takes the narrowest
widths whose fall is below one threshold for all layers, found by bisection. Tried with nvidia-modelopt 0.47.0 and
torchprofile 0.0.4 (it needs an attribute that 0.1.0 has no more).
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers.subject import Candidate, Subject, labelled_loss
from linearize.running.batches import read_batch
from linearize.running.models import evaluating

__all__ = ["modelopt"]

_SHARES = tuple(0.05 * i for i in range(1, 21))
_DIVISOR = 8  # of widths; the library's own 32 leaves small networks no choice
_BATCHES = 4  # that a width is scored on, by the task's loss


def modelopt(subject: Subject, budgets: Sequence[float]) -> list[Candidate]:
    """The method at each budget of FLOPs; the sensitivities are found once."""
    made: list[Candidate] = []
    with tempfile.TemporaryDirectory() as folder:
        for budget in budgets:
            try:
                with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    warnings.simplefilter("ignore")
                    small = _pruned(subject, budget, Path(folder) / "sensitivities.pth")
            except Exception as error:  # whatever it raises is the result
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                made.append(Candidate(budget, None, failed=text))
                continue
            reached = subject.share(small)
            made.append(Candidate(budget, small, reached, reached <= budget * 1.005))
    return made


def _pruned(subject: Subject, budget: float, sensitivities: Path) -> nn.Module:
    import modelopt.torch.opt as mto
    import modelopt.torch.prune as mtp

    some = subject.calibration[:_BATCHES]

    def score(model: nn.Module) -> float:
        with evaluating(model):
            return -sum(float(labelled_loss(model, raw)) for raw in some) / len(some)

    conv = {"channels_ratio": _SHARES, "kernel_size": (), "channel_divisor": _DIVISOR}
    rest = {"features_ratio": _SHARES, "feature_divisor": _DIVISOR}
    rules: dict[str, Any] = {"nn.Conv2d": {"*": conv}}
    rules |= {f"nn.{name}": {"*": rest} for name in ("Linear", "BatchNorm2d", "LayerNorm")}
    batch = read_batch(subject.model, subject.calibration[0])
    config = {"data_loader": subject.calibration, "score_func": score, "checkpoint": str(sensitivities)}
    config["collect_func"] = lambda raw: read_batch(subject.model, raw).args
    small, _ = mtp.prune(
        model=copy.deepcopy(subject.model),
        mode=[("fastnas", rules)],
        constraints={"flops": f"{100 * budget:.2f}%"},
        dummy_input=tuple(part[:1] for part in batch.args),
        config=config,
    )
    found: nn.Module = mto.ModeloptStateManager.remove_state(small) or small
    for parameter in found.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        found.eval()(*batch.args)
    return found

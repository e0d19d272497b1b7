"""Tiny models and jobs for the stress programs: fast enough to be run a thousand times, and deterministic on a CPU."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from linearize.storage.digest import take_in

__all__ = ["compress_job", "data", "digest", "finetune_job", "gated", "network", "report_facts", "unlabelled"]


def network(seed: int = 0) -> nn.Sequential:
    """Two activations, dropout, a norm with buffers; the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8), nn.BatchNorm1d(8),
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4),
        ).eval()  # fmt: skip


def data() -> list[tuple[Tensor, Tensor]]:
    """Twelve labelled batches."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, 16, 8, generator=generator)
    y = torch.randint(0, 4, (12, 16), generator=generator)
    return list(zip(x, y, strict=True))


def unlabelled() -> list[Tensor]:
    """The same without labels."""
    return [x for x, _ in data()]


def digest(model: nn.Module) -> str:
    """Of every bit of a model's state."""
    told = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        told.update(name.encode())
        take_in(told, tensor)
    return told.hexdigest()


def report_facts(result: linearize.Result) -> dict[str, Any]:
    """All of a result that does not depend on the clock."""
    report = result.report
    history = [{name: value for name, value in record.items() if name != "seconds"} for record in report.history]
    outcome = None if report.outcome is None else report.outcome.to_dict()
    facts = {
        "weights": digest(result.model),
        "plan": result.plan.to_json(),
        "outcome": outcome,
        "options": dict(report.options),
        "notes": list(report.notes),
        "history": history,
        "cost": [report.before.to_dict(), report.after.to_dict()],
    }
    told: dict[str, Any] = json.loads(json.dumps(facts))
    return told


@functools.cache
def _gated() -> nn.Module:
    """The network with gates: converting takes most of a job, and is the same every time."""
    with torch.random.fork_rng():
        return linearize.convert(network(), unlabelled()[0])


def gated() -> nn.Module:
    """A network with gates of one's own."""
    return copy.deepcopy(_gated())


def finetune_job(folder: Path, *, epochs: int = 3, **options: Any) -> dict[str, Any]:
    """Fine-tune a gated network with a prior, going on with what the folder holds; what came out, as plain data."""
    torch.manual_seed(1)
    model = gated()
    prior = linearize.SparsityPrior(model, kind="target", target=0.5, steps=epochs * 12)
    found = linearize.finetune(
        model, data(), epochs=epochs, prior=prior, checkpoint_dir=folder, resume=True, progress=False, **options
    )
    history = [{name: value for name, value in record.items() if name != "seconds"} for record in found.history]
    return {"weights": digest(found.model), "history": history, "steps": found.steps}


def compress_job(folder: Path | None, *, epochs: int = 2, progress: Any = False, **options: Any) -> dict[str, Any]:
    """Compress the network with fine-tuning, going on with what the folder holds; what came out, as plain data."""
    asked: dict[str, Any] = {"flops": 0.6, "search": 2, "rounds": 0, "cache": False, "sequential": True}
    asked |= {"finetune": {"epochs": epochs} if epochs else None, **options}
    return report_facts(linearize.compress(network(), data(), checkpoint_dir=folder, progress=progress, **asked))

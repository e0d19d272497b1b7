"""What each of several processes does in test_processes.py: `python -m tests.several CASE ... FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import linearize

OPTIONS: dict[str, Any] = {"rounds": 0, "progress": False, "cache": False, "search": 4}


def network(seed: int = 0) -> nn.Module:
    """Two FFNs."""
    torch.manual_seed(seed)
    parts = [nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12), nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 6)]
    return nn.Sequential(*parts).double().eval()


def batches() -> list[torch.Tensor]:
    """The whole data."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 12, dtype=torch.float64, generator=generator) for _ in range(12)]


def planned(data: list[torch.Tensor], folder: Path | None = None) -> dict[str, Any]:
    """A plan, what it is predicted to cost, and the weights that come of it."""
    result = linearize.compress(network(), data, flops=0.5, checkpoint_dir=folder, **OPTIONS)
    outcome = result.report.outcome
    return {
        "plan": [[s.site, s.form, sorted(s.linear), s.rank] for s in result.plan.sites],
        "loss": None if outcome is None else outcome.loss,
        "weights": [float(p.detach().abs().sum()) for p in result.model.parameters()],
    }


def calibrated(data: list[torch.Tensor]) -> list[float]:
    """Slopes and intercepts."""
    gated = linearize.convert(network(), batches()[0])
    linearize.calibrate(gated, data, progress=False)
    return [float(v) for gate in linearize.gates(gated).values() for v in (*gate.slope, *gate.intercept)]


def found(case: str, rank: int, count: int, folder: Path) -> Any:
    """What one process comes to in a case."""
    own = batches()[rank::count]
    if case == "same data":
        return {"plan": planned(batches()), "lines": calibrated(batches())}
    if case == "shares":
        return {"plan": planned(own), "lines": calibrated(own)}
    if case == "uneven":
        return {"lines": calibrated(batches()[:8] if rank == 0 else batches()[8:])}
    if case == "resume":
        planned(batches(), folder / "notes")
        return {"plan": planned(batches(), folder / "notes")}
    if case == "an error":
        return calibrated([*own[:-1], torch.full((32, 12), float("nan"), dtype=torch.float64)] if rank else own)
    gated = linearize.convert(network(rank if case == "other weights" else 0), batches()[0])
    if case == "a process dies" and rank:
        os._exit(3)
    return repr(linearize.calibrate(gated, own, progress=False))


def main() -> None:
    """Do what the cases say, and write what came of each."""
    *cases, folder = sys.argv[1:]
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    for case in cases:
        try:
            told[case] = found(case, rank, count, Path(folder))
        except linearize.LinearizeError as error:
            told[case] = {"error": str(error)}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()

"""What each of several processes does in test_fsdp.py: `python -m tests.fsdp FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import linearize
from linearize.integrations import attach, whole_state

STEPS = 12
KINDS: dict[str, dict[str, Any]] = {
    "target": {"kind": "target", "target": 0.5, "steps": STEPS},
    "folding": {"kind": "folding", "weight": 0.05},
    "sites": {"kind": "paper", "weight": 0.05, "together": "sites"},
}


def network() -> nn.Module:
    """Two FFNs with widths that no number of processes divides."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 6))
    second = nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 3))
    return linearize.convert(nn.Sequential(first, second).double(), torch.randn(2, 6, dtype=torch.float64))


def trained(
    model: nn.Module, options: dict[str, Any], part: Callable[[torch.Tensor], torch.Tensor], *, attached: bool
) -> dict[str, Any]:
    """Train a gated model on the part of each batch that is this process's; alphas and what is frozen afterwards."""
    prior = linearize.SparsityPrior(model, **options)
    optimizer = torch.optim.AdamW(linearize.param_groups(model, lr=1e-2, gate_lr=5e-2))
    if attached:
        attach(prior, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = part(torch.randn(12, 6, dtype=torch.float64, generator=generator))
        loss = (model(x) - x[:, :3].abs()).square().mean()
        (loss if attached else loss + prior()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not attached:
            prior.step()
    state = whole_state(model)
    return {
        "share": prior.share,
        "alphas": [value for name, tensor in state.items() if "alpha" in name for value in tensor.tolist()],
        "frozen": [value for name, tensor in state.items() if "frozen" in name for value in tensor.tolist()],
    }


def found(rank: int, count: int) -> dict[str, Any]:
    """What one process comes to."""
    from torch.distributed.fsdp import fully_shard

    told: dict[str, Any] = {}
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for name, options in KINDS.items():
        for attached in (False, True):
            model: Any = network()
            for block in model:
                fully_shard(block)
            fully_shard(model)
            told[f"{name}, {attached}"] = trained(model, options, lambda x: x.chunk(count)[rank], attached=attached)
    verbs: dict[str, Callable[[], object]] = {
        "summary": lambda: linearize.summary(model),
        "collapse": lambda: linearize.collapse(model),
        "save": lambda: linearize.save(model, "never.safetensors"),
        "calibrate": lambda: linearize.calibrate(model, [x], progress=False),
    }
    for verb, call in verbs.items():
        try:
            call()
        except linearize.LinearizeError as error:
            told[verb] = str(error)
    plain = network()
    plain.load_state_dict(whole_state(model))
    told["off"] = float((plain(x) - model(x)).abs().max())
    told["collapsed"] = linearize.verify(plain, linearize.collapse(plain, when="always"), x).passed
    return told


def main() -> None:
    """Write what this process came to."""
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, count = distributed.get_rank(), distributed.get_world_size()
    told = found(rank, count)
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

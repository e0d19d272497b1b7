"""What gates cost in training: time and peak memory of a step, gated against ungated.

    python benchmarks/training_step.py [--model vit_small_patch16_224] [--batch 8] [--rounds 15] [--dtype float32]

Both models take turns in one process, each round gives one ratio, and the table shows the median ratio with its
quartiles: absolute times on a shared machine mean little. The ratio of processor time, less disturbed by other
programs, stands beside it (on a CPU, best with --threads 1). Peak memory comes from the allocator: PyTorch's own on
CUDA, the profiler's record of every allocation on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch
from torch import nn

from linearize import convert


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, amp: torch.dtype) -> Callable[[], None]:
    """A function that does one whole training step of ``model``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    device = images.device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=amp == torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Wall time and processor time of one step, all queued work done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, busy = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most memory that one step holds beyond what was held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def state_bytes(model: nn.Module) -> int:
    """Weights and the optimizer's two moments: what a training run holds between its steps."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return 3 * weights + sum(b.numel() * b.element_size() for b in model.buffers())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of both models, as plain data."""
    import timm

    torch.manual_seed(0)
    device, amp = options.device, getattr(torch, options.dtype)
    plain = timm.create_model(options.model).to(device).train()
    gated = convert(plain)
    images = torch.randn(options.batch, *plain.default_cfg["input_size"], device=device)
    labels = torch.randint(0, 1000, (options.batch,), device=device)
    steps = [stepper(model, images, labels, amp) for model in (plain, gated)]
    for step in steps * 2:
        step()
    ratios, busy, times = [], [], []
    for turn in range(options.rounds):
        first, second = (0, 1) if turn % 2 == 0 else (1, 0)
        took = {first: seconds(steps[first], device), second: seconds(steps[second], device)}
        ratios.append(took[1][0] / took[0][0])
        busy.append(took[1][1] / took[0][1])
        times.append(took[0][0])
    low, middle, high = quantiles(ratios, n=4)
    busy_low, busy_middle, busy_high = quantiles(busy, n=4)
    growth = [peak_bytes(step, device) for step in steps]
    totals = [state_bytes(model) + grown for model, grown in zip((plain, gated), growth, strict=True)]
    return {
        "model": options.model,
        "batch": options.batch,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "time_ratio": middle,
        "time_ratio_quartiles": [low, high],
        "processor_time_ratio": busy_middle,
        "processor_time_ratio_quartiles": [busy_low, busy_high],
        "ungated_step_seconds": sorted(times)[len(times) // 2],
        "memory_ratio": totals[1] / totals[0],
        "memory_ratio_without_weights": growth[1] / growth[0],
        "ungated_peak_bytes": totals[0],
    }


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps to time")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options), indent=2))


if __name__ == "__main__":
    main()

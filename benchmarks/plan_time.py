"""What planning costs, phase by phase, in units of one forward pass over the same calibration data.

    python -m benchmarks.plan_time [--subjects minilm vit resnet llama] [--threads 1] [--json FILE]

Subjects have the true shapes of all-MiniLM-L6-v2, ViT-S/16, ResNet-50 and a small Llama (8 layers of 512, FFNs of
2048), with random weights: what planning costs depends on shapes, and on values only in how soon trials are given up.
The calibration data has 10 positions for each feature of the widest site. Time is processor time of this one process,
so that what else the machine does counts little; a forward pass is timed before and after planning. The budget is half
of the FLOPs, one-shot; the comparison of the results (verify, benchmark) is no part of planning.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import linearize
from linearize.report.timing import environment, write_json
from linearize.text_table import render

HERE = Path(__file__).resolve().parent
PHASES = ("convert", "observe", "options", "search", "settle", "other")
GOAL = 12.0  # passes

Subject = tuple[nn.Module, list[Any]]


def minilm() -> Subject:
    """A sentence encoder: 6 layers of 384, FFNs of 1536; sentences of 32 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    tokens = torch.randint(0, config.vocab_size, (600, 32))
    mask = torch.ones_like(tokens)
    return BertModel(config), [
        {"input_ids": t, "attention_mask": m} for t, m in zip(tokens.split(20), mask.split(20), strict=True)
    ]


def vit() -> Subject:
    """ViT-S/16 at 224 pixels: 12 layers of 384, FFNs of 1536; 197 positions an image."""
    import timm

    return timm.create_model("vit_small_patch16_224"), list(torch.randn(96, 3, 224, 224).split(8))


def resnet() -> Subject:
    """ResNet-50 at 224 pixels."""
    import timm

    return timm.create_model("resnet50"), list(torch.randn(96, 3, 224, 224).split(8))


def llama() -> Subject:
    """8 layers of 512, FFNs of 2048, 8 query and 2 key/value heads; lines of 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    tokens = torch.randint(0, config.vocab_size, (192, 128))
    return LlamaForCausalLM(config), [{"input_ids": t} for t in tokens.split(8)]


SUBJECTS: dict[str, Callable[[], Subject]] = {"minilm": minilm, "vit": vit, "resnet": resnet, "llama": llama}


def one_pass(model: nn.Module, batches: list[Any]) -> float:
    """Processor seconds of a forward pass over all batches, without gradients."""
    with torch.no_grad():
        start = time.process_time()
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
        return time.process_time() - start


class Clock:
    """Processor seconds by phase, by the lines that `compress` tells."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.trials = 0
        self.phase, self.since = "other", time.process_time()

    def __call__(self, line: str) -> None:
        """A line of progress."""
        now = time.process_time()
        self.seconds[self.phase] += now - self.since
        self.since = now
        word = re.split(r"[:,]", line.strip())[0].split(" ")[0]
        if word == "search":
            self.trials += 1
            self.phase = "search"
        elif word == "predicted":
            self.phase = "settle"
        else:
            self.phase = {"plan": "search", "survey": "observe"}.get(word, word if word in PHASES else "other")


def measure(name: str, budget: float) -> dict[str, Any]:
    """What planning for one subject took."""
    torch.manual_seed(0)
    model, batches = SUBJECTS[name]()
    model.eval()
    one_pass(model, batches[:1])
    before = one_pass(model, batches)
    clock = Clock()
    start = time.process_time()
    result = linearize.compress(model, batches, flops=budget, rounds=0, progress=clock)
    total = time.process_time() - start
    clock("done")
    after = one_pass(model, batches)
    unit = (before + after) / 2
    outcome = result.report.outcome
    return {
        "subject": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pass": unit,
        "pass before and after": [before, after],
        "seconds": total,
        "passes": total / unit,
        "phases": {phase: seconds / unit for phase, seconds in clock.seconds.items()},
        "trials": clock.trials,
        "reached": None if outcome is None else outcome.reached,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Passes by phase."""
    head = ("subject", "one pass", *PHASES, "passes in all", "trials")
    body = [
        (
            r["subject"],
            f"{r['pass']:.1f} s",
            *(f"{r['phases'][p]:.1f}" for p in PHASES),
            f"{r['passes']:.1f}",
            str(r["trials"]),
        )
        for r in rows
    ]
    return render(head, body)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "plan_time.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for name in asked.subjects:
        rows.append(measure(name, asked.budget))
        print(table(rows[-1:]), flush=True)
    write_json(asked.json, {"environment": environment(torch.device("cpu"), torch.float32), "subjects": rows})
    print(table(rows))


if __name__ == "__main__":
    main()

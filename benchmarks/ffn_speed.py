"""Does an FFN with linear channels run as much faster as its FLOPs promise? Target: at least 0.85 of it.

    python benchmarks/ffn_speed.py [--linear 0.75] [--batches 1 8 32] [--rounds 15] [--threads 2] [--eager]

The FFN of a ViT-small (384 -> 1536 -> 384, GELU, 197 tokens per image), with 75 % of its channels linear and
collapsed ("merged"), and with all of them linear ("vanished": one matrix). For scale, an ordinary FFN that has been
given as few FLOPs as the merged one by fewer hidden channels: what this machine makes of such FLOPs without any
surgery. Each of them eager and under `torch.compile`, if a compiler is there. All take turns within a round; a
speed-up is the median of the ratios within rounds, with its quartiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from linearize.cost import cost
from linearize.report.timing import quartiles, write_json
from linearize.text_table import render

HERE = Path(__file__).resolve().parent
COMPILED = ", compiled"


class Ffn(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, width) to tokens of the same shape."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


def collapsed(model: nn.Module, tokens: Tensor, share: float) -> nn.Module:
    """The FFN with a random share of its channels linear, collapsed; stops if that is another function."""
    gated = linearize.convert(model, tokens)
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.randperm(gate.channels) < round(share * gate.channels))
    result = linearize.collapse(gated).eval()
    assert linearize.verify(gated, result, tokens)
    return result


def compiler_works() -> str | None:
    """None, or what stops `torch.compile` here."""
    try:
        torch.compile(nn.GELU())(torch.randn(4))
    except Exception as error:  # a missing compiler shows itself in many ways
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def measure_one(models: dict[str, nn.Module], tokens: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Speed-ups at one batch size: over the eager original, and over the original run in the same way."""
    torch.compiler.reset()
    runs = dict(models)
    if options.compile:
        runs |= {name + COMPILED: torch.compile(model, fullgraph=True) for name, model in models.items()}  # type: ignore[misc]
    result = linearize.benchmark(runs, tokens, rounds=options.rounds, warmup=5, threads=options.threads)
    samples = {timing.model: timing.samples for timing in result.timings}
    flops = {name: cost(model, tokens).flops for name, model in models.items()}
    rows = []
    for name in runs:
        plain = name.removesuffix(COMPILED)
        base = next(iter(models)) + name.removeprefix(plain)
        promise = flops[next(iter(models))] / flops[plain]
        same = quartiles(_over(samples[base], samples[name]))
        rows.append(
            {
                "batch": len(tokens),
                "model": plain,
                "compiled": name != plain,
                "promise": promise,
                "speed_up": same,
                "kept": same[1] / promise,
                "over_eager_original": quartiles(_over(samples[next(iter(models))], samples[name])),
            }
        )
    return rows


def _over(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All batch sizes, as plain data."""
    torch.manual_seed(0)
    tokens = torch.randn(max(options.batches), options.tokens, options.width)
    original = Ffn(options.width, options.hidden).eval()
    merged = collapsed(original, tokens[:1], options.linear)
    macs = cost(merged, tokens[:1]).flops // (2 * options.tokens)
    models = {
        "original": original,
        "merged": merged,
        "vanished": collapsed(original, tokens[:1], 1.0),
        "ordinary of like FLOPs": Ffn(options.width, macs // (2 * options.width)).eval(),
    }
    trouble = None if not options.compile else compiler_works()
    options.compile = options.compile and trouble is None
    rows = [row for size in options.batches for row in measure_one(models, tokens[:size], options)]
    facts = linearize.benchmark({"original": original}, tokens[:1], rounds=1, threads=options.threads).environment
    return {
        "ffn": [options.width, options.hidden, options.width],
        "tokens": options.tokens,
        "linear": options.linear,
        "environment": {**facts, "rounds": options.rounds},
        "compile": trouble or options.compile,
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    """One row per batch size, model and way of running."""

    def spread(values: tuple[float, float, float]) -> str:
        return f"{values[1]:.2f} [{values[0]:.2f}, {values[2]:.2f}]"

    rows = [
        [
            row["batch"],
            row["model"],
            "compiled" if row["compiled"] else "eager",
            f"{row['promise']:.2f}",
            spread(row["speed_up"]),
            f"{row['kept']:.2f}",
            spread(row["over_eager_original"]),
        ]
        for row in found["rows"]
    ]
    facts = found["environment"]
    title = (
        f"FFN {found['ffn']}, {found['tokens']} tokens per sample, {found['linear']:.0%} linear; {facts['device']}, "
    )
    title += f"{facts['threads']} threads, {facts['dtype']}, torch {facts['torch']}, {facts['rounds']} rounds"
    if isinstance(found["compile"], str):
        title += f"\ntorch.compile does not work here: {found['compile']}"
    heads = ["batch", "FFN", "run", "FLOPs promise", "speed-up [quartiles]", "of promise", "over eager original"]
    return title + "\n" + render(heads, rows)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--linear", type=float, default=0.75, help="share of linear channels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "ffn_speed.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    print(table(found))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.json, found)


if __name__ == "__main__":
    main()

"""How likely is a network at initialisation to have no hidden symmetry?

    python -m benchmarks.papers.hidden_symmetries [--quick | --full] [--out FOLDER]

Grigsby, Lindsey and Rolnick, "Hidden Symmetries of ReLU Networks", ICML 2023: a network has no hidden symmetry if its
functional dimension reaches the bound, parameters minus one positive scaling per hidden unit. They found that this
becomes rarer with depth, and more likely with width and input dimension. Here: networks n -> width -> ... -> width -> 1
with biases, weights normal with variance 2 / inputs of the layer (He et al., 2015), biases normal with deviation 0.1.

Functional dimension is a maximum over all sets of inputs, so any set gives a lower bound. Those in use here are chosen:
of 131 072 points whose distances from 0 range over three decades, at most n + 1 of each linear region (more add no
direction), those first where a unit, or two units in a row, do what they rarely do (`points.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import linearize
from benchmarks.papers.points import Chosen, choose
from benchmarks.papers.statistics import normal_tail, trend, wilson
from benchmarks.runs import Job, Plain, arguments, machine, publish, run_all
from linearize.report.timing import write_json
from linearize.text_table import render

NAME = "hidden_symmetries"
BIAS = 0.1  # standard deviation of the biases


@dataclass(frozen=True)
class Shape:
    """Sizes of a fully connected ReLU network."""

    inputs: int
    width: int
    depth: int

    def network(self) -> nn.Sequential:
        """The network, with weights that are yet to be drawn."""
        layers: list[nn.Module] = []
        for size in (self.inputs, *(self.width,) * (self.depth - 1)):
            layers += [nn.Linear(size, self.width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.width, 1))


@dataclass(frozen=True)
class Line:
    """Networks that differ in one size only, and the direction in which the paper sees the probability go.

    Attributes:
        axis: the size that varies: "depth", "width" or "inputs".
        shapes: in the order of that size.
    """

    axis: str
    shapes: tuple[Shape, ...]

    @property
    def expected(self) -> int:
        """1 if the probability shall rise along the line, -1 if it shall fall."""
        return -1 if self.axis == "depth" else 1

    @property
    def title(self) -> str:
        """The sizes that stay."""
        first = self.shapes[0]
        fixed = {"inputs": f"{first.inputs} inputs", "width": f"width {first.width}", "depth": f"depth {first.depth}"}
        return ", ".join(text for axis, text in fixed.items() if axis != self.axis)

    @property
    def places(self) -> list[int]:
        """The sizes that vary."""
        return [int(getattr(shape, self.axis)) for shape in self.shapes]


def lines(*, quick: bool, full: bool) -> list[Line]:
    """What is measured."""
    depths, widths, dims = [1, 2, 3, 4, 5], [2, 4, 6, 8, 12, 16], [1, 2, 3, 5, 10, 20]
    if quick:
        depths, widths, dims = [1, 2, 3], [2, 4, 6], [1, 3, 5]
    if full:
        depths, widths = [*depths, 6, 8], [*widths, 20]
    depth = [Line("depth", tuple(Shape(5, width, d) for d in depths)) for width in ((4, 8, 12) if full else (4, 8))]
    width = [Line("width", tuple(Shape(5, w, d) for w in widths if full or w * d <= 36)) for d in (2, 3)]
    inputs = [Line("inputs", tuple(Shape(n, 8, d) for n in dims)) for d in (2, 3)]
    return [*depth, *width, *inputs]


def draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Weights and biases as the module's text says."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(2 / module.in_features) ** 0.5, generator=generator)
            nn.init.normal_(module.bias, std=BIAS, generator=generator)


def measure(shape: Shape, seeds: int, points: int) -> Plain:
    """Functional dimension of so many networks of a shape."""
    model = shape.network()
    gated = linearize.convert(model, torch.zeros(2, shape.inputs))  # analysed once for all seeds, not once for each
    rows = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        draw_weights(model, generator)
        gated.load_state_dict(model.state_dict(), strict=False)
        chosen: Chosen = choose(model, points, generator)
        found = linearize.functional_dimension(gated, chosen.points)
        rows.append(
            {
                "hidden": found.bound - int(found),
                "settled": found.saturated,
                "clear": found.clear,
                "constant": chosen.constant,
            }
        )
    return {"parameters": found.parameters, "bound": found.bound, "seeds": rows}


def row(shape: Shape, result: Plain) -> Plain:
    """What the seeds of one shape come to."""
    seeds = result["seeds"]
    hits = sum(seed["hidden"] == 0 for seed in seeds)
    low, high = wilson(hits, len(seeds))
    return {
        **asdict(shape),
        "parameters": result["parameters"],
        "bound": result["bound"],
        "networks": len(seeds),
        "without": hits,
        "probability": hits / len(seeds),
        "low": low,
        "high": high,
        "hidden": sum(seed["hidden"] for seed in seeds) / len(seeds),
        "constant_unit": sum(seed["constant"] > 0 for seed in seeds) / len(seeds),
        "settled": sum(seed["settled"] for seed in seeds) / len(seeds),
        "clear": sum(seed["clear"] for seed in seeds) / len(seeds),
    }


def judge(line: Line, rows: list[Plain]) -> Plain:
    """Does the probability go where the paper says, along one line?"""
    z = trend([float(p) for p in line.places], [r["without"] for r in rows], [r["networks"] for r in rows])
    tail = normal_tail(z * line.expected)
    verdict = "confirmed" if tail < 0.01 else "refuted" if tail > 0.99 else "undecided"
    return {"axis": line.axis, "title": line.title, "z": z, "p": tail, "verdict": verdict, "rows": rows}


def table(judged: Iterable[Plain]) -> str:
    """All numbers."""
    head = ("varies", "inputs", "width", "depth", "no hidden symmetry", "95% interval", "hidden, mean", "constant unit")
    cells = [
        (
            line["axis"],
            *(r[size] for size in ("inputs", "width", "depth")),
            f"{r['probability']:.2f}",
            f"{r['low']:.2f}–{r['high']:.2f}",
            f"{r['hidden']:.1f}",
            f"{r['constant_unit']:.2f}",
        )
        for line in judged
        for r in line["rows"]
    ]
    return render(head, cells)


def main() -> None:
    """Measure, judge, draw."""
    from benchmarks.papers.pictures import draw_probabilities

    options = arguments("Functional dimension at initialisation.", f"runs/papers/{NAME}").parse_args()
    torch.set_num_threads(options.threads)
    out: Path = options.out or Path("runs/papers") / NAME
    seeds, points = (10, 2**13) if options.quick else (400, 2**18) if options.full else (60, 2**17)
    chosen = lines(quick=options.quick, full=options.full)
    shapes = sorted({shape for line in chosen for shape in line.shapes}, key=lambda s: (s.depth, s.width, s.inputs))

    def job(shape: Shape) -> Job:
        asked: dict[str, Any] = {**asdict(shape), "networks": seeds, "points": points}
        name = f"inputs{shape.inputs}-width{shape.width}-depth{shape.depth}"
        return Job(name, asked, lambda: measure(shape, seeds, points))

    results = dict(zip(shapes, run_all([job(shape) for shape in shapes], out / "runs", NAME), strict=True))
    judged = [judge(line, [row(shape, results[shape]) for shape in line.shapes]) for line in chosen]
    write_json(out / f"{NAME}.json", {"machine": machine(), "points": points, "bias": BIAS, "lines": judged})
    picture = out / "probability.png"
    draw_probabilities(judged, picture)
    print(table(judged))
    for line in judged:
        print(f"{line['axis']} ({line['title']}): {line['verdict']}, z = {line['z']:.1f}")
    if options.publish:
        publish(out / f"{NAME}.json", {"papers-hidden-symmetries.png": picture})


if __name__ == "__main__":
    main()

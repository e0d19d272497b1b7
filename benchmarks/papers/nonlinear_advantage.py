"""Does a network need its nonlinearity while it learns, or afterwards as well?

    python -m benchmarks.papers.nonlinear_advantage [--quick | --full] [--out FOLDER] [--catalogues FOLDER]

Ali Mehmeti-Goepel and Disselhoff, "Nonlinear Advantage: Trained Networks Might Not Be As Complex as You Think", ICML
2023, found that linearising late beats early, that many units can go after training, and that the nonlinear core that
is left has nearly the same depth and width whatever the depth of the network, and grows with the task. Here:

- moments (`moments.py`): the same share of channels becomes linear at the start, early, midway, or when the network is
  trained; same rule of choice, same steps and learning rates in all. Residual networks with and without activations
  behind their sums and a ViT on Fashion-MNIST, a Marian model on messages of programs in English and German;
- cores (`cores.py`): the prior acts on trained networks with rising weight, over depth and over number of classes;
- kernel (`cores.py`): the tangent kernel while a network learns.

Needs the extra "papers", the Debian package dataset-fashion-mnist, and catalogues: installed Django, wagtail and
weblate, or `pip install --no-deps --target=FOLDER Django wagtail weblate`. Each run is a file in the output folder, and
an interrupted program goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.papers.catalogues import parallel_text
from benchmarks.papers.cores import PRESSURE, RATE, decay, kernels
from benchmarks.papers.images import FOLDER, SIZE, image_set, image_task
from benchmarks.papers.moments import MOMENTS, moments
from benchmarks.papers.networks import ResNet, vision_transformer
from benchmarks.papers.training import GATE_RATE, Task
from benchmarks.papers.translation import Corpus, corpus, translation_task
from benchmarks.runs import Job, Plain, arguments, finished, machine, publish, run_all
from linearize.report.timing import write_json

NAME = "nonlinear_advantage"
ENDS = ("at the start", "trained")
KERNEL_PLACES = (0.0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25, 0.4, 0.55, 0.75)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    seeds: int = 3
    steps: int = 240
    images: int = 6400
    test: int = 2000
    width: int = 8
    words: int = 300
    vocabulary: int = 1000
    translation_steps: int = 500
    prior_steps: int = 240
    kernel_samples: int = 16

    def data(self, network: str = "") -> Plain:
        """What a run's data and widths are: part of what its result depends on."""
        names = ("words", "vocabulary") if network == "marian" else ("images", "test", "width")
        return {name: getattr(self, name) for name in names}


QUICK = Size(1, 16, 640, 200, 4, 20, 300, 12, 24, 4)
FULL = Size(5, 2000, 20000, 10000, 16, 600, 3000, 6000, 1500, 30)


@dataclass(frozen=True)
class Case:
    """A kind of network in the experiment about moments.

    Attributes:
        network: "resnet", "vit" or "marian".
        depth: of a ResNet.
        post_sum: a ResNet's activations behind its sums.
        longer: factor on the steps.
        led: a prior leads the channels to their lines over 15% of the steps, instead of at once.
    """

    name: str
    shares: tuple[float, ...]
    moments: tuple[str, ...] = tuple(MOMENTS)
    network: str = "resnet"
    depth: int = 0
    post_sum: bool = True
    control: bool = False
    longer: int = 1
    led: bool = False


CASES = (
    Case("resnet-8", (0.3, 0.8, 0.95), depth=8, control=True),
    Case("vit", (0.8,), network="vit", longer=2),
    Case("marian", (0.8,), network="marian"),
    Case("resnet-8-plain-sums", (0.3, 0.8, 0.95), depth=8, post_sum=False),
    Case("resnet-20", (0.8,), depth=20),
    Case("resnet-20-plain-sums", (0.8,), ENDS, depth=20, post_sum=False),
    Case("resnet-32", (0.8,), ENDS, depth=32),
    Case("resnet-32-plain-sums", (0.8,), ENDS, depth=32, post_sum=False),
    Case("resnet-8-led", (0.8,), ENDS, depth=8, led=True),
    Case("resnet-8-longer", (0.8,), ENDS, depth=8, longer=4),
)


def cases(options: argparse.Namespace) -> list[Case]:
    """What is measured: with --full, all shares and moments of all networks."""
    every = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    found = [replace(case, shares=every, moments=tuple(MOMENTS)) for case in CASES] if options.full else CASES
    return [replace(case, shares=case.shares[-1:]) for case in found] if options.quick else list(found)


@cache
def text(folder: Path | None, size: Size) -> Corpus:
    """The parallel text, read once."""
    pairs = parallel_text("de", folder)
    if len(pairs) < 2 * size.words:
        raise SystemExit("Too few translated messages: pass --catalogues, or install Django, wagtail and weblate.")
    return corpus(pairs, size.vocabulary, size.words)


def make_task(case: Case, size: Size, seed: int, options: argparse.Namespace, classes: int = 10) -> Task:
    """A network with its data."""
    if case.network == "marian":
        return translation_task(text(options.catalogues, size), seed, lr=3e-3, batch=32)
    images = image_set(options.images, classes, size.images, size.test)
    if case.network == "vit":
        return image_task(lambda: vision_transformer(SIZE, classes), images, seed, lr=3e-3)
    network: Callable[[], ResNet] = lambda: ResNet(case.depth, size.width, classes, post_sum=case.post_sum)  # noqa: E731
    return image_task(network, images, seed, lr=1e-2)


def moment_jobs(size: Size, options: argparse.Namespace) -> list[Job]:
    """A job for each network and seed."""
    made = []
    for case in cases(options):
        for seed in range(size.seeds):
            steps = case.longer * (size.translation_steps if case.network == "marian" else size.steps)
            asked = {"experiment": "moments", **asdict(case), "seed": seed, "steps": steps, **size.data(case.network)}

            def work(case: Case = case, seed: int = seed, steps: int = steps) -> Plain:
                task = make_task(case, size, seed, options)
                return moments(task, steps, case.shares, case.moments, control=case.control, led=case.led)

            made.append(Job(f"moments-{case.name}-{seed}", asked, work))
    return made


def core_jobs(size: Size, options: argparse.Namespace) -> list[Job]:
    """A job for each depth, number of classes and seed."""
    made = []
    pairs = [(8, 10), (20, 10), (32, 10), (8, 2), (8, 5)]
    for depth, classes in pairs[:1] if options.quick else pairs:
        for seed in range(size.seeds):
            case = Case("core", (), depth=depth)
            asked: Plain = {"experiment": "cores", "depth": depth, "classes": classes, "seed": seed}
            asked |= {"steps": size.steps, "prior_steps": size.prior_steps, "pressure": PRESSURE, **size.data()}
            asked |= {"rates": (RATE, GATE_RATE)}

            def work(case: Case = case, classes: int = classes, seed: int = seed) -> Plain:
                task = make_task(case, size, seed, options, classes)
                return decay(task, size.steps, size.prior_steps, max(1, size.prior_steps // 40))

            made.append(Job(f"cores-depth{depth}-classes{classes}-{seed}", asked, work))
    return made


def kernel_jobs(size: Size, options: argparse.Namespace) -> list[Job]:
    """A job for each seed."""
    made = []
    for seed in range(size.seeds):
        asked: Plain = {"experiment": "kernel", "depth": 8, "seed": seed, "steps": size.steps, **size.data()}
        asked |= {"places": KERNEL_PLACES, "samples": size.kernel_samples}

        def work(seed: int = seed) -> Plain:
            task = make_task(Case("kernel", (), depth=8), size, seed, options)
            return kernels(task, size.steps, KERNEL_PLACES, size.kernel_samples)

        made.append(Job(f"kernel-{seed}", asked, work))
    return made


def without_widths(run: Plain) -> Plain:
    """A run without the width of every single site, which the files of the runs keep."""
    if "curve" not in run:
        return run
    return {**run, "curve": [{key: value for key, value in row.items() if key != "widths"} for row in run["curve"]]}


def main() -> None:
    """Measure, judge, draw."""
    parser = arguments("When may a network lose its nonlinearity?", f"runs/papers/{NAME}")
    parser.add_argument("--catalogues", type=Path, help="folder of wheels' contents with gettext catalogues")
    parser.add_argument("--images", type=Path, default=FOLDER, help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--only", help="only runs whose names begin like this, without pictures")
    parser.add_argument("--report", action="store_true", help="run nothing: judge and draw what has been done so far")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL if options.full else Size()
    out: Path = options.out or Path("runs/papers") / NAME
    jobs = [*kernel_jobs(size, options), *core_jobs(size, options), *moment_jobs(size, options)]
    if options.report:
        results = finished(jobs, out / "runs")
    else:
        results = run_all([job for job in jobs if job.name.startswith(options.only or "")], out / "runs", NAME)
    if options.only:
        return
    from benchmarks.papers.advantage_pictures import draw_all
    from benchmarks.papers.findings import findings

    found = findings(results)
    short = [without_widths(run) for run in results]
    write_json(out / f"{NAME}.json", {"machine": machine(), "size": asdict(size), "findings": found, "runs": short})
    pictures = draw_all(results, out)
    for finding in found:
        print(f"{finding['claim']}: {finding['verdict']}. {finding['numbers']}")
    if options.publish:
        publish(out / f"{NAME}.json", pictures)


if __name__ == "__main__":
    main()

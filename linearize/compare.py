"""What became of a model: the original, the gated and the collapsed one, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from linearize.bench import benchmark
from linearize.cost import cost
from linearize.export.runtimes import Runtime
from linearize.plan import Plan
from linearize.planning.request import Request
from linearize.report.compression import Report
from linearize.running.devices import bring, device_of
from linearize.running.steps import Steps
from linearize.sites.select import UNSELECTED
from linearize.summary import summary
from linearize.training.losses import scores_of
from linearize.verify import verify

__all__ = ["kept_sites", "report_of"]


def report_of(
    models: Mapping[str, nn.Module],
    batches: list[Any],
    example: Any,
    request: Request,
    steps: Steps,
    history: list[dict[str, float]],
    runtime: Runtime | None = None,
) -> Report:
    """Everything measured about the three models, all on the device of the gated one.

    Args:
        models: "before", "gated" and "collapsed".
        batches: to verify on.
        example: inputs for costs and latencies.
        request: what was asked for.
        steps: tells and times.
        history: of fine-tuning.
        runtime: where latencies are measured; None for PyTorch.
    """
    before, gated, after = models["before"], models["gated"], models["collapsed"]
    bring(before, device_of(gated))
    with steps("verify"):
        verification = verify(gated, after, batches)
    quality: dict[str, dict[str, float]] = {}
    with steps("evaluate"):
        for stage, model in models.items():
            for name, value in ({} if request.evaluate is None else scores_of(model, request.evaluate)).items():
                quality.setdefault(name, {})[stage] = value
    timing = None
    if request.rounds:
        with steps("benchmark"):
            pair = {"original": before, "collapsed": after}
            timing = benchmark(
                pair,
                example,
                rounds=request.rounds,
                batch_sizes=request.batch_sizes,
                runtime=runtime,
                progress=steps.say,
            )
    costs = [cost(model, example) for model in (before, after)]
    return Report(quality, summary(gated), costs[0], costs[1], verification, timing, history, steps.seconds)


def kept_sites(report: Report, plan: Plan) -> dict[str, str]:
    """The sites that stay for another reason than their loss, in the plan or without a gate."""
    planned = {site.site for site in plan.sites}
    found = {site.site: site.reason for site in plan.sites if site.reason}
    ungated = {site.name: site.reason for site in report.summary.sites if not site.gated and site.reason}
    found |= {name: why for name, why in ungated.items() if why not in UNSELECTED and not _inside(name, planned)}
    return found


def _inside(name: str, planned: set[str]) -> bool:
    """True if the site, or a module around it, became something else by the plan."""
    return any(name == path or name.startswith(f"{path}.") for path in planned)

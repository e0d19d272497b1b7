"""The figures of a compression, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from linearize.cost import Cost
from linearize.plan import Plan
from linearize.report.budget import Outcome
from linearize.report.course import Course
from linearize.report.timing import BenchmarkResult
from linearize.report.trial import Trial
from linearize.report.verification import Verification
from linearize.summary import Summary

__all__ = ["Figures"]


@dataclass(frozen=True)
class Figures:
    """What was found about a compression. `Report` prints and saves it.

    Attributes:
        quality: for each metric the values "before", "gated" and "collapsed"; empty if nothing was evaluated.
        summary: the sites of the gated model after fine-tuning, with their linear channels.
        before, after: parameters and FLOPs of the original and the collapsed model, for one batch of the data.
        verification: the collapsed model compared with the gated one; None after a dry run.
        timing: latency of the original and the collapsed model.
        history: a record per epoch of fine-tuning.
        seconds: how long each step took.
        outcome: the budget and what was reached; None for a share of linear channels.
        options: the best options of each group of sites, as a table; empty for a share of linear channels.
        notes: further remarks, such as too little data.
        kept: the reason, for each site that has no gate, or that stays for another reason than its loss.
        plan: SHA-256 of the plan of this report (`Plan.sha256`).
        planned: the plan itself; None if the report was made without one.
        trials: plans that were tried with the real loss, in order.
        method: what decided: "plan", "gates" or "both".
        course: how gates came to the budget during training; None if they did not decide.
        model: class of the model.
        versions: of what made the report, by name.
    """

    quality: Mapping[str, Mapping[str, float]]
    summary: Summary
    before: Cost
    after: Cost
    verification: Verification | None
    timing: BenchmarkResult | None
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)
    outcome: Outcome | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    plan: str = ""
    planned: Plan | None = None
    trials: tuple[Trial, ...] = ()
    method: str = "plan"
    course: Course | None = None
    model: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str | None:
        """The metric to show: accuracy if there is one, else the first."""
        return "accuracy" if "accuracy" in self.quality else next(iter(self.quality), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "quality": {name: dict(values) for name, values in self.quality.items()},
            "metric": self.metric,
            **self.summary.to_dict(),
            "cost": {"before": self.before.to_dict(), "after": self.after.to_dict()},
            "verification": None if self.verification is None else self.verification.to_dict(),
            "timing": None if self.timing is None else self.timing.to_dict(),
            "history": self.history,
            "seconds": dict(self.seconds),
            "budget": None if self.outcome is None else self.outcome.to_dict(),
            "notes": list(self.notes),
            "kept": dict(self.kept),
            "plan_sha256": self.plan,
            "trials": [asdict(trial) for trial in self.trials],
            "method": self.method,
            "course": None if self.course is None else self.course.to_dict(),
            "model": self.model,
            "versions": dict(self.versions),
        }

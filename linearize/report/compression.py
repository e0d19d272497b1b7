"""The report of `compress`: quality, cost and latency before and after, and the proof that collapsing was exact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from linearize.cost import Cost
from linearize.report.budget import Outcome
from linearize.report.timing import BenchmarkResult, write_json
from linearize.report.verification import Verification
from linearize.summary import Summary
from linearize.text_table import render, render_html, render_markdown

__all__ = ["Report", "outcome_table"]

_ALSO = ("next_token_agreement",)  # shown besides the metric
_SHOWN = 5  # sites that stay, in what is printed


@dataclass(frozen=True)
class Report:
    """The result of a compression in numbers. It prints as a table.

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
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        return "\n".join([outcome_table({"": self}), *self._below()])

    def _repr_html_(self) -> str:
        return render_html(["", "value"], list(_figures(self).items()), self._below())

    def _below(self) -> list[str]:
        return [*(f"note: {note}" for note in self.notes), *_kept(self.kept)]


def _kept(kept: Mapping[str, str]) -> list[str]:
    """The first sites that stay for another reason than their loss, and how many there are."""
    if not kept:
        return []
    lines = [f"sites that stay for another reason than their loss: {len(kept)}"]
    lines += [f"  {site}: {reason}" for site, reason in list(kept.items())[:_SHOWN]]
    return [*lines, f"  ... and {len(kept) - _SHOWN} more (report.kept)"] if len(kept) > _SHOWN else lines


def outcome_table(reports: Mapping[str, Report], *, markdown: bool = False) -> str:
    """One column per model, one row per figure.

    Args:
        reports: titles and reports.
        markdown: for a document instead of a terminal.
    """
    columns = [_figures(report) for report in reports.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name) for column in columns)] for name in names]
    return (render_markdown if markdown else render)(["", *reports], rows)


def _figures(report: Report) -> dict[str, str]:
    """Name and value of every figure."""
    found: dict[str, str] = {}
    if report.metric is not None:
        for name in (report.metric, *(name for name in _ALSO if name in report.quality)):
            for stage, value in report.quality[name].items():
                found[f"{name.replace('_', ' ')} {stage}"] = f"{value:.4f}"
    found["linear channels"] = f"{report.summary.linear} of {report.summary.channels} ({report.summary.share:.1%})"
    found["parameters"] = _change(report.before.parameters, report.after.parameters)
    found["FLOPs per batch"] = _change(report.before.flops, report.after.flops)
    for ratio in report.timing.ratios if report.timing is not None else ():
        found[f"latency ratio, batch {ratio.batch_size} [quartiles]"] = str(ratio)
    if report.outcome is not None:
        found["budget"] = str(report.outcome)
        found["predicted error, before fine-tuning"] = f"{report.outcome.loss:.3g}"
    check = report.verification
    if check is not None:
        found["collapsed against gated, max relative error"] = f"{check.max_error:.1e} ({'ok' if check else 'TOO FAR'})"
    return found


def _change(before: int, after: int) -> str:
    return f"{_short(before)} -> {_short(after)} ({after / max(before, 1):.2f})"


def _short(number: float) -> str:
    """A number with three digits and a unit.

    Examples:
        >>> _short(598954), _short(1.31e9), _short(12)
        ('599 k', '1.31 G', '12')
    """
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"

"""The report of `compress`: quality, cost and latency before and after, and the proof that collapsing was exact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from linearize import checks
from linearize.errors import UsageError
from linearize.report.figures import Figures
from linearize.report.timing import write_json, write_result
from linearize.text_table import render, render_html, render_markdown

__all__ = ["Report", "outcome_table"]

_ALSO = ("next_token_agreement",)  # shown besides the metric
_SHOWN = 5  # sites that stay, in what is printed


@dataclass(frozen=True)
class Report(Figures):
    """The result of a compression in numbers, with the attributes of `Figures`. It prints as a table.

    `save` writes it as JSON or as a page.
    """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report, completely or not at all: as JSON, or as a page for a browser.

        The page is one file without scripts that needs no network. It shows budget and outcome, quality, cost and
        latency, every layer, the search, the training and the versions, and holds the plan.

        Args:
            path: a file that ends in .json (`to_dict`) or .html (the page).

        Raises:
            UsageError: the file ends in something else, or cannot be written.
        """
        suffix = checks.path("path", path).suffix.lower()
        if suffix == ".json":
            write_json(path, self.to_dict())
        elif suffix == ".html":
            from linearize.report.page import page_of  # not for programs that write none

            write_result(path, page_of(self, self._repr_html_()))
        else:
            raise UsageError("path", f"found {str(path)!r:.120}", "Pass a file that ends in .json or .html.")

    def __str__(self) -> str:
        return "\n".join([outcome_table({"": self}), *self._below()])

    def _repr_html_(self) -> str:
        return render_html(["", "value"], list(_figures(self).items()), self._below())

    def _below(self) -> list[str]:
        course = [] if self.course is None else self.course.lines()
        return [*(f"note: {note}" for note in self.notes), *course, *_kept(self.kept)]


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
        if report.method != "plan":
            found["decided by"] = {"gates": "gates", "both": "a plan, then gates"}[report.method]
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

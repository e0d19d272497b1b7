"""The page of a report: one HTML file that shows everything and holds the plan."""

from __future__ import annotations

import json
from typing import Any

from linearize.report import charts
from linearize.report.figures import Figures
from linearize.report.layers import layer_rows
from linearize.report.svg import short
from linearize.report.web import data_url, page
from linearize.text_table import render_html

__all__ = ["page_of"]


def page_of(report: Figures, table: str) -> str:
    """The whole page as text.

    Args:
        report: what it shows.
        table: all of its figures as a table in HTML, as a notebook shows them.
    """
    outcome = report.outcome
    met = None if outcome is None else outcome.met
    timing = report.timing
    return page(
        "compression.html",
        title=f"{report.model or 'A model'}, compressed",
        outcome="" if outcome is None else str(outcome),
        outcome_kind="" if met is None else ("good" if met else "bad"),
        seconds=", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items()),
        tiles=_tiles(report),
        notes=report.notes,
        plan_url="" if report.planned is None else data_url(report.planned.to_json()),
        report_url=data_url(json.dumps(report.to_dict(), indent=1)),
        layers=layer_rows(report.planned, report.summary),
        latency=None if timing is None else charts.latencies(timing.timings, timing.ratios),
        machine="" if timing is None else _machine(timing.environment),
        trials=charts.trials(report.trials) if report.trials else None,
        curves=charts.curves(report.history),
        tables=_tables(report, table),
        options=report.options,
        footer="Made by " + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )


def _tiles(report: Figures) -> list[dict[str, str]]:
    """What a reader looks at first."""
    before, after = report.before, report.after
    quality = report.quality.get(report.metric or "", {})
    tiles = []
    if quality:
        last = "collapsed" if "collapsed" in quality else list(quality)[-1]
        steps = ", ".join(f"{stage} {value:.4f}" for stage, value in quality.items())
        tiles.append({"name": str(report.metric), "value": f"{quality[last]:.4f}", "more": steps})
    for name, old, new in (
        ("parameters", before.parameters, after.parameters),
        ("FLOPs per batch", before.flops, after.flops),
    ):
        more = f"of the original's, {old:,} → {new:,}"
        tiles.append({"name": name, "value": f"{new / max(old, 1):.1%}", "more": more})
    for ratio in report.timing.ratios if report.timing is not None else ():
        name = f"latency, batch {ratio.batch_size}" + ", compiled" * ratio.compiled
        more = f"of the original's; quartiles {ratio.q1:.1%}, {ratio.q3:.1%}"
        tiles.append({"name": name, "value": f"{ratio.median:.1%}", "more": more})
    summary = report.summary
    more = f"{summary.linear} of {summary.channels}"
    tiles.append({"name": "linear channels", "value": f"{summary.share:.1%}", "more": more})
    if report.verification is not None:
        more = "largest relative error, collapsed against gated" + ("" if report.verification else ": TOO FAR")
        tiles.append({"name": "exactness", "value": f"{report.verification.max_error:.1e}", "more": more})
    return tiles


def _machine(facts: dict[str, Any]) -> str:
    return f"{facts.get('device')}, threads: {facts.get('threads')}, {facts.get('dtype')}."


def _tables(report: Figures, table: str) -> list[dict[str, str]]:
    """The tables of a notebook, and what the charts show as numbers."""
    found = [("All figures", table)]
    if report.planned is not None:
        found.append(("The plan", report.planned._repr_html_()))
    found.append(("Sites of the gated model", report.summary._repr_html_()))
    if report.versions:
        found.append(("Versions", render_html(["", "version"], list(report.versions.items()))))
    if report.timing is not None:
        rows = [
            [t.model, t.batch_size, "yes" if t.compiled else "no", *(f"{v:.3g}" for v in (t.median, t.q1, t.q3))]
            for t in report.timing.timings
        ]
        headers = ["model", "batch", "compiled", "median s", "first quartile s", "third quartile s"]
        found.append(("Latency", render_html(headers, rows)))
    if report.trials:
        tried = [[t.name, t.loss and short(t.loss), "best so far" if t.wins else ""] for t in report.trials]
        found.append(("Plans tried", render_html(["plan", "real loss", ""], tried)))
    if report.history:
        names = list(dict.fromkeys(name for record in report.history for name in record))
        lines = [[short(record[n]) if n in record else None for n in names] for record in report.history]
        found.append(("History of training", render_html(names, lines)))
    return [{"name": name, "html": html} for name, html in found]

"""A model card: what was written, what was changed, what was proven, with which versions, and how to load it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from linearize._version import __version__
from linearize.export.face import Format, Proof
from linearize.report.compression import Report, outcome_table
from linearize.sites.record import record_of
from linearize.text_table import render_markdown
from linearize.zoo.hub import front_matter

__all__ = ["card_of"]

_SHOWN = 60  # layers in the table


def card_of(
    model: nn.Module, chosen: Format, name: str, facts: Mapping[str, Any], proof: Proof | None, report: Report | None
) -> str:
    """The text of a card, in Markdown with the front matter that model hubs read.

    Args:
        model: what was exported.
        chosen: the format.
        name: of the file or folder.
        facts: about it.
        proof: what the runtime gave.
        report: what `compress` measured, if it is known.
    """
    what = f"A {type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters, "
    what += f"as {chosen.name}, written by linearize {__version__}."
    lines = [front_matter(model, chosen.library), f"# {name}", what]
    lines += ["## How to load it", f"```python\n{chosen.usage(model).replace('NAME', name)}\n```"]
    lines += ["## What it is", render_markdown(["", ""], [[key, str(value)] for key, value in facts.items()])]
    lines += ["## What was proven", _proven(proof)]
    if report is not None:
        lines += ["## What was measured", outcome_table({"": report}, markdown=True)]
        lines += [f"The plan's SHA-256 is `{report.plan}`."] if report.plan else []
    lines += _changes(model)
    lines += ["## Versions", _versions()]
    return "\n\n".join(lines) + "\n"


def _proven(proof: Proof | None) -> str:
    if proof is None:
        return "Nothing: the file was not run."
    text = f"In {proof.runtime}, on {proof.shapes} batches: at most {proof.error:.1e} from the model, relative."
    return f"{text} Told besides: {proof.told}." if proof.told else text


def _changes(model: nn.Module) -> list[str]:
    """The layers that are not as they were, as the model's record has them."""
    record = record_of(model)
    last = {} if record is None else {step["path"]: step["module"] for step in record.steps}
    rows = [[path, str(spec.get("type")), _size(spec)] for path, spec in last.items() if spec.get("type") != "Rewrite"]
    if not rows:
        return []
    more = [f"... and {len(rows) - _SHOWN} more."] if len(rows) > _SHOWN else []
    return ["## What was changed", render_markdown(["layer", "now", "size"], rows[:_SHOWN]), *more]


def _size(spec: Mapping[str, Any]) -> str:
    pairs = (("in_features", "out_features"), ("in_channels", "out_channels"))
    found = [f"{spec[a]} -> {spec[b]}" for a, b in pairs if a in spec and b in spec]
    return found[0] if found else (f"{spec['keep']} of its channels" if "keep" in spec else "")


def _versions() -> str:
    said = {"linearize": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return ", ".join(f"{name} {version}" for name, version in said.items()) + "."

"""What a hidden symmetry is, as plain data, with its table and its picture.

Source: Grigsby, Lindsey and Rolnick, "Hidden Symmetries of ReLU Networks", ICML 2023.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from linearize.analysis.canvas import FIRST, INK, NAMED_ROWS, SECOND, head, new_figure, write_picture
from linearize.text_table import render

SymmetryKind = Literal["inactive", "active", "parallel", "unseen"]


Evidence = Literal["data", "box"]


Required = tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Symmetry:
    """Channels of one site that are redundant for one reason.

    Attributes:
        kind: "inactive": the activation is constant. "active": the activation is a straight line. "parallel": the
            channels are positive multiples of the first one. "unseen": no output changes if they are set to 0.
        site: name of the site.
        channels: by index. If parallel, the others are multiples of the first.
        evidence: "data": true on the inputs that were passed. "box": true for every input in the box.
        slopes, intercepts: the line that equals the activation of each channel (not for parallel ones).
        scales: if parallel, the factor of each channel relative to the first one; the first scale is 1.
        requires: (site, channel, constant) of inactive channels. These channels are unseen only if those are constant.
        inputs: example inputs without values, to capture the model again.
    """

    kind: SymmetryKind
    site: str
    channels: tuple[int, ...]
    evidence: Evidence
    slopes: tuple[float, ...] = ()
    intercepts: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    requires: Required = ()
    inputs: Any = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {key: value for key, value in asdict(replace(self, inputs=None)).items() if key != "inputs"}


def symmetry_table(symmetries: Iterable[Symmetry]) -> str:
    """The records as a table.

    Examples:
        >>> print(symmetry_table([Symmetry("inactive", "act", (0, 2), "data")]))
        site  kind      channels  which  evidence
        ----  --------  --------  -----  --------
        act   inactive         2  0, 2   data
    """
    rows = [(s.site, s.kind, len(s.channels), _some(s.channels), s.evidence) for s in symmetries]
    return render(("site", "kind", "channels", "which", "evidence"), rows)


def _some(channels: Sequence[int]) -> str:
    return ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")


_COLORS = {"inactive": FIRST, "active": SECOND, "parallel": "#1b7837", "unseen": "#762a83"}


def draw_symmetries(symmetries: Iterable[Symmetry], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw how many channels of each site are redundant, and why. Channels with evidence from data only are hatched.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    records = list(symmetries)
    sites = list(dict.fromkeys(record.site for record in records))
    figure, (axes,) = new_figure((7, 1.6 + 0.28 * min(len(sites), NAMED_ROWS)), 1)
    for place, site in enumerate(sites):
        start = 0
        for record in (record for record in records if record.site == site):
            count = len(record.channels) - (record.kind == "parallel")  # the first one stays
            hatch = "//" if record.evidence == "data" else None
            axes.barh(place, count, left=start, color=_COLORS[record.kind], hatch=hatch, edgecolor="white", height=0.7)
            start += count
        axes.text(start, place, f" {start}", va="center", fontsize=8, color=INK)
    for kind in dict.fromkeys(record.kind for record in records):
        axes.barh(0, 0, color=_COLORS[kind], label=kind)
    if any(record.evidence == "data" for record in records):
        axes.barh(0, 0, color="#bbbbbb", hatch="//", edgecolor="white", label="on the data only")
    if len(sites) <= NAMED_ROWS:
        axes.set_yticks(range(len(sites)), sites, fontsize=8)
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.1)
    axes.set_xlabel("redundant channels")
    if records:
        figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    total = sum(len(record.channels) - (record.kind == "parallel") for record in records)
    head(axes, title, f"{total} redundant channels")
    write_picture(figure, path)

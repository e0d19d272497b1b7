"""The plan: what happens to every channel of every site, as plain data that can be written as JSON and read back."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from linearize.algebra.forms import FORMS
from linearize.errors import UsageError
from linearize.schema import LARGEST, array, integer, number, optional, parse, struct, text
from linearize.text_table import render, render_html

When = Literal["cheaper", "always"]

_HEADERS = ("site", "form", "nonlinear", "linear", "rank", "loss", "why not")

UNCHANGED = "unchanged"  # no channel is linear: the activation comes back as it was
NARROWED = "narrowed"  # channels leave all maps of a chain through a depthwise one
MASKED = "partial activation"  # linear channels stay where they are, behind an activation that leaves them out
FULL_LINES = ("merged", "vanished")  # every linear channel follows its line, in one map of full rank


@dataclass(frozen=True)
class Form:
    """A form that a family of replacements adds to the forms of collapsing.

    Attributes:
        name: its name in plans.
        tell: a function of K and the rank that describes what it does.
        replaces: True if the modules of the site are replaced at once, so that no gate is left to collapse.
    """

    name: str
    tell: Callable[[int, int], str]
    replaces: bool = True


_COLLAPSING = (UNCHANGED, NARROWED, MASKED, *FORMS)
_SOURCES: list[Callable[[], Iterable[Form]]] = []


def forms_from(source: Callable[[], Iterable[Form]]) -> None:
    """Make forms known to plans: where to ask for them when one is looked up. The families give theirs in this way."""
    _SOURCES.append(source)


def _added() -> dict[str, Form]:
    return {form.name: form for source in _SOURCES for form in source()}


def added_form(name: str) -> Form | None:
    """A form that a family has added; None for those of collapsing.

    Examples:
        >>> added_form("merged") is None
        True
    """
    return _added().get(name)


@dataclass(frozen=True)
class SitePlan:
    """What happens to one site.

    Attributes:
        site: its name.
        form: "vanished", "merged", "merged (input)", "factored", "narrowed", "partial activation" or "unchanged"; of
            `compress` also the forms of its families, such as "block" or "whole module".
        linear: the channels that are linear, by index.
        before, after: multiply-adds of its maps in one forward of the example inputs, before and after.
        reason: if its channels are not collapsed, the reason.
        dropped: the channels that are removed, by index. At most a constant of them remains.
        rank: rank of the linear skip that was fitted; 0 for none.
        loss: the error of the model's output that `compress` predicted for this site.
        channels: number of channels of the site; 0 if it is not known.
    """

    site: str
    form: str
    linear: tuple[int, ...]
    before: float = 0.0
    after: float = 0.0
    reason: str | None = None
    dropped: tuple[int, ...] = ()
    rank: int = 0
    loss: float = 0.0
    channels: int = 0


@dataclass(frozen=True)
class Plan:
    """What happens to every channel of a model, as plain data.

    Examples:
        >>> plan = Plan((SitePlan("act", "merged", (0, 2)),))
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    sites: tuple[SitePlan, ...]

    def to_json(self) -> str:
        """The plan as JSON text. `from_json` reads it back."""
        return json.dumps({"sites": [asdict(site) for site in self.sites]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote. The text may have been edited.

        Raises:
            UsageError: the text is no plan.
        """
        try:
            data = parse(text)
            _PLAN(data, "")
            plan = cls(tuple(_site(site) for site in data["sites"]))
        except (ValueError, TypeError) as error:
            found = f"found no plan ({str(error)[:200]})"
            raise UsageError("Plan.from_json", found, "Pass what Plan.to_json gave.") from error
        return plan.checked()

    @property
    def sha256(self) -> str:
        """The SHA-256 digest of `to_json`, which identifies the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def checked(self) -> Plan:
        """Check that the plan makes sense, and give it back.

        Raises:
            UsageError: it contradicts itself, or names an unknown form.
        """
        names = Counter(site.site for site in self.sites)
        for site in self.sites:
            why = "it is there twice" if names[site.site] > 1 else _nonsense(site)
            if why:
                raise UsageError(f"plan of {site.site!r}", why, "Correct the plan, or make it anew.")
        return self

    def __getitem__(self, name: str) -> SitePlan:
        return next(site for site in self.sites if site.site == name)

    def __str__(self) -> str:
        return render(_HEADERS, self._rows())

    def _repr_html_(self) -> str:
        return render_html(_HEADERS, self._rows())

    def _rows(self) -> list[tuple[object, ...]]:
        return [
            (s.site, s.form, s.channels - len(s.linear) if s.channels else None, len(s.linear), s.rank or None,
             f"{s.loss:.3g}" if s.loss else None, s.reason or "")
            for s in self.sites
        ]  # fmt: skip


# Which forms and channels make sense together is for `checked` to say, with the name of the site.
_CHANNELS = array(integer(-LARGEST), LARGEST)
_PLAN = struct(
    {
        "sites": array(
            struct(
                {"site": text(), "form": text(), "linear": _CHANNELS},
                {
                    "before": number(0),
                    "after": number(0),
                    "reason": optional(text()),
                    "dropped": _CHANNELS,
                    "rank": integer(-LARGEST),
                    "loss": number(),
                    "channels": integer(-LARGEST),
                },
            )
        )
    }
)


def _site(data: dict[str, Any]) -> SitePlan:
    return SitePlan(**{**data, "linear": tuple(data["linear"]), "dropped": tuple(data.get("dropped", ()))})


def _nonsense(site: SitePlan) -> str:
    """What is wrong with an entry that somebody may have edited; "" if nothing is."""
    known = (*_COLLAPSING, *_added())
    if site.form not in known:
        return f"found the form {site.form!r}; known are {', '.join(known)}"
    for name, figure in (("before", site.before), ("after", site.after), ("loss", site.loss)):
        if isinstance(figure, bool) or not isinstance(figure, (int, float)) or not math.isfinite(figure):
            return f"found {name} {figure!r:.40}, which is no number"
    for name, value in (("rank", site.rank), ("channels", site.channels)):
        if type(value) is not int or value < 0:
            return f"found {name} {value!r}, which is no count"
    for name, indices in (("linear", site.linear), ("dropped", site.dropped)):
        wrong = [i for i in indices if type(i) is not int or i < 0 or (site.channels and i >= site.channels)]
        if wrong:
            return f"found {wrong[0]!r} among its {name} channels"
        if len(set(indices)) < len(indices):
            return f"found a channel twice among those that are {name}"
    # A chain that is narrowed drops channels of which a constant is left, whether they are linear or not.
    odd = set(site.dropped) - set(site.linear) if site.form != NARROWED else None
    return f"found channel {min(odd)} dropped, but not linear" if odd else ""

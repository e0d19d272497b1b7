"""Options: what could happen to the sites of a group, with its cost and its predicted loss. Plain data.

Shape letters: C channels, K channels that stay nonlinear, r rank of the linear skip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from linearize.plan import FULL_LINES, UNCHANGED, added_form
from linearize.text_table import render

__all__ = ["MEASURES", "Group", "Measure", "Option", "SiteChoice", "frontier"]

Measure = Literal["latency", "flops", "params", "activations", "memory", "decode", "prefill", "together"]
MEASURES: tuple[Measure, ...] = ("latency", "flops", "params", "activations", "memory", "decode", "prefill")


@dataclass(frozen=True)
class SiteChoice:
    """What happens to one site, or to a module.

    Attributes:
        site: name of the site, or path of the module.
        keep: K, the number of channels that stay nonlinear.
        rank: r of the linear skip; 0 for none.
        form: "unchanged", one of collapsing ("factored", "merged", "vanished", "narrowed"), or one that a family adds.
        gone: by index, what goes of a place that is no site, such as heads; a site's own channels are its family's
            business.
    """

    site: str
    keep: int
    rank: int = 0
    form: str = "factored"
    gone: tuple[int, ...] = ()

    @property
    def replaces(self) -> bool:
        """True if the modules of the site are replaced at once, so that no gate is left."""
        form = added_form(self.form)
        return form is not None and form.replaces

    @property
    def of_one_kind(self) -> bool:
        """True if its channels all do the same: all are gone, or all follow their line, in one full linear map."""
        return not self.replaces and (not self.rank or self.form in FULL_LINES)

    def __str__(self) -> str:
        form = added_form(self.form)
        if form is not None:
            return form.tell(self.keep, self.rank)
        if self.form == UNCHANGED:
            return f"keep {self.keep}" if self.keep else "stay, what is inside apart"
        skip = "" if not self.rank else f" + skip of rank {self.rank}"
        return f"keep {self.keep}{skip}" if self.keep else f"one linear map of rank {self.rank}"


@dataclass(frozen=True)
class Option:
    """One thing that could happen to the sites of a group.

    Attributes:
        choices: one per site of the group.
        loss: predicted error of the model's output: a share of its mean square, or a divergence of its logits. The
            losses of different groups are added up.
        flops, params, activations: cost of the group's maps and nonlinear units, for the example batch.
        latency: share of the original model's latency, mean over batch sizes; None if not measured.
        cache: bytes of keys and values that a model which generates keeps, for the example batch.
        memory: bytes of weights and cache as the model is served; None if nobody asked.
        decode, prefill: shares of the original's time for a token, and to the first token; likewise.
        together: of several budgets, weighed against each other; None for one budget.
    """

    choices: tuple[SiteChoice, ...]
    loss: float
    flops: float
    params: float
    activations: float
    latency: float | None = None
    cache: float = 0.0
    memory: float | None = None
    decode: float | None = None
    prefill: float | None = None
    together: float | None = None

    def cost(self, measure: Measure) -> float:
        """The cost that a budget limits."""
        value = getattr(self, measure)
        if value is None:
            raise ValueError(f"{measure} was not measured")
        return float(value)

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(str(choice) for choice in self.choices))


@dataclass(frozen=True)
class Group:
    """Sites that share maps, and their options. The first option changes nothing.

    Attributes:
        sites: names, in order of execution.
        options: what could happen to them.
        reason: if there is no option but to stay, the reason.
        inside: path of the smallest module around them that has a group of its own; "" if there is none.
        gone_form: the form that they get in the plan if that module is replaced.
        encloses: True for the group of a module with other groups inside. Its only site is the path of the module. If
            it stays, its cost is that of everything outside other groups. Its other options replace all groups inside.
        shape: of the group's input in the example batch; () if it is not known, so that nothing can be timed.
        touches: paths of the modules that its options change, where its names do not tell.
    """

    sites: tuple[str, ...]
    options: tuple[Option, ...]
    reason: str | None = None
    inside: str = ""
    gone_form: str = ""
    encloses: bool = False
    shape: tuple[int, ...] = ()
    touches: tuple[str, ...] = ()

    @property
    def stay(self) -> Option:
        """The option that changes nothing."""
        return self.options[0]

    @property
    def gone(self) -> Option:
        """The option that stands for this group if the module around it is replaced."""
        choices = tuple(SiteChoice(site, 0, form=self.gone_form) for site in self.sites)
        return Option(choices, 0.0, 0.0, 0.0, 0.0, 0.0, memory=0.0, decode=0.0, prefill=0.0, together=0.0)

    def pareto(self, measure: Measure) -> Group:
        """Only the options that no other beats in both loss and cost. A group that encloses others keeps all."""
        if self.encloses:
            return self
        return replace(self, options=(self.stay, *(o for o in frontier(self.options, measure) if o is not self.stay)))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = [", ".join(self.sites), "loss", "FLOPs", "parameters", "latency share"]
        rows = [[str(o), f"{o.loss:.3g}", f"{o.flops:.3g}", f"{o.params:.3g}", _share(o.latency)] for o in self.options]
        if any(option.cache for option in self.options):
            head.append("cache bytes")
            rows = [[*row, f"{option.cache:.0f}"] for row, option in zip(rows, self.options, strict=True)]
        for name in ("memory", "decode", "prefill"):
            if self.stay.__dict__[name] is not None:
                head.append(_HEADS[name])
                rows = [[*row, _HOW[name](o.cost(name))] for row, o in zip(rows, self.options, strict=True)]
        return render(head, rows)


def frontier(options: tuple[Option, ...], measure: Measure) -> list[Option]:
    """The options that no other beats in both loss and cost, by falling cost.

    Examples:
        >>> made = tuple(Option((), loss, cost, 0, 0) for loss, cost in [(0, 9), (2, 5), (3, 6), (4, 1)])
        >>> [option.loss for option in frontier(made, "flops")]
        [0, 2, 4]
    """
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost(measure), o.loss)):
        if not found or option.loss < found[-1].loss:
            found.append(option)
    return found[::-1]


_HEADS = {"memory": "bytes served", "decode": "share of a token's time", "prefill": "share of the prefill's time"}
_HOW: dict[str, Callable[[float], str]] = {
    "memory": "{:.0f}".format,
    "decode": "{:.4f}".format,
    "prefill": "{:.4f}".format,
}


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"

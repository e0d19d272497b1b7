"""Options: what could happen to the sites of a group, with what it costs and what it loses. Plain data.

Shape letters: C channels, K channels that stay nonlinear, r rank of the linear skip.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from linearize.plan import BLOCKS, BORDERED, WHOLE
from linearize.text_table import render

__all__ = ["BLOCKS", "BORDERED", "MEASURES", "WHOLE", "Group", "Measure", "Option", "SiteChoice", "frontier"]

Measure = Literal["latency", "flops", "params", "activations"]
MEASURES: tuple[Measure, ...] = ("latency", "flops", "params", "activations")


@dataclass(frozen=True)
class SiteChoice:
    """What happens to one site, or to a module.

    Attributes:
        site: its name; the path of a module.
        keep: K.
        rank: r of the linear skip; 0 for none.
        form: "unchanged", "factored", "merged", "vanished" or "narrowed"; "line" for channels that go to their own line
            in place; "block" for one dense convolution in place of all sites of the group, with `rank` for its kernel;
            "bordered block" for one whose bias is another near the border; "whole module" for a module (`site` is its
            path) that one linear map stands for, and for the sites inside, which go with it.
    """

    site: str
    keep: int
    rank: int = 0
    form: str = "factored"

    @property
    def block(self) -> bool:
        """True if other modules take the place of the site's, at once."""
        return self.form in (*BLOCKS, WHOLE)

    def __str__(self) -> str:
        if self.form == "unchanged" and not self.keep:
            return "stay, what is inside apart"
        if self.form in ("unchanged", "line"):
            return f"keep {self.keep}" if self.form == "unchanged" else f"keep {self.keep}, lines"
        if self.form == WHOLE:
            return f"the whole of it one linear map of rank {self.rank}" if self.rank else "gone with its module"
        if self.block:
            return f"one {self.rank}x{self.rank} convolution{' and a border' if self.form == BORDERED else ''}"
        skip = "" if not self.rank else f" + skip of rank {self.rank}"
        return f"keep {self.keep}{skip}" if self.keep else f"one linear map of rank {self.rank}"


@dataclass(frozen=True)
class Option:
    """One possibility for the sites of a group.

    Attributes:
        choices: one per site of the group.
        loss: predicted error of the model's output: a share of its mean square, or a divergence of its logits; errors
            of different groups are taken to add up.
        flops, params, activations: cost of the group's maps and units, for the example batch.
        latency: as a share of the whole original model's, mean over batch sizes; None if not measured.
    """

    choices: tuple[SiteChoice, ...]
    loss: float
    flops: float
    params: float
    activations: float
    latency: float | None = None

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
    """Sites that share maps, and their options; the first leaves everything as it is.

    Attributes:
        sites: names, in order of execution.
        options: the possibilities.
        reason: why there is no other option than to stay, if there is none.
        inside: path of the smallest module around them that has a group of its own; "" for none.
        module: True for the group of a module: its only site is the path, its options are to stay, at the cost of what
            is no other group's, and to become one linear map, whereupon all groups inside are gone.
    """

    sites: tuple[str, ...]
    options: tuple[Option, ...]
    reason: str | None = None
    inside: str = ""
    module: bool = False

    @property
    def stay(self) -> Option:
        """The option that changes nothing."""
        return self.options[0]

    @property
    def gone(self) -> Option:
        """What is left of it when the module around it becomes one linear map."""
        return Option(tuple(SiteChoice(site, 0, form=WHOLE) for site in self.sites), 0.0, 0.0, 0.0, 0.0, 0.0)

    def pareto(self, measure: Measure) -> Group:
        """Only the options that no other beats in both loss and cost; of a module all."""
        if self.module:
            return self
        return replace(self, options=(self.stay, *(o for o in frontier(self.options, measure) if o is not self.stay)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(str(o), f"{o.loss:.3g}", f"{o.flops:.3g}", f"{o.params:.3g}", _share(o.latency)) for o in self.options]
        return render((", ".join(self.sites), "loss", "FLOPs", "parameters", "latency share"), rows)


def frontier(options: tuple[Option, ...], measure: Measure) -> list[Option]:
    """The options that no other beats in both loss and cost, by falling cost.

    Example:
        >>> made = tuple(Option((), loss, cost, 0, 0) for loss, cost in [(0, 9), (2, 5), (3, 6), (4, 1)])
        >>> [option.loss for option in frontier(made, "flops")]
        [0, 2, 4]
    """
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost(measure), o.loss)):
        if not found or option.loss < found[-1].loss:
            found.append(option)
    return found[::-1]


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"

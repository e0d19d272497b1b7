"""The face of a family: all that the planner knows about a kind of replacement.

A family finds the places where it applies, says which statistics it wants of them, offers options with costs and
predicted losses, shows the layers that would stand there, carries a choice out on a gated model, and reads it back from
a plan. Adding one is a folder here, a line in `registry.FAMILIES`, its tests, and a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from linearize.algebra.moments import SiteCalibration
from linearize.families.option import Group, Measure, Option, SiteChoice
from linearize.gating.gate import ChannelGate
from linearize.plan import Form, SitePlan
from linearize.running.passes import Collector

__all__ = ["Context", "Family", "Layers", "Replayed"]


@dataclass
class Context:
    """What families may look at while options are made.

    Attributes:
        gated: the converted model with its original weights.
        batch: one, without labels, for which costs are counted.
        some: a few batches, to measure losses on where errors cannot be predicted.
        measure: what the budget limits.
        seed: of random draws.
        round_to: numbers of channels that stay are multiples of this; None decides by site.
        tied: sites that must keep equal widths.
        stock: only options that leave ordinary layers.
        modules: whether whole modules may be replaced.
        families: names of those that offer options; None for all.
        progress: show bars.
        calibration: by site name, the line of each channel and what it leaves; known once the data has been seen.
        warned: what makes results doubtful, such as too little data, by site; families add to it.
        told: what else a reader should know; likewise.
        memory: what one family has found out that others ask for, too.
    """

    gated: nn.Module
    batch: Any
    some: Sequence[Any]
    measure: Measure
    seed: int = 0
    round_to: int | None = None
    tied: frozenset[str] = frozenset()
    stock: bool = False
    modules: bool = True
    families: frozenset[str] | None = None
    progress: bool = False
    calibration: Mapping[str, SiteCalibration] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)

    def takes(self, family: str) -> bool:
        """Whether a family offers options.

        Examples:
            >>> context = Context(nn.Identity(), None, [], "flops", families=frozenset(["channels"]))
            >>> context.takes("channels"), context.takes("heads")
            (True, False)
        """
        return self.families is None or family in self.families


@dataclass(frozen=True)
class Layers:
    """The layers that would stand in a place, with any weights: to time them.

    Attributes:
        modules: by the path of what they stand for, or "NAME activation" for that of a site.
        key: a text that tells their shapes; equal texts run equally fast.
        keyword: by which the place is given its input; "" if by position.
    """

    modules: Mapping[str, nn.Module]
    key: str
    keyword: str = ""


@dataclass(frozen=True)
class Replayed:
    """A choice read from a plan, and the channels that stay, by index, if the plan says which."""

    choice: SiteChoice
    keep: Tensor | None = None


class Family(Protocol):
    """A kind of replacement. `places` is whatever its `find` gave; nobody else looks inside.

    Attributes:
        name: in lower case, plural.
        forms: that it adds to plans; () for a family whose choices are in the forms of collapsing.
        in_order: True if `refit` can carry its choices out one after the other, each on statistics taken behind those
            before it.
    """

    name: str
    forms: tuple[Form, ...] = ()
    in_order: bool = False

    def find(self, context: Context) -> Any:
        """The places where it applies."""

    def collectors(self, context: Context, places: Any) -> Sequence[Collector]:
        """The statistics that it wants of them."""

    def options(self, context: Context, places: Any, groups: Sequence[Group]) -> list[Group]:
        """The groups of the families before it, with its own options and groups added."""

    def layers(self, model: nn.Module, places: Any, group: Group, option: Option) -> Layers:
        """What would stand there; raises if that cannot be run by itself."""

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: Any,
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Carry choices out on a copy of the gated model; `keep` overrides which channels stay."""

    def refit(
        self, model: nn.Module, places: Any, choice: SiteChoice, see: Callable[[Sequence[Collector]], None]
    ) -> None:
        """Carry a choice out behind others; `see` runs collectors over the data. Asked for if `in_order`."""
        return

    def entry(self, site: SitePlan, choice: SiteChoice, gate: ChannelGate) -> SitePlan:
        """The plan of a site whose gate is left, told what was chosen; by default as collapsing has it."""
        return site

    def replay(self, places: Any, site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """A choice from its entry in a plan; None if the entry says nothing but which channels are linear.

        Raises:
            UsageError: the entry does not fit this model.
        """
        return None

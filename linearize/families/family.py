"""The interface of a family: all that the planner knows about a kind of replacement.

A family finds the places where it applies, says which statistics it needs, offers options with costs and predicted
losses, shows the layers that an option would leave, carries out a choice on a gated model, and reads it back from a
plan. To add a family, add a folder here, a line in `registry.FAMILIES`, tests, and a section in the docs.
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
from linearize.training.slots import Slot

REMAKE = "Make the plan from this model."
"""The remedy where a plan is of another model."""

__all__ = ["REMAKE", "Assembled", "Context", "Family", "Layers", "Movable", "Replayed"]


@dataclass
class Context:
    """What families may use while they make options.

    Attributes:
        gated: the converted model with its original weights.
        batch: one batch without labels; costs are counted for it.
        some: a few batches, to measure losses that cannot be predicted.
        measure: the cost that the budget limits.
        seed: of random draws.
        round_to: the number of channels that stay is a multiple of this; None decides for each site.
        tied: sites that must keep equal widths.
        uniform: whether all places that are alike must.
        stock: only options that leave ordinary layers.
        modules: whether whole modules may be replaced.
        families: names of those that offer options; None for all.
        lean: gather only what options of this kind need.
        progress: show bars.
        calibration: by site name, the line of each channel and its residual; known after the pass over the data.
        warned: texts about doubtful results, such as too little data at a site. Families add to it.
        told: further remarks. Families add to it.
        memory: what one family has found out that others ask for, too.
    """

    gated: nn.Module
    batch: Any
    some: Sequence[Any]
    measure: Measure
    seed: int = 0
    round_to: int | None = None
    tied: frozenset[str] = frozenset()
    uniform: bool = False
    stock: bool = False
    modules: bool = True
    families: frozenset[str] | None = None
    lean: bool = False
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
    """The layers that an option would leave in a place, with any weights, to measure their time.

    Attributes:
        modules: by the path of the module that each replaces, or "NAME activation" for the activation of a site.
        key: a text that describes their shapes. Layers with equal texts take equal time.
        keyword: the name of the argument that gives the place its input; "" if it is positional.
    """

    modules: Mapping[str, nn.Module]
    key: str
    keyword: str = ""


@dataclass(frozen=True)
class Assembled:
    """The layers of a group as one module of the group's input, to time them.

    Attributes:
        module: in eval mode.
        key: plain data that describe what stands around an option's layers, for tables of times.
    """

    module: nn.Module
    key: Sequence[Any] = ()


@dataclass(frozen=True)
class Replayed:
    """A choice that was read from a plan. `keep` has the indices of channels that stay, if the plan names them."""

    choice: SiteChoice
    keep: Tensor | None = None


@dataclass(frozen=True)
class Movable:
    """What gates may decide in training in one group: which of its channels go.

    Attributes:
        slots: of channels that may go and come back.
        choices: the choices for the numbers of channels that are gone, one number for each slot.
        costs: FLOPs, parameters and units of the group then.
        gone: by slot, the channels that are gone in the model at hand.
    """

    slots: tuple[Slot, ...]
    choices: Callable[[Sequence[int]], tuple[SiteChoice, ...]]
    costs: Callable[[Sequence[int]], tuple[float, float, float]]
    gone: Mapping[str, Tensor]


class Family(Protocol):
    """A kind of replacement. `places` is the result of `find`; only the family itself looks inside.

    Attributes:
        name: in lower case, plural.
        forms: the forms that it adds to plans; () if its choices use the forms of collapsing.
        in_order: True if `refit` can carry out its choices one after the other, each with statistics that are gathered
            behind the choices before it.
    """

    name: str
    forms: tuple[Form, ...] = ()
    in_order: bool = False

    def find(self, context: Context) -> Any:
        """Find the places where it applies."""

    def collectors(self, context: Context, places: Any) -> Sequence[Collector]:
        """The statistics that it needs from these places."""

    def options(self, context: Context, places: Any, groups: Sequence[Group]) -> list[Group]:
        """The groups of the families before it, with its own options and groups added."""

    def layers(self, model: nn.Module, places: Any, group: Group, option: Option) -> Layers:
        """The layers that an option would leave. Raises if they cannot be run separately."""

    def together(self, model: nn.Module, places: Any, group: Group, layers: Layers | None) -> Assembled | None:
        """The layers of an option of a group as one module, or the present ones. None, the default, if they cannot be.

        Needed only for groups that enclose no others: those are timed by what is called in the place of their module.
        """
        return None

    def apply(
        self,
        model: nn.Module,
        context: Context,
        places: Any,
        choices: Mapping[str, SiteChoice],
        keep: Mapping[str, Tensor],
    ) -> None:
        """Carry out choices on a copy of the gated model. `keep` overrides which channels stay."""

    def refit(
        self, model: nn.Module, places: Any, choice: SiteChoice, see: Callable[[Sequence[Collector]], None]
    ) -> None:
        """Carry out a choice behind others. `see` runs collectors over the data. Used only if `in_order`."""
        return

    def movable(
        self, model: nn.Module, context: Context, places: Any, group: Group, choices: Mapping[str, SiteChoice]
    ) -> Movable | None:
        """What gates may still decide in a group in which choices were carried out. None, the default, for nothing.

        Args:
            model: gated, with the choices carried out. Gates and weights may be prepared, if that keeps its function.
            context: of the survey.
            places: of this family.
            group: of the survey.
            choices: by site, those of this group that change anything.
        """
        return None

    def entry(self, site: SitePlan, choice: SiteChoice, gate: ChannelGate) -> SitePlan:
        """Write a choice into the plan of a site that still has its gate. By default the plan does not change."""
        return site

    def replay(self, places: Any, site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        """Read a choice from its entry in a plan. None if the entry says only which channels are linear.

        Raises:
            UsageError: the entry does not fit this model.
        """
        return None

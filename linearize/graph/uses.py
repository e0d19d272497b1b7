"""Which operations read the channels of a site, and on which axis the channels are there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from linearize.sites.site import Fold, Port


@dataclass
class Uses:
    """The linear maps that read an activation, and what lies in between."""

    ports: list[Port] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    folded: list[fx.Node] = field(default_factory=list)
    parts: int = 1
    bent: bool = False
    steady: bool = True
    direct: bool = True

    def fold(self, node: fx.Node, fold: Fold) -> int:
        """The index of a constant map, which may be met on more than one way."""
        if node not in self.folded:
            self.folded.append(node)
            self.folds.append(fold)
        return self.folded.index(node)


@dataclass(frozen=True)
class Way:
    """Where the channels of a site are on the path to a reader.

    Attributes:
        channels: of the site.
        first: where they begin among the channels of the tensor at hand.
        part: which part of the site's channels it is, if they were taken apart; they are `channels` many then.
        apart: True if they were.
        folds: of each constant map on the way its index, and where the channels that it acts on begin and end now.
    """

    channels: int
    first: int = 0
    part: int = 0
    apart: bool = False
    folds: tuple[tuple[int, int, int], ...] = ()

    def after(self, others: int) -> Way:
        """The path behind a concatenation that puts other channels in front."""
        folds = tuple((index, start + others, stop + others) for index, start, stop in self.folds)
        return replace(self, first=self.first + others, folds=folds)

    def behind(self, fold: int, channels: int) -> Way:
        """The path behind a constant map of all channels of the present tensor."""
        return replace(self, folds=(*self.folds, (fold, 0, channels)))

    def within(self, start: int, stop: int) -> Way | None:
        """The path in one of several parts of equal width; None if it is not such a part."""
        width = stop - start
        if self.apart or self.first or self.folds or not width or self.channels % width or start % width:
            return None
        return replace(self, channels=width, part=start // width, apart=True)

    def port(self, port: Port) -> Port:
        """The port of a linear map that reads them here."""
        return replace(port, start=self.first, stop=self.first + self.channels, folds=self.folds, part=self.part)

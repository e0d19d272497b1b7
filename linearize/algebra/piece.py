"""Pieces: affine maps with their places. The forms of a site read pieces and make new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from linearize.algebra.affine import Affine


class Infeasible(Exception):
    """This form cannot express the site; the argument says why."""


@dataclass(frozen=True)
class Piece:
    """The map that is put at one place of the model.

    Attributes:
        layer: "plain", "carry", "input_carry", "border", "ones" (maps), "all_ones" or "identity".
        affine: the map, for the first five.
        number: the one number that the layer takes: where the carried part starts, how many ones, and so on.
        at: for "ones", the place of the ones.
        border: for "border", the kernel of the constant-one channel.
        beside: for "carry", how many features the site carries in all, for all of its consumers.
        branches: for a consumer behind a concatenation, the inputs of each branch that has been changed: where they
            began and ended, and how many columns they have now.
        folded: the constant maps before it that are in it, each with the first input that it acts on.
    """

    layer: str
    affine: Affine | None = None
    number: int = 0
    at: int = 0
    border: Tensor | None = None
    beside: int = 0
    branches: tuple[tuple[int, int, int], ...] = ()
    folded: tuple[tuple[Any, int], ...] = ()


IDENTITY = Piece("identity")


Pieces = dict[str, Piece]


@dataclass(frozen=True)
class Maps:
    """The affine maps of a site, with all constant maps per channel folded in, and the future of each channel.

    Attributes:
        producer, up: maps to the channels; `up` is the other factor of a gated unit (then `producer` is the gate's).
        consumers: maps from the channels.
        producer_at, up_at, consumers_at: their places in the model, and the spatial dimensions that each works in.
        slope, intercept: the surrogate of every channel (C,).
        keep, linear, dropped: index of the channels that stay, become linear, or only leave a constant.
        steady, direct: as of the site.
        bent: a maximum over positions lies before a consumer: nothing can be merged over it.
        grouped: a map was grouped, so that its channels cannot be reordered without making it dense.
        packed: for a gated unit whose two maps are one layer: "gate_first" or "up_first".
        fixed_producer: the producer must stay a plain layer, because a site before it will fold into it.
        branches: for each consumer, whether it also reads other channels, behind a concatenation.
        parts: for each consumer, which part of the channels it reads, if they are taken apart.
        apart: keep, linear and dropped of each of these parts, counted from its first channel; empty if they are not.
    """

    producer: Affine
    consumers: tuple[Affine, ...]
    producer_at: tuple[str, int]
    consumers_at: tuple[tuple[str, int], ...]
    slope: Tensor
    intercept: Tensor
    keep: Tensor
    linear: Tensor
    dropped: Tensor
    up: Affine | None = None
    up_at: tuple[str, int] = ("", 0)
    steady: bool = True
    direct: bool = True
    bent: bool = False
    grouped: bool = False
    packed: str | None = None
    fixed_producer: bool = False
    branches: tuple[bool, ...] = ()
    parts: tuple[int, ...] = ()
    apart: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()

    @property
    def constant_bias(self) -> bool:
        """True if a constant in the hidden channels adds the same value at every output position of the consumers."""
        return self.steady and not any(consumer.padded for consumer in self.consumers)

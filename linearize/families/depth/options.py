"""Options of depth: each layer may go. What it loses is measured: errors that cross layers cannot be predicted.

Losses of layers do not add up: the second layer of a run costs more than it would alone. So they are measured in an
order: the layer that costs least goes first, and each further one is charged for what it adds. A plan that takes layers
in this order is told its true loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from linearize.families.depth.apply import merged_projection, spec_for
from linearize.families.depth.fit import DepthMap, fit_run
from linearize.families.depth.place import LayerChain
from linearize.families.enclosing import enclosed
from linearize.families.option import Group, Option, SiteChoice
from linearize.surgery.specs import build
from linearize.training.distance import losses_with_all

__all__ = ["DEPTH", "Runs", "with_layers"]

DEPTH = "layer gone"
_HOPELESS = 1.0  # a loss as bad as an output of zeros, or a nat of divergence
_TRIED = 3  # layers measured for each that goes


class Runs:
    """What stands for runs of layers: nothing, or a map that goes into the projection before them.

    Attributes:
        chain: observed.
        plain: layers in front of which a map was seen to do harm.
    """

    def __init__(self, model: nn.Module, chain: LayerChain) -> None:
        self.chain, self.model = chain, model
        self.plain: set[int] = set()
        self._maps: dict[tuple[int, int], DepthMap | None] = {}

    def map(self, before: int, length: int) -> DepthMap | None:
        """The map that was fitted for `length` removed layers behind the layer `before`; None if there is none."""
        layer = self.chain.layers[before] if before >= 0 else None
        if layer is None or layer.out is None or layer.sums is None or before + 1 in self.plain:
            return None
        if (before, length) not in self._maps:
            biased = self.model.get_submodule(layer.out.module)._parameters.get("bias") is not None
            self._maps[before, length] = fit_run(layer.sums, length, constant=biased)
        return self._maps[before, length]

    def maps(self, gone: Sequence[int]) -> dict[int, DepthMap]:
        """By index of a layer that stays, the map that is merged into it when the layers `gone` are removed."""
        lost, found = set(gone), dict[int, DepthMap]()
        for first in sorted(lost):
            if first - 1 in lost:
                continue
            length = next(n for n in range(1, len(self.chain.layers) + 1) if first + n not in lost)
            known = self.map(first - 1, length)
            if known is not None:
                found[first - 1] = known
        return found

    def standing(self, gone: Sequence[int]) -> dict[str, nn.Module]:
        """By path, the modules that stand in a model when some layers go."""
        made: dict[str, nn.Module] = {}
        for index in gone:
            path = self.chain.layers[index].path
            made[path] = build(spec_for(self.model, self.chain, index), self.model.get_submodule(path))
        for index, found in self.maps(gone).items():
            port = self.chain.layers[index].out
            if port is not None:
                made[port.module] = merged_projection(self.model.get_submodule(port.module), port, found)
        return made


def with_layers(
    groups: Sequence[Group],
    runs: Sequence[Runs],
    homes: Mapping[str, Sequence[str]],
    batches: Sequence[Any],
    *,
    progress: bool = False,
) -> list[Group]:
    """The groups, with one for each layer that may go, around those inside.

    Args:
        groups: so far.
        runs: one for each chain.
        homes: by site, the paths of all that belongs to its group.
        batches: on which losses are measured.
        progress: show bars.
    """
    found = list(groups)
    for run in runs:
        for index, loss in _losses(run, batches, progress=progress).items():
            layer = run.chain.layers[index]
            if _is_cut(found, layer.path):
                continue
            stay = Option((SiteChoice(layer.path, 0, form="unchanged"),), 0.0, layer.flops, layer.params, 0.0)
            gone = Option((SiteChoice(layer.path, 0, form=DEPTH, gone=(0,)),), loss, 0.0, 0.0, 0.0)
            whole = Group((layer.path,), (stay, gone), gone_form=DEPTH, encloses=True, shape=layer.shape)
            found = enclosed(found, whole, homes)
    return found


def _is_cut(groups: Sequence[Group], path: str) -> bool:
    """Whether a group changes modules both inside and outside of a layer."""
    inside = [[part.startswith(f"{path}.") for part in group.touches] for group in groups]
    return any(any(parts) and not all(parts) for parts in inside)


def _losses(run: Runs, batches: Sequence[Any], *, progress: bool) -> dict[int, float]:
    """By layer, what it adds to the loss when those before it in the order are gone; hopeless ones are left out."""
    free = run.chain.free
    some = [index for index in free if run.map(index - 1, 1) is not None]
    with_map = _measured(run, [(index,) for index in free], batches, progress=progress)
    run.plain = set(some)
    without = _measured(run, [(index,) for index in some], batches, progress=progress)
    run.plain = {index for index in some if without[index,] <= with_map[index,]}
    alone = {index: min(with_map[index,], without.get((index,), math.inf)) for index in free}
    order = sorted((i for i in alone if alone[i] < _HOPELESS), key=alone.__getitem__)
    if len(alone) == len(run.chain.layers) and len(order) == len(alone):
        order.pop()  # one layer stays
    found: dict[int, float] = {}
    gone: tuple[int, ...] = ()
    total = 0.0
    while len(found) < len(order):
        rest = [index for index in order if index not in found][:_TRIED]
        tried = _measured(run, [(*gone, index) for index in rest], batches, progress=progress)
        best = min(rest, key=lambda index: tried[*gone, index])
        loss = tried[*gone, best]
        if not loss < _HOPELESS:
            found |= {index: max(_HOPELESS, alone[index]) for index in order if index not in found}
            break
        found[best] = max(loss - total, alone[best] * 1e-3)
        gone, total = (*gone, best), max(total, loss)
    return {index: found[index] for index in free if found.get(index, _HOPELESS) < _HOPELESS}


def _measured(
    run: Runs, sets: Sequence[tuple[int, ...]], batches: Sequence[Any], *, progress: bool
) -> dict[tuple[int, ...], float]:
    """The real loss without each of some sets of layers."""
    names = {str(some): some for some in sets}
    standing = {name: run.standing(some) for name, some in names.items()}
    losses = losses_with_all(run.model, standing, batches, progress=progress)
    return {names[name]: loss for name, loss in losses.items()}

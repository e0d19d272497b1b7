"""Options of heads: how many units stay, with exact costs.

Shape letters: U units, K units that stay.
"""

from __future__ import annotations

from torch import nn

from linearize.families.heads.fit import HeadCurve
from linearize.families.heads.place import Heads
from linearize.families.option import Group, Option, SiteChoice
from linearize.tensors import held

__all__ = ["HEADS", "heads_group"]

HEADS = "fewer heads"
_MANY = 16  # numbers of units that are offered one by one; of more, an even choice


def heads_group(model: nn.Module, curve: HeadCurve) -> Group:
    """The options of an observed attention."""
    place = curve.place
    stay = _option(model, place, SiteChoice(place.name, place.units, form="unchanged"), 0.0)
    options = [stay]
    for keep in _numbers(place.units):
        choice = SiteChoice(place.name, keep, form=HEADS, gone=curve.gone(keep))
        options.append(_option(model, place, choice, curve.loss(keep)))
    return Group((place.name,), tuple(options), touches=place.touches)


def _numbers(units: int) -> list[int]:
    """Numbers of units that may stay, falling.

    Examples:
        >>> _numbers(4), _numbers(64)[:3], _numbers(64)[-1]
        ([3, 2, 1], [60, 56, 52], 4)
    """
    step = max(1, units // _MANY)
    return list(range(units - step, 0, -step))


def _option(model: nn.Module, place: Heads, choice: SiteChoice, loss: float) -> Option:
    """A choice with its costs: of the maps, and of the products of queries, keys and values."""
    flops = params = 0.0
    for rows in {rows.port.module: rows for rows in place.attention.rows}.values():
        left = len(place.left(rows.port.module, choice.gone))
        inputs, has_bias = _inputs(model, rows.port.module, transposed=rows.port.transposed)
        flops += 2.0 * rows.port.positions * place.batch * left * inputs
        params += left * (inputs + has_bias)
    module = model.get_submodule(place.name)
    weight, bias = held(module, "weight"), held(module, "bias")
    outputs = 0 if weight is None else weight.numel() // place.out.total
    columns = choice.keep * place.group
    flops += 2.0 * place.out.positions * place.batch * columns * outputs
    params += outputs * (columns + (bias is not None))
    heads = choice.keep * len(place.attention.units[0])
    flops += heads * place.attention.scores * place.batch
    size = weight.element_size() if weight is not None else 4
    share = choice.keep / place.units
    cache = (place.attention.kept * share + place.attention.shared) * place.batch * size * place.cached
    return Option((choice,), loss, flops, params, 0.0, cache=cache)


def _inputs(model: nn.Module, path: str, *, transposed: bool) -> tuple[int, int]:
    module = model.get_submodule(path)
    weight = held(module, "weight")
    inputs = 0 if weight is None else int(weight.shape[0 if transposed else 1])
    return inputs, int(held(module, "bias") is not None)

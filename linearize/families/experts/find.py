"""The mixtures of experts of a gated model: parameters that hold many matrices, or a list of modules, and a router.

Which expert a token picks depends on the data, so that a captured graph does not tell. What is known: one module has a
row for each expert, another one a matrix; one batch shows how they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from linearize.families.enclosing import is_in, meddled
from linearize.families.experts.calls import called, calls_of, checked
from linearize.families.experts.carry import carried
from linearize.families.experts.layout import parameters_of, with_rows
from linearize.families.experts.place import Experts
from linearize.families.reading import one_sample
from linearize.running.models import batches_of
from linearize.sites.record import record_of
from linearize.sites.select import UNSELECTED

__all__ = ["Found", "mixtures_of", "told"]

_UP = 2  # modules above the experts in which a router is looked for


@dataclass
class Found:
    """The mixtures of a model.

    Attributes:
        places: where experts can go, or become narrower, in the order of the modules.
        reasons: by path, why experts stay.
        equal: whether all must keep equally many.
    """

    places: list[Experts] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    equal: bool = False


def mixtures_of(model: nn.Module, batch: Any) -> Found:
    """The mixtures of a gated model.

    Args:
        model: gated.
        batch: one, for which costs are counted.
    """
    banks = dict(_banks(model))
    if not banks:
        return Found()
    routed = {path: _routed(model, path, count, listed=listed) for path, (count, listed) in banks.items()}
    owners = {path: place.path for path, place in routed.items() if isinstance(place, Experts)}
    record = record_of(model)
    if record is not None and any(site.ungated in UNSELECTED for site in record.sites):
        chosen = "include= or exclude= chooses among activations, and experts belong to none"
        return Found(reasons=dict.fromkeys(owners, chosen))
    inner = [
        f"{path}.{name}" for path in owners if banks[path][1] for name, _ in model.get_submodule(path).named_children()
    ]
    calls = calls_of(model, {*owners, *owners.values(), *inner}, batch)
    hooked = meddled(model)
    reasons: dict[str, str] = {}
    good: list[Experts] = []
    for path, place in routed.items():
        made = place if not isinstance(place, Experts) else called(model, place, calls)
        if isinstance(made, Experts):
            made = checked(model, made, hooked, calls)
        if isinstance(made, Experts):
            good.append(made)
        elif made:
            reasons[path] = made
    places, more, equal = carried(model, good, one_sample(batches_of(batch)[0])[0])
    if good and all(place.fixed or place.narrow for place in places):  # whatever a model has against a single sample
        places, more, equal = carried(model, good, batches_of(batch)[0])
    return Found(places, reasons | more, equal)


def told(reasons: Mapping[str, str]) -> list[str]:
    """The reasons in a few words, each once.

    Examples:
        >>> told({"a.0": "odd", "a.1": "odd"})
        ['experts stay in a.0 (and 1 more): odd']
    """
    places: dict[str, list[str]] = {}
    for path, why in reasons.items():
        places.setdefault(why, []).append(path or "the model")
    more = {why: f" (and {len(some) - 1} more)" if len(some) > 1 else "" for why, some in places.items()}
    return [f"experts stay in {some[0]}{more[why]}: {why}" for why, some in places.items()]


def _banks(model: nn.Module) -> Iterator[tuple[str, tuple[int, bool]]]:
    """Modules that may hold experts: how many, and whether as a list of modules."""
    for path, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        counts = {len(p) for p in own if p.dim() == 3}
        if path and len(counts) == 1 and sum(p.dim() == 3 for p in own) > 1 and min(counts) > 1:
            yield path, (counts.pop(), False)
        children = list(module.children())
        if path and isinstance(module, nn.ModuleList) and len(children) > 1 and _alike(children):
            yield path, (len(children), True)


def _alike(modules: list[nn.Module]) -> bool:
    """Whether modules are of one kind, with matrices of the same shapes."""
    shapes = [[(name, tuple(value.shape)) for name, value in parameters_of(module)] for module in modules]
    matrices = any(len(shape) > 1 for _, shape in shapes[0])
    return matrices and len({type(m) for m in modules}) == 1 and all(some == shapes[0] for some in shapes)


def _routed(model: nn.Module, bank: str, count: int, *, listed: bool) -> Experts | str:
    """A bank with its router, in the smallest module around both; or why there is none, "" if it is no bank at all."""
    path = bank
    for _ in range(_UP):
        if not path:
            break
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        named = {f"{path}.{name}".strip("."): module for name, module in owner.named_modules()}
        others = {name: module for name, module in named.items() if not is_in(bank)(name)}
        routers = [name for name, module in others.items() if _is_router(module, count)]
        if len(routers) == 1:
            rows: dict[str, list[str]] = {} if listed else {bank: with_rows(model.get_submodule(bank), count)}
            for name, module in others.items():
                some = with_rows(module, count)
                if all(own in some for own, value in module._parameters.items() if value is not None):
                    rows[name] = some
            return Experts(path, bank, routers[0], count, listed=listed, rows={n: s for n, s in rows.items() if s})
        if routers and not listed:
            return (
                f"found {len(routers)} modules beside it with a row for each of its {count} experts: {routers[0]}, ..."
            )
    return "" if listed else f"found no router beside it, with a row for each of its {count} experts"


def _is_router(module: nn.Module, count: int) -> bool:
    own = [value for value in module._parameters.values() if value is not None]
    matrices = [value for value in own if value.dim() == 2 and len(value) == count]
    return len(matrices) == 1 and all(len(value) == count for value in own if value.dim())

"""Places that enclose others: what is inside a module that may be replaced as a whole, and how costs nest.

Whoever replaces a module replaces all sites and places inside. So a module qualifies only if no group of sites is half
inside, and the group of a module counts for itself only what the groups inside do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from linearize.families.option import Group, Option, SiteChoice
from linearize.gating.gate import gates
from linearize.gating.groups import ports_of
from linearize.sites.record import record_of
from linearize.sites.select import UNSELECTED
from linearize.tensors import meddler

__all__ = ["enclosed", "encloses", "homes_of", "is_in", "may_go", "meddled"]


def homes_of(model: nn.Module, groups: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """By site, the paths of all that belongs to its group: gates, maps and folds."""
    named = gates(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, list[str]] = {}
    for names in groups:
        parts: list[str] = []
        for name in names:
            gate = named[name]
            parts.append(paths[id(gate)])
            if gate.site is not None:
                parts += [port.module for port in ports_of(gate.site)]
                parts += [f.module for f in (*gate.site.folds, *gate.site.up_folds, *gate.site.consumer_folds)]
        found |= dict.fromkeys(names, parts)
    return found


def encloses(path: str, parts: Sequence[str]) -> bool:
    """Whether all of some paths are inside a module."""
    return all(part.startswith(f"{path}.") for part in parts)


def is_in(path: str) -> Callable[[str], bool]:
    """A function that tells of a path whether it is `path` or lies inside it."""
    return lambda other: other == path or other.startswith(f"{path}.")


def may_go(model: nn.Module, path: str, homes: Mapping[str, Sequence[str]]) -> bool:
    """True if no group of sites is half inside, and the user's choice of sites does not speak against it."""
    for parts in homes.values():
        inside = [is_in(path)(part) for part in parts]
        if any(inside) and not encloses(path, parts):
            return False
    record = record_of(model)
    barred = [site for site in (record.sites if record else ()) if site.ungated in UNSELECTED]
    if any(is_in(path)(site.module) for site in barred):
        return False
    return not barred or any(encloses(path, parts) for parts in homes.values())


def meddled(model: nn.Module) -> dict[str, str]:
    """By path, the hooks and forwards of their own that modules of a model have, which a layer in their place loses."""
    return {path: found for path, module in model.named_modules() if (found := meddler(module)) is not None}


def enclosed(groups: Sequence[Group], whole: Group, homes: Mapping[str, Sequence[str]]) -> list[Group]:
    """The groups with one more that encloses what is inside its module, or its options added to one that does already.

    Args:
        groups: so far, none of which is half inside.
        whole: its only site is the path of a module; its first option, to stay, has the costs of all of the module.
        homes: by site, the paths of all that belongs to its group.
    """
    path, (stay, *others) = whole.sites[0], whole.options
    for index, group in enumerate(groups):
        if group.encloses and group.sites == whole.sites:
            more = replace(group, options=(*group.options, *others))
            return [*groups[:index], more, *groups[index + 1 :]]
    around = [group.sites[0] for group in groups if group.encloses and path.startswith(f"{group.sites[0]}.")]
    outer = max(around, key=len, default="")
    inner = [group for group in groups if group.inside == outer and _lies_in(group, path, homes)]
    held = [_total(groups, group) for group in inner]
    costs = {name: max(0.0, getattr(stay, name) - sum(getattr(o, name) for o in held)) for name in _COSTS}
    made = replace(whole, options=(replace(stay, **costs), *others), inside=outer, encloses=True)
    found: list[Group] = []
    for group in groups:
        if group in inner:
            found.append(replace(group, inside=path, gone_form=group.gone_form or whole.gone_form))
        elif group.encloses and group.sites[0] == outer:  # what it counted for itself is the new one's now
            less = {name: max(0.0, getattr(group.stay, name) - costs[name]) for name in _COSTS}
            found.append(replace(group, options=(replace(group.stay, **less), *group.options[1:])))
        else:
            found.append(group)
    return [*found, made]


_COSTS = ("flops", "params", "cache")


def _total(groups: Sequence[Group], group: Group) -> Option:
    """What a group costs with all that is inside it."""
    parts = [group.stay]
    waiting = [group]
    while waiting:
        outer = waiting.pop()
        inside = [other for other in groups if outer.encloses and other.inside == outer.sites[0]]
        parts += [other.stay for other in inside]
        waiting += inside
    sums = {name: sum(getattr(part, name) for part in parts) for name in _COSTS}
    return Option((SiteChoice(group.sites[0], 0),), 0.0, sums["flops"], sums["params"], 0.0, cache=sums["cache"])


def _lies_in(group: Group, path: str, homes: Mapping[str, Sequence[str]]) -> bool:
    parts = list(group.touches) or [part for site in group.sites for part in homes.get(site, (site,))]
    return encloses(path, parts)

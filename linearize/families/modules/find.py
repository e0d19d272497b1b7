"""Find the modules that one linear map could replace: they map one tensor to one tensor and do nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.cost import flops_of_modules
from linearize.families.enclosing import encloses, homes_of, is_in, may_go, meddled
from linearize.families.modules.place import Whole
from linearize.gating.gate import ChannelGate
from linearize.graph.protect import untouched
from linearize.running.models import batches_of, call, eagerly, evaluating
from linearize.tensors import meddler, oddity
from linearize.zoo.caches import generates

__all__ = ["wholes_of"]

_WIDEST = 15_000  # features of input and output together, whose covariance takes what a pass may hold
_PLAIN = (bool, int, float, str)


@dataclass
class _Call:
    """How a module was called, and what came out."""

    times: int = 0
    plain: bool = True
    alone: bool = True
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    fits: bool = False
    versions: tuple[int, ...] = ()
    keyword: str = ""
    nones: int = 0


def wholes_of(
    model: nn.Module, batch: Any, groups: Sequence[Sequence[str]], keepers: Collection[str] = ()
) -> list[Whole]:
    """The modules of a gated model that one linear map could replace at less cost, outermost first.

    A module qualifies if it is called once, with tensors and plain values only, of which it overwrites none, and gives
    one tensor (and None behind it, perhaps) whose shape differs from that of its input in the channels at most; if it
    holds all sites of a group or none; if no activation inside was excluded by the user; and if neither it nor a module
    inside has a hook, or a forward put on the object, which would be lost. Its input is the first
    argument, or the first tensor if all come by keyword. In a model that generates text there must be no other tensor,
    and no None: that may be a cache, or become one, which another call would miss. A module that holds nothing but one
    group of sites does not qualify, since that group has the same option.

    Args:
        model: gated.
        batch: one, for which costs are counted.
        groups: of sites, by name.
        keepers: paths of modules that may be told anything, such as caches that are known to be theirs alone, and may
            give anything behind their output.
    """
    calls = _calls(model, batch, keepers)
    flops = flops_of_modules(model, batch)
    homes, hooked = homes_of(model, groups), meddled(model)
    found: list[Whole] = []
    for path, seen in calls.items():
        module = model.get_submodule(path)
        axis = _axis(module, seen)
        quantised = any(oddity(parameter) for parameter in module.parameters())
        if axis is None or quantised or not may_go(model, path, homes) or any(map(is_in(path), hooked)):
            continue
        inputs, outputs = seen.before[axis], seen.after[axis]
        least = 2.0 * math.prod(seen.before) * outputs
        if inputs + outputs > _WIDEST or flops.get(path, 0) <= least:
            continue
        sites = tuple(name for names in groups for name in names if encloses(path, homes[name]))
        gated = sum(gate.alpha.numel() for gate in module.modules() if isinstance(gate, ChannelGate))
        params = float(sum(parameter.numel() for parameter in module.parameters()) - gated)
        costs = float(flops[path]), params
        whole = Whole(path, sites, _around(path, found), inputs, outputs, axis, seen.alone, *costs, seen.before)
        found.append(replace(whole, keyword=seen.keyword, nones=seen.nones))
    kept = _needed(found, flops, groups, homes)
    called = {"", *calls}
    return [
        replace(whole, inside=_around(whole.path, kept), behind=_behind(model, whole.path, called)) for whole in kept
    ]


def _behind(model: nn.Module, path: str, called: set[str]) -> str:
    """The module before it in a chain that runs as `nn.Sequential` does: nothing else sees what lies between."""
    parent, _, name = path.rpartition(".")
    chain = model.get_submodule(parent)
    if parent not in called or type(chain).forward is not nn.Sequential.forward:
        return ""
    names = list(chain._modules)
    place = names.index(name)
    before = f"{parent}.{names[place - 1]}".removeprefix(".") if place else ""
    return "" if not before or meddler(model.get_submodule(before)) else before


def _around(path: str, wholes: Sequence[Whole]) -> str:
    """The path of the smallest whole module around a module, of those listed outermost first; "" for none."""
    return next((whole.path for whole in reversed(wholes) if path.startswith(f"{whole.path}.")), "")


def _calls(model: nn.Module, batch: Any, keepers: Collection[str]) -> dict[str, _Call]:
    """How every module with children was called in one forward, outermost first."""
    found: dict[str, _Call] = {}
    inner = {path for path, module in model.named_modules() if isinstance(module, ChannelGate)}

    lonely = any(generates(module) for module in model.modules())

    def begin(seen: _Call, *, kept: bool) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            seen.keyword, given = _given(args, kwargs)
            rest = pytree.tree_leaves((args[1:], {name: x for name, x in kwargs.items() if name != seen.keyword}))
            seen.times += 1
            seen.alone = len(args) == 1 and not kwargs
            told = (isinstance(x, _PLAIN) or (isinstance(x, Tensor | None) and not lonely) for x in rest)
            seen.plain = kept or all(told)
            seen.plain &= isinstance(given, Tensor) and given.is_floating_point()
            seen.before = tuple(given.shape) if seen.plain else ()
            seen.versions = _versions(given) if kept else _versions(args, kwargs)

        return see

    def end(seen: _Call, *, kept: bool) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if type(output) is tuple and len(output) > 1 and (kept or all(part is None for part in output[1:])):
                output, seen.nones, seen.alone = output[0], len(output) - 1, False
            good = seen.plain and type(output) is Tensor and output.is_floating_point()
            same = output is _given(args, kwargs)[1]
            now = _versions(_given(args, kwargs)[1]) if kept else _versions(args, kwargs)
            seen.fits = good and now == seen.versions and not same
            seen.after = tuple(output.shape) if good else ()

        return see

    def hooks() -> Iterator[Any]:
        for path, module in model.named_modules():
            encloses = any(path == gate or path.startswith(f"{gate}.") for gate in inner)
            if path and not encloses and any(True for _ in module.children()):
                seen = found[path] = _Call()
                yield module.register_forward_pre_hook(begin(seen, kept=path in keepers), with_kwargs=True)
                yield module.register_forward_hook(end(seen, kept=path in keepers), with_kwargs=True)

    with eagerly(), evaluating(model), untouched(model):
        handles = list(hooks())
        try:
            call("model", model, batches_of(batch)[0])
        finally:
            for handle in handles:
                handle.remove()
    return {path: seen for path, seen in found.items() if seen.times == 1 and seen.fits}


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, Any]:
    """A module's input, and the keyword by which it comes: the first argument, or else the first tensor."""
    if args:
        return "", args[0]
    return next(((name, value) for name, value in kwargs.items() if isinstance(value, Tensor)), ("", None))


def _versions(*values: Any) -> tuple[int, ...]:
    """How often each tensor in some arguments has been overwritten."""
    return tuple(leaf._version for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def _axis(module: nn.Module, seen: _Call) -> int | None:
    """Where the channels are, counted from the end, as the first map inside that reads so many says.

    None if there is no such map, or if another axis changes.
    """
    before, after = seen.before, seen.after
    if len(before) != len(after) or not 2 <= len(before) <= 5:
        return None
    for inner in module.modules():
        for name, axis in (("in_features", len(before) - 1), ("in_channels", 1)):
            if getattr(inner, name, None) == before[axis]:
                same = before[:axis] + before[axis + 1 :] == after[:axis] + after[axis + 1 :]
                return axis - len(before) if same else None
    return None


def _needed(
    found: Sequence[Whole],
    flops: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    homes: Mapping[str, Sequence[str]],
) -> list[Whole]:
    """Without those that hold nothing but one other whole module, or one group of sites and its maps."""
    kept = []
    for whole in found:
        inner = [other for other in found if other.inside == whole.path]
        direct = [
            names for names in groups
            if encloses(whole.path, homes[names[0]]) and not any(encloses(o.path, homes[names[0]]) for o in inner)
        ]  # fmt: skip
        own = whole.flops - sum(flops[other.path] for other in inner)
        for names in direct:
            own -= sum(flops.get(part, 0) for part in dict.fromkeys(homes[names[0]]))
        if own > 0.01 * whole.flops or len(inner) + len(direct) > 1:
            kept.append(whole)
    return kept

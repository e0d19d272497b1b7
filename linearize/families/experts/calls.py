"""How the modules of a mixture are called: seen in one batch, and tried on some of its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.families.enclosing import is_in
from linearize.families.experts.layout import numbers_for
from linearize.families.experts.place import ArgumentKey, Experts
from linearize.families.experts.twin import first_tensor, without_experts
from linearize.families.trials import run_watched
from linearize.graph.dryrun import first_line
from linearize.graph.protect import untouched
from linearize.running.models import evaluating
from linearize.tensors import oddity

__all__ = ["BankCall", "called", "calls_of", "checked"]

_EVEN = {torch.float64: 1e-10, torch.float32: 1e-4}  # relative: the same rows in another batch


@dataclass
class BankCall:
    """How a module was called."""

    times: int = 0
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: Any = None

    @property
    def rows(self) -> int:
        """Number of rows of the first tensor argument in the last call."""
        return next((value.shape[:-1].numel() for value in self.tensors.values() if value.dim()), 0)

    @property
    def tensors(self) -> dict[ArgumentKey, Tensor]:
        """The tensors among its arguments."""
        named: list[tuple[ArgumentKey, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return {key: value for key, value in named if isinstance(value, Tensor)}


def calls_of(model: nn.Module, paths: Iterable[str], batch: Any) -> dict[str, BankCall]:
    """How some modules are called in one forward."""
    found = {path: BankCall() for path in paths}

    def see(seen: BankCall) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            seen.times += 1
            seen.args, seen.kwargs, seen.output = args, dict(kwargs), output

        return hook

    run_watched(model, [(model.get_submodule(path), see(seen)) for path, seen in found.items()], batch)
    return found


def called(model: nn.Module, place: Experts, calls: Mapping[str, BankCall]) -> Experts | str:
    """The place, told how the mixture and its bank are called; or why this is not understood."""
    whole = calls[place.path]
    out = first_tensor(whole.output)
    tokens = {key: value for key, value in whole.tensors.items() if value.is_floating_point()}
    if whole.times != 1:
        return f"{place.path} is called {whole.times} times, not once"
    if len(whole.tensors) != 1 or len(tokens) != 1 or out is None or out.shape != next(iter(tokens.values())).shape:
        return "" if place.listed else f"{place.path} does more than map each token to another"
    key, x = next(iter(tokens.items()))
    if isinstance(key, int) and key:
        return f"{place.path} gets its tokens as argument {key}"
    made = replace(place, keyword=key if isinstance(key, str) else "", shape=tuple(x.shape))
    if place.listed:
        rows = [calls[f"{place.bank}.{name}"].rows for name, _ in model.get_submodule(place.bank).named_children()]
        return replace(made, load=sum(rows) / max(1, made.tokens)) if any(rows) else ""
    seen = calls[place.bank]
    if seen.times != 1:
        return f"it is called {seen.times} times, not once"
    flat = {key: value for key, value in seen.tensors.items() if value.dim() == 2}
    index = [key for key, v in flat.items() if not v.is_floating_point() and v.dtype != torch.bool]
    if len(index) != 1 or len(seen.tensors) != 3 or len(seen.args) + len(seen.kwargs) != 3:
        return "it is not told by number which experts a token picks"
    chosen = flat[index[0]]
    weights = [key for key, v in flat.items() if v.is_floating_point() and v.shape == chosen.shape]
    given = [key for key, v in flat.items() if v.is_floating_point() and key not in weights and len(v) == len(chosen)]
    if chosen.shape == x.shape or len(weights) != 1 or len(given) != 1:
        return "it does not get tokens, the numbers of their experts, and a weight for each"
    if int(chosen.min()) < 0 or int(chosen.max()) >= place.count:
        return f"it is told of expert {int(chosen.max())}, and has {place.count}"
    load = float(chosen.shape[1])
    return replace(made, picks=chosen.shape[1], load=load, given=(given[0], index[0], weights[0]))


def checked(
    model: nn.Module, place: Experts, hooked: Mapping[str, str], calls: Mapping[str, BankCall]
) -> Experts | str:
    """The place, if its tensors may be sliced; told why no expert can go, if it does not run without one."""
    if any(map(is_in(place.path), hooked)):
        return "a module inside has a hook, which would be lost"
    names = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    if any(names[id(value)] > 1 for path in place.touches for value in model.get_submodule(path).parameters()):
        return "one of its tensors has another name, too"
    for path in place.touches:
        module = model.get_submodule(path)
        odd = next(
            (kind for value in module._parameters.values() if value is not None and (kind := oddity(value))), None
        )
        if odd is not None:
            return f"a tensor of {path} is {odd}"
    found = _tried(model, place, calls)
    if isinstance(found, str) and not place.listed:  # they may still be narrower
        return replace(place, fixed=found)
    return found


def _tried(model: nn.Module, place: Experts, calls: Mapping[str, BankCall]) -> Experts | str:
    """The place, if the mixture runs without an expert, and maps each token by itself; or why not."""
    if place.count <= place.least:
        return f"each token picks all of its {place.count} experts"
    mixture = model.get_submodule(place.path)
    whole = calls[place.path]
    x, y = next(iter(whole.tensors.values())), first_tensor(whole.output)
    if y is None:
        return f"{place.path} gives no tensor"
    why = ""
    for attributes in numbers_for(model, place):
        try:
            with evaluating(mixture), untouched(mixture):
                return _apart(mixture, replace(place, attributes=attributes), x, y, calls)
        except Exception as error:  # whatever the mixture's own code raises
            why = why or f"{place.path} does not run without an expert ({first_line(error)})"
    return "" if place.listed else why


def _apart(mixture: nn.Module, place: Experts, x: Tensor, y: Tensor, calls: Mapping[str, BankCall]) -> Experts | str:
    """Whether rows alone give what they give among others, and whether those notice that do not pick what goes."""
    rows, out = x.flatten(0, -2), y.flatten(0, -2)
    half = torch.arange(0, len(rows), 2, device=rows.device)
    scale = out.abs().max().clamp_min(torch.finfo(out.dtype).tiny)
    even = _EVEN.get(out.dtype, 5e-2)
    alone = _run(mixture, place, rows[half])
    if alone is None or not float((alone - out[half]).abs().max() / scale) <= even:
        return "" if place.listed else f"what {place.path} gives for a token depends on other tokens"
    if place.listed:  # how many it needs is seen by trying
        for least in range(1, place.count):
            with suppress(Exception):
                if _run(without_experts(mixture, place, range(least, place.count)), place, rows[half]) is not None:
                    return replace(place, picks=least)
        return ""
    index = calls[place.bank].tensors[place.given[1]]
    rarest = int(torch.bincount(index.flatten(), minlength=place.count).argmin())
    picked = (index == rarest).any(1)
    twin = without_experts(mixture, place, (rarest,))
    if bool(picked.all()):
        return replace(place, closed=False)
    free = (~picked).nonzero().flatten()
    found = _run(twin, place, rows[free])
    same = found is not None and float((found - out[free]).abs().max() / scale) <= even
    return replace(place, closed=same)


def _run(mixture: nn.Module, place: Experts, rows: Tensor) -> Tensor | None:
    x = rows.view(*(1,) * (len(place.shape) - 2), *rows.shape)
    out = first_tensor(mixture(**{place.keyword: x}) if place.keyword else mixture(x))
    return None if out is None else out.flatten(0, -2)

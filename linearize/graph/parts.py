"""The sites of a model whose control flow depends on its data: those of every part that can be captured separately.

A part is a module. Its forward is captured as a whole, so the result is valid for any caller. The code between the
parts is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linearize.errors import CaptureError
from linearize.graph.capture import Inputs
from linearize.graph.discover import discover
from linearize.graph.protect import untouched
from linearize.nest import copied
from linearize.sites.site import Fold, Site


def discover_parts(model: nn.Module, inputs: Inputs) -> tuple[Site, ...]:
    """The sites inside the largest modules that can be captured separately, in order of execution.

    Args:
        model: it runs once, for real, to see what its modules are called with.
        inputs: of its forward.

    Raises:
        CaptureError: the model does not run.

    Examples:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        ...     def forward(self, x):
        ...         return self.mlp(x) if x.sum() > 0 else self.mlp(-x)
        >>> [site.name for site in discover_parts(Net(), ((torch.ones(1, 2),), {}))]
        ['mlp.1']
    """
    calls = _calls(model, inputs)
    order = {path: position for position, path in enumerate(calls)}
    parts = sorted(_parts(model, "", calls, _owners(model)), key=lambda part: order[part[0]])
    found: list[Site] = []
    for path, sites in parts:
        found += [replace(under(site, path), order=len(found) + index) for index, site in enumerate(sites)]
    return tuple(found)


def _parts(
    model: nn.Module, path: str, calls: dict[str, Inputs], owners: dict[int, list[str]]
) -> Iterator[tuple[str, tuple[Site, ...]]]:
    for name, child in model.get_submodule(path).named_children():
        place = f"{path}.{name}" if path else name
        if not any(True for _ in child.children()):
            continue  # an activation alone has no producer
        if place in calls and _by_itself(place, owners):
            try:
                yield place, discover(child, calls[place])
                continue
            except CaptureError:
                pass
        yield from _parts(model, place, calls, owners)


def _calls(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """What each module is called with the first time, in order.

    Without those a module inside of which is also called by code outside: they cannot be looked at by themselves.
    """
    found: dict[str, Inputs] = {}
    open_calls: list[str] = []
    strays: list[tuple[str, frozenset[str]]] = []

    def enter(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(path, (args, kwargs))
            strays.append((path, frozenset(open_calls)))
            open_calls.append(path)

        return note

    def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
        open_calls.pop()

    named = [(path, module) for path, module in model.named_modules() if path]
    hooks = [module.register_forward_pre_hook(enter(path), with_kwargs=True) for path, module in named]
    hooks += [module.register_forward_hook(leave, always_call=True) for _, module in named]
    try:
        with untouched(model), torch.no_grad():
            args, kwargs = copied(inputs)
            model(*args, **kwargs)
    except Exception as error:  # whatever the model's own code raises
        name = type(model).__name__
        raise CaptureError(name, f"does not run ({type(error).__name__}: {error})", "Pass other inputs.") from error
    finally:
        for hook in hooks:
            hook.remove()
    open_to_all = {
        outer for outer in found for path, inside in set(strays) if _is_in(path, outer) and outer not in inside
    }
    return {path: given for path, given in found.items() if path not in open_to_all}


def _is_in(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of each parameter and buffer, all of them where it is registered in several places."""
    found: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        key = tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else id(tensor)
        found.setdefault(key or id(tensor), []).append(name)
    return found


def _by_itself(path: str, owners: dict[int, list[str]]) -> bool:
    """Whether no tensor of a part is registered outside of it, too."""
    inside = f"{path}."
    groups = [[name.startswith(inside) for name in names] for names in owners.values()]
    return all(all(group) for group in groups if any(group))


def under(site: Site, path: str) -> Site:
    """The same site, seen from a model that has the site's model at `path`.

    Examples:
        >>> under(Site("1", "1", "relu", channels=8, axis=-1, order=0, positions=2), "mlp").name
        'mlp.1'
    """

    def full(name: str) -> str:
        return f"{path}.{name}" if name else path

    def port(value: Any) -> Any:
        return None if value is None else replace(value, module=full(value.module))

    def folds(values: tuple[Fold, ...]) -> tuple[Fold, ...]:
        return tuple(fold.renamed(full) for fold in values)

    return replace(
        site,
        name=full(site.name),
        module=full(site.module),
        producer=port(site.producer),
        up=port(site.up),
        consumers=tuple(port(consumer) for consumer in site.consumers),
        folds=folds(site.folds),
        up_folds=folds(site.up_folds),
        consumer_folds=folds(site.consumer_folds),
    )

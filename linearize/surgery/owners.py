"""Reach activation calls inside forwards: rewrite the modules that make them, and check that nothing else changed."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import fx, nn

from linearize.errors import ConvertError, LinearizeError
from linearize.graph.capture import Inputs
from linearize.graph.dryrun import Op, dry_run
from linearize.graph.overwrite import stale_inputs
from linearize.sites.record import Step
from linearize.sites.site import Site
from linearize.surgery.source import has_source
from linearize.surgery.specs import build
from linearize.surgery.symbolic import Options, concrete_arguments
from linearize.surgery.watch import places_of

_log = logging.getLogger(__name__)


def rewrite_owners(model: nn.Module, sites: tuple[Site, ...], inputs: Inputs) -> tuple[tuple[Site, ...], list[Step]]:
    """Make activation calls inside forwards calls of children, so that they can be swapped like any module.

    Functions in attributes become children first; then the forwards are rewritten that call others.
    """
    owners: dict[str, list[Site]] = {}
    for site in sites:
        if site.ungated is None and site.call is not None:
            owners.setdefault(site.module, []).append(site)
    held = _held(model, sites)
    if not owners and not held:
        return sites, []
    calls = Counter((site.module, site.target) for site in sites if site.call is not None)
    concrete, expected = _observe(model, list(owners), inputs)
    rewriting = _Rewriting(model, inputs, expected)
    rewriting.hold(held)
    for owner, inside in owners.items():
        options: Options = {
            "calls": [_call(site, calls[owner, site.target]) for site in inside],
            "concrete": concrete.get(owner, {}),
        }
        rewriting.rewrite({"path": owner, "module": {"type": "Rewrite", **options}})
    rewriting.check()
    return tuple(_with_reason(site, rewriting) for site in sites), [*rewriting.held, *rewriting.steps]


def _held(model: nn.Module, sites: tuple[Site, ...]) -> list[Step]:
    """Steps that make children of the functions in attributes that sites are called by."""
    called = [
        site.name if site.call is None else ".".join(filter(None, (site.module, site.target)))
        for site in sites
        if site.ungated is None and site.function is None
    ]
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    steps: list[Step] = []
    for path in dict.fromkeys(path for path in called if path not in known):
        owner, _, name = path.rpartition(".")
        steps.append({"path": owner, "module": {"type": "Held", "attribute": name}})
    return steps


def _with_reason(site: Site, rewriting: _Rewriting) -> Site:
    why = rewriting.failed.get(site.module) or rewriting.missed.get(site.name)
    return replace(site, ungated=why) if why and site.call is not None and site.ungated is None else site


@dataclass
class _Rewriting:
    """Rewrites forwards one by one, and takes back those after which the model does other things than before."""

    model: nn.Module
    inputs: Inputs
    expected: list[list[Op]] | None
    steps: list[Step] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    held: list[Step] = field(default_factory=list)
    originals: dict[str, tuple[type[nn.Module], set[str], fx.Graph | None]] = field(default_factory=dict)

    def hold(self, steps: list[Step]) -> None:
        """Make functions in attributes children. The capture has already shown that this works."""
        for step in steps:
            build(step["module"], self.model.get_submodule(step["path"]))
        self.held = steps

    def rewrite(self, step: Step, *, checked: bool = False) -> None:
        """Rewrite the source, or else a graph. If `checked`, only if the model's operations stay the same."""
        path, module = step["path"], self.model.get_submodule(step["path"])
        graph = copy.deepcopy(module.graph) if isinstance(module, fx.GraphModule) else None
        self.originals.setdefault(path, (type(module), set(dict(module.named_children())), graph))
        try:
            # A graph stands for a forward as long as nothing changes that it reads: the source always does.
            changed = self._in_source(step) if graph is None and has_source(module) else step
            build(changed["module"], module)
        except LinearizeError as error:
            self.failed[path] = self._reason(path, error.found)
            return
        if self.expected is not None and (not checked or operations(self.model, self.inputs) == self.expected):
            self.steps.append(changed)
            self.failed.pop(path, None)
            return
        self._undo(path)
        same = "does other things" if self.expected is not None else "cannot be checked, since the model does not run"
        self.failed[path] = self._reason(path, f"its rewritten forward {same}")

    def _in_source(self, step: Step) -> Step:
        """The same step with the place of each call in the source."""
        options = step["module"]
        module = self.model.get_submodule(step["path"])
        places = places_of(self.model, module, self.inputs)
        placed, missed = [], dict[str, str]()
        for call in options["calls"]:
            found = places.get(call["target"], [])
            place = found[call["index"]] if len(found) == call["of"] else None
            if place is not None and found.count(place) == 1:
                placed.append({**call, "place": asdict(place)})
            else:
                missed[call["child"]] = _missed(call, found)
        if not placed:
            raise ConvertError(step["path"], next(iter(missed.values())), "")
        prefix = f"{step['path']}." if step["path"] else ""
        self.missed |= {f"{prefix}{child}": self._reason(step["path"], why) for child, why in missed.items()}
        return {**step, "module": {"type": options["type"], "calls": placed}}

    def check(self) -> None:
        """Compare the model's operations with those before. If they differ, find the rewrite that caused it."""
        if not self.steps or operations(self.model, self.inputs) == self.expected:
            return
        tried, self.steps = self.steps, []
        for step in tried:
            self._undo(step["path"])
        for step in tried:
            self.rewrite(step, checked=True)

    def _undo(self, path: str) -> None:
        module = self.model.get_submodule(path)
        own, children, graph = self.originals[path]
        if graph is not None and isinstance(module, fx.GraphModule):
            module.graph = graph
        else:
            module.__class__ = own
        for name in set(dict(module.named_children())) - children:
            delattr(module, name)

    @staticmethod
    def _reason(path: str, why: str) -> str:
        return f"the forward of {path or 'the model'} cannot be rewritten: {why}"


def read_after_write(model: nn.Module, sites: tuple[Site, ...], inputs: Inputs) -> tuple[Site, ...]:
    """Refuse a gate where an activation works in place and later code uses its input as its result.

    A gate does not overwrite its input. What the code then reads shows in a dry run, since a captured graph calls an
    overwritten tensor by the name of the result.
    """
    working = {
        site.name: [m for m in model.get_submodule(site.name).modules() if getattr(m, "inplace", False)]
        for site in sites
        if site.ungated is None
    }
    working = {name: modules for name, modules in working.items() if modules}
    culprits = stale_inputs(model, inputs, working)
    why = "it works in place, and the code around it reads what it has overwritten"
    return tuple(replace(site, ungated=why) if site.name in culprits else site for site in sites)


def _missed(call: Options, found: list[Any]) -> str:
    """Why a call has no place of its own in the source."""
    target = call["target"]
    if not found:
        return f"its source, as far as it can be read, never calls {target} where it runs"
    if len(found) != call["of"]:
        return f"its source calls {target} {len(found)} times in a run, and the captured graph {call['of']} times"
    place = found[call["index"]]
    if place is None:
        return f"{target} is called by a function around it, or not on a tensor alone"
    return f"one call of {target} in the source of its methods runs {found.count(place)} times"


def _call(site: Site, of: int) -> Options:
    call: Options = {"child": site.name.rsplit(".", 1)[-1], "target": site.target, "index": site.call, "of": of}
    if site.function:
        call |= {"function": site.function, "options": dict(site.options)}
    return call


def _observe(
    model: nn.Module, owners: list[str], inputs: Inputs
) -> tuple[dict[str, dict[str, Any]], list[list[Op]] | None]:
    """The arguments that each owner is called with and that are no tensors; the operations of the model.

    A module may be called several times: its first arguments count.
    """
    seen: dict[str, dict[str, Any]] = {}

    def watch(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.setdefault(path, concrete_arguments(module, args, kwargs))

        return note

    hooks = [model.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True) for path in owners]
    try:
        return seen, operations(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


def operations(model: nn.Module, inputs: Inputs) -> list[list[Op]] | None:
    """The ops of a model in eval mode and in training mode; None if it does not run, in training mode an empty list."""
    try:
        found = [dry_run(model, inputs).ops]
    except Exception as error:  # the model's own code may not run on fake tensors
        _log.debug("no dry run: %s", error)
        return _real_operations(model, inputs)
    try:
        found.append(dry_run(model, inputs, training=True).ops)
    except Exception as error:  # a batch of one in training mode, for example
        _log.debug("no dry run in training mode: %s", error)
        found.append([])
    return found


def _real_operations(model: nn.Module, inputs: Inputs) -> list[list[Op]] | None:
    """The same with values, in eval mode only: a run in training mode would move statistics."""
    try:
        return [dry_run(model, inputs, real=True).ops, []]
    except Exception as error:  # a model without values whose control flow depends on them
        _log.debug("no run: %s", error)
        return None

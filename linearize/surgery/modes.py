"""Gates that a model calls with gradients only: its fused path is switched off, or they are taken back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from linearize.graph.capture import Inputs
from linearize.graph.dryrun import called_by_mode, called_modules
from linearize.sites.record import Step
from linearize.sites.site import Site
from linearize.surgery.fused import STEP, SWITCH, fuse, unfuse
from linearize.surgery.specs import replace_module

_ELSEWHERE = "the model holds it in another place, too, and calls it from there"
_PASSED = "in eval mode {mode} gradients the model goes another way, which does not call it"
_MODES = ("without", "with")


def settle_modes(
    model: nn.Module, sites: tuple[Site, ...], replaced: dict[str, nn.Module], inputs: Inputs
) -> tuple[tuple[Site, ...], list[Step]]:
    """Take back the gates that a model does not call, or not in every mode, if nothing can be done about it.

    Args:
        model: with gates; it is changed in place.
        sites: all of them.
        replaced: by site, what stood where the gate stands now.
        inputs: of the model's forward.

    Returns:
        The sites, with a reason where a gate was taken back or a linear map is passed by, and the steps that switched
        fused paths off.
    """
    if not replaced:
        return sites, []
    # Whether a fused path is taken depends on inputs that these here may not be like: off with all that have a gate.
    paths = dict.fromkeys(
        path for name in replaced for path in _above(name) if vars(model.get_submodule(path)).get(SWITCH)
    )
    steps: list[Step] = [{"path": path, "module": {"type": STEP}} for path in paths]
    for path in paths:
        unfuse(model.get_submodule(path), {})
    called = called_modules(model, inputs)
    modes = called_by_mode(model, inputs) or [called, called]
    settled = tuple(_settled(site, replaced, called, modes) for site in sites)
    for name in [site.name for site in settled if site.name in replaced and site.ungated is not None]:
        replace_module(model, name, replaced[name])
    left = {path for site in settled if site.name in replaced and site.ungated is None for path in _above(site.name)}
    for step in [step for step in steps if step["path"] not in left]:
        fuse(model.get_submodule(step["path"]))
        steps.remove(step)
    return settled, steps


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def _missing(path: str, modes: list[set[str]]) -> list[str]:
    """The modes in which a module is not called."""
    return [mode for mode, called in zip(_MODES, modes, strict=True) if path not in called]


def _settled(site: Site, replaced: dict[str, nn.Module], called: set[str], modes: list[set[str]]) -> Site:
    if site.name not in replaced:
        return site
    missing = _missing(site.name, modes)
    if len(missing) == 2 or site.name not in called:
        return replace(site, ungated=_ELSEWHERE)
    if missing:
        return replace(site, ungated=_PASSED.format(mode=missing[0]))
    for module in _maps(site):
        if len(_missing(module, modes)) == 1:
            mode = _missing(module, modes)[0]
            why = f"in eval mode {mode} gradients the model goes another way, which does not call {module}"
            return replace(site, reason=site.reason or why)
    return site


def _maps(site: Site) -> Iterator[str]:
    ports = (site.producer, site.up, *site.consumers)
    yield from (port.module for port in ports if port is not None)
    yield from (fold.module for fold in (*site.folds, *site.up_folds, *site.consumer_folds))

"""Gates that do not work in every mode: a fused path past them is switched off, or they are taken back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from linearize.graph.capture import Inputs
from linearize.graph.dryrun import called_by_mode, called_modules
from linearize.graph.overwrite import overwritten_later
from linearize.graph.ways import Seen, seen_in_runs
from linearize.sites.record import Step
from linearize.sites.site import Site
from linearize.surgery.fused import SWITCH, UNFUSED, fuse, unfuse
from linearize.surgery.specs import replace_module

_ELSEWHERE = "the model holds it in another place, too, and calls it from there"
_PASSED = "in eval mode {mode} gradients the model goes another way, which does not call it"
_WRITTEN = "its input is overwritten later in the forward, so that no gradient could go through a gate"
_MODES = ("without", "with")


def settle_modes(
    model: nn.Module, sites: tuple[Site, ...], replaced: dict[str, nn.Module], inputs: Inputs
) -> tuple[tuple[Site, ...], list[Step]]:
    """Take back the gates that a model does not call in every mode, or through which no gradient could go.

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
    steps: list[Step] = [{"path": path, "module": {"type": UNFUSED}} for path in paths]
    for path in paths:
        unfuse(model.get_submodule(path), {})
    seen = _seen(model, sites, replaced, inputs)
    settled = tuple(
        replace(site, ungated=_WRITTEN) if site.name in seen.overwritten else _settled(site, replaced, seen.called)
        for site in sites
    )
    for name in [site.name for site in settled if site.name in replaced and site.ungated is not None]:
        replace_module(model, name, replaced[name])
    left = {path for site in settled if site.name in replaced and site.ungated is None for path in _above(site.name)}
    for step in [step for step in steps if step["path"] not in left]:
        fuse(model.get_submodule(step["path"]))
        steps.remove(step)
    return tuple(_of_one_way(site, seen.changing) for site in settled), steps


def _seen(model: nn.Module, sites: tuple[Site, ...], replaced: Iterable[str], inputs: Inputs) -> Seen:
    """What runs show around the gates; where a model cannot be run so, what can be found out otherwise."""
    sound = [site for site in sites if site.ungated is None and site.reason is None]
    read = dict.fromkeys(path for site in sound for path in _read(site))
    made = dict.fromkeys(path for site in sound for path in _made(site))
    maps = dict.fromkeys(path for site in sound for path in _linear(site))
    seen = seen_in_runs(model, inputs, read, made, maps, list(replaced))
    if seen is not None:
        return seen
    called = called_modules(model, inputs)
    modes = called_by_mode(model, inputs) or [called, called]
    return Seen({}, (modes[0], modes[1]), overwritten_later(model, inputs, replaced))


def _of_one_way(site: Site, changing: Mapping[str, str]) -> Site:
    """The site, with a reason where the code around its gate does other things in another run."""
    if site.ungated is not None or site.reason is not None:
        return site
    why = (f"{path}: {changing[path]}" for path in (*_read(site), *_made(site)) if path in changing)
    return replace(site, reason=next(why, None))


def _read(site: Site) -> Iterator[str]:
    """The modules whose inputs surgery takes to be what the capture showed."""
    yield site.name
    yield from (port.module for port in site.consumers)
    yield from _folded(site)


def _linear(site: Site) -> Iterator[str]:
    """The linear layers around a site."""
    yield from (port.module for port in (site.producer, site.up, *site.consumers) if port is not None)


def _made(site: Site) -> Iterator[str]:
    """The modules whose outputs surgery changes."""
    yield site.name
    yield from (port.module for port in (site.producer, site.up) if port is not None)


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def _missing(path: str, modes: Sequence[set[str]]) -> list[str]:
    """The modes in which a module is not called."""
    return [mode for mode, called in zip(_MODES, modes, strict=True) if path not in called]


def _settled(site: Site, replaced: dict[str, nn.Module], modes: Sequence[set[str]]) -> Site:
    if site.name not in replaced:
        return site
    missing = _missing(site.name, modes)
    if len(missing) == 2:
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


def _folded(site: Site) -> Iterator[str]:
    """The modules that are constant maps; one in the middle of somebody's forward is no module of its own."""
    folds = (*site.folds, *site.up_folds, *site.consumer_folds)
    yield from (fold.module for fold in folds if not fold.neutral)

"""Compare a rewritten model with the original by dry runs, without computing anything."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from linearize.gating.gate import ChannelGate
from linearize.graph.dryrun import Trace, dry_run, first_line
from linearize.sites.record import record_of
from linearize.sites.site import Site

_log = logging.getLogger(__name__)


def difference(model: nn.Module, result: nn.Module) -> str | None:
    """The first difference between the collapsed model and the original that a dry run shows; None if there is none.

    The code around a site may name the width of its tensors, or compute with it.
    """
    record, after = record_of(model), record_of(result)
    if record is None or record.inputs is None or after is None:
        return None
    new = after.steps[len(record.steps) :]
    changed = {step["path"] for step in new if step["module"]["type"] != "Neutral"}
    skip = frozenset(changed | {path for path, module in model.named_modules() if isinstance(module, ChannelGate)})
    modes = (False, True) if any(parameter.requires_grad for parameter in model.parameters()) else (False,)
    sites = [site for site in record.sites if site.reason is None and site.ungated is None]
    for gradients in modes:
        before, behind = _Widths(), _Widths()
        try:
            with before.noted(model, sites):
                expected = dry_run(model, record.inputs, skip=skip, gradients=gradients)
        except Exception as error:  # a model that does not run on fake tensors at all cannot be asked
            _log.debug("no dry run: %s", error)
            continue
        try:
            with behind.noted(result, sites):
                found = dry_run(result, record.inputs, skip=skip, gradients=gradients)
        except Exception as error:  # whatever the model's own code raises
            return first_line(error)
        why = _difference_of(expected, found, changed) or _misread(sites, before, behind)
        if why is not None:
            return why
    return None


def _difference_of(expected: Trace, found: Trace, changed: set[str]) -> str | None:
    """What two runs in the same mode show."""
    missed = (changed & expected.called) - found.called
    if missed:
        return f"it calls {min(missed)} from another place that holds it, too"
    if found.outputs != expected.outputs:
        return "an output has another shape"
    odd = found.numbers - expected.numbers
    return f"it computes with the number {next(iter(odd))[1][0]} then" if odd else None


class _Widths:
    """Numbers of channels that producers put out, activations get, and consumers read, by path.

    Of a module that is called several times, as one that stands in several places is, nothing is known.
    """

    def __init__(self) -> None:
        self.out: dict[str, int] = {}
        self.into: dict[str, int] = {}
        self._calls: Counter[str] = Counter()

    @contextmanager
    def noted(self, model: nn.Module, sites: Iterable[Site]) -> Iterator[None]:
        """Note them in a run of the model inside."""
        axes = {site.name: site.axis for site in sites}
        axes |= {
            port.module: -1 - port.dims for site in sites for port in (site.producer, site.up, *site.consumers) if port
        }
        handles = [
            part.register_forward_hook(self._hook(path, axes[path]))
            for path, part in model.named_modules(remove_duplicate=False)
            if path in axes
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str, axis: int) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._calls[path] += 1
            if self._calls[path] > 1:
                self.into.pop(path, None)
                self.out.pop(path, None)
                return
            for held, value in ((self.into, args[0] if args else None), (self.out, out)):
                if isinstance(value, Tensor) and value.dim() >= -axis:
                    held[path] = value.shape[axis]

        return note


def _misread(sites: Iterable[Site], before: _Widths, behind: _Widths) -> str | None:
    """Whether code around a site still takes as much of a tensor as before, although the tensor has another width.

    A slice with fixed ends may fit all the same, where a size of one is broadcast or two slices overlap.
    """
    for site in sites:
        ways = [] if site.producer is None else [(site.producer.module, site.name)]
        ways += [(site.name, port.module) for port in site.consumers if port.whole]
        for start, end in ways:
            known = start in before.out and start in behind.out and end in before.into and end in behind.into
            if known and behind.out[start] * before.into[end] != before.out[start] * behind.into[end]:
                found = f"{behind.into[end]} of {behind.out[start]} channels"
                return f"its code reads {found}, and read {before.into[end]} of {before.out[start]}"
    return None

"""Compare a rewritten model with the original by dry runs, without computing anything."""

from __future__ import annotations

import logging

from torch import nn

from linearize.gating.gate import ChannelGate
from linearize.graph.dryrun import Trace, dry_run, first_line
from linearize.sites.record import record_of

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
    for gradients in modes:
        try:
            expected = dry_run(model, record.inputs, skip=skip, gradients=gradients)
        except Exception as error:  # a model that does not run on fake tensors at all cannot be asked
            _log.debug("no dry run: %s", error)
            continue
        try:
            found = dry_run(result, record.inputs, skip=skip, gradients=gradients)
        except Exception as error:  # whatever the model's own code raises
            return first_line(error)
        why = _difference_of(expected, found, changed)
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

"""Whether a format can hold a model, said with the layer that is in the way and the nearest format that can."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from linearize.errors import ExportError
from linearize.export import registry
from linearize.export.face import Format, Refusal
from linearize.export.plain import gated
from linearize.zoo.inputs import unwrap
from linearize.zoo.stock import expect_stock, prove_stock

__all__ = ["check_exportable", "expect_fit", "prove_fit"]


def check_exportable(model: nn.Module, name: str) -> None:
    """See that nothing is known to be in the way; nothing is computed.

    Args:
        model: the model.
        name: of a format.

    Raises:
        ExportError: which layer is in the way, why, and which format can hold it.
    """
    model, chosen = unwrap(model), registry.FORMATS[name]
    refusal = gated(model)
    if refusal is not None:
        raise ExportError(refusal.where, refusal.why, "Call linearize.collapse first; it leaves none.")
    refusal = chosen.can(model)
    if refusal is not None:
        raise _refused(model, chosen, refusal)


def expect_fit(model: nn.Module, *, stock: bool, target: str | None) -> None:
    """Check, before any work, that the model is stock now, and that the target format can hold it.

    Raises:
        CheckpointError: it is not stock.
        ExportError: the format cannot hold it.
    """
    if stock:
        expect_stock(model)
    if target is not None:
        check_exportable(model, target)


def prove_fit(model: nn.Module, example_inputs: Any, *, stock: bool, target: str | None) -> None:
    """Warn, with the reason, if the compressed model is not stock, or if the target format cannot hold it."""
    if stock:
        prove_stock(model, example_inputs)
    if target is None:
        return
    try:
        check_exportable(model, target)
    except ExportError as error:
        warnings.warn(f'target="{target}": it cannot hold the model: {error}', stacklevel=4)


def _refused(model: nn.Module, chosen: Format, refusal: Refusal) -> ExportError:
    others = [registry.FORMATS[name] for name in chosen.near if name in registry.FORMATS]
    nearest = next((other.name for other in others if other.can(model) is None), None)
    remedy = [f'The nearest format that can: "{nearest}".'] if nearest is not None else []
    if not chosen.means.own_layers:
        remedy.append(f'Plan for it from the start: linearize.compress(..., target="{chosen.name}").')
    found = f"{refusal.why}: {chosen.name} cannot hold that"
    return ExportError(refusal.where, found, " ".join(remedy) or "Keep it with linearize.save.")

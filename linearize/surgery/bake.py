"""Replace computed weights (weight norm, spectral norm, pruning, standardised weights) by plain ones.

A computed weight cannot be written, and a fit needs a layer that holds its weight itself. The new layer computes the
same, up to rounding. It is trainable if any tensor was trainable from which the old weight was computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.algebra.affine import Affine
from linearize.algebra.piece import Infeasible, Piece
from linearize.gating.gate import gates
from linearize.gating.groups import ports_of
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.sites.site import Port
from linearize.surgery.make import make_layer
from linearize.surgery.probe import has_own_forward, probed
from linearize.surgery.specs import replace_module, spec_of
from linearize.tensors import held, is_computed, meddler

__all__ = ["bake"]


def bake(model: nn.Module) -> list[str]:
    """Replace computed weights of the maps around a gated model's sites, in place. Returns their paths.

    A module with a hook of another kind, or one that computes more than a linear map, stays as it is.

    Examples:
        >>> import linearize
        >>> wrap = nn.utils.parametrizations.weight_norm
        >>> net = nn.Sequential(wrap(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = linearize.convert(net, torch.randn(1, 4))
        >>> bake(gated), gated[0]
        (['0'], Linear(in_features=4, out_features=8, bias=True))
    """
    steps: list[Step] = []
    ports = {
        port.module: port
        for gate in gates(model).values()
        if gate.site is not None and gate.site.reason is None
        for port in ports_of(gate.site)
    }
    for path, port in ports.items():
        layer = _plain_layer(port, model.get_submodule(path))
        if layer is not None:
            replace_module(model, path, layer)
            steps.append({"path": path, "module": spec_of(layer)})
    record = record_of(model)
    if steps and record is not None:
        set_record(model, Record(record.sites, [*record.steps, *steps], record.inputs))
    return [step["path"] for step in steps]


def _plain_layer(port: Port, module: nn.Module) -> nn.Module | None:
    """A layer with a weight of its own that computes what a module does; None if it has one, or cannot be replaced."""
    own = not is_computed(module) and not is_computed(module, "bias")
    # A transposed weight stays: the plain layer would hold it the other way round.
    if (own and has_own_forward(module)) or port.transposed or meddler(module) is not None:
        return None
    try:
        found = probed(port, module)
    except Infeasible:
        return None
    if own and _same(port, found, held(module, "weight")):
        return None
    groups = int(getattr(module, "groups", 1))
    return make_layer(port.module, Piece("plain", _grouped(found, groups)), port.dims, module)


def _same(port: Port, found: Affine, weight: Tensor | None) -> bool:
    """True if a module with a forward of its own computes with its weight as it is."""
    if weight is None:
        return False
    weight = (weight.detach().t() if port.transposed else weight.detach()).double()
    return found.weight.shape == weight.shape and torch.allclose(found.weight, weight, rtol=1e-5, atol=1e-7)


def _grouped(affine: Affine, groups: int) -> Affine:
    """The map of `groups` groups whose dense form is given: weight (O, I, *k) to (O, I / groups, *k)."""
    if groups == 1:
        return affine
    outputs, inputs = (size // groups for size in affine.weight.shape[:2])
    blocks = [
        affine.weight[g * outputs : (g + 1) * outputs, g * inputs : (g + 1) * inputs] for g in range(groups)
    ]  # fmt: skip
    return Affine(
        torch.cat(blocks), affine.bias, affine.stride, affine.padding, affine.dilation, groups=groups, same=affine.same
    )

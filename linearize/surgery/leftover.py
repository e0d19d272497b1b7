"""What replaces the gate of a site: the whole activation, a partial or blended one, or nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.gating.gate import ChannelGate
from linearize.sites.record import Step
from linearize.surgery.layers import BlendedActivation, MaskedActivation
from linearize.surgery.specs import Spec, build, replace_module, spec_of

__all__ = ["keep_activation", "shrink_activation"]


def keep_activation(model: nn.Module, gate: ChannelGate, linear: Tensor, gone: Tensor) -> list[Step]:
    """Replace the gate of a site whose channels stay in place by its activation, without those in `gone`.

    Args:
        model: gated; the gate in it is replaced.
        gate: of the site.
        linear: the channels that the activation leaves out, bool (C,).
        gone: the channels that leave, bool (C,).
    """
    path, kept = _path_of(model, gate), ~gone.to(gate.frozen.device)
    alpha, linear = _alpha(gate)[kept], linear.to(gate.frozen.device)[kept]
    made = _beside_lines(gate, alpha, linear, gate.slope[kept], gate.intercept[kept])
    if made is None:
        replace_module(model, path, gate.released())
        return []
    replace_module(model, path, made)
    return [{"path": path, "module": spec_of(made)}]


def shrink_activation(model: nn.Module, gate: ChannelGate, linear: Tensor, *, carries: bool, width: int) -> list[Step]:
    """Replace the gate of a collapsed site by its activation on the nonlinear channels, which come first.

    Args:
        model: gated; the gate in it is replaced.
        gate: of the site.
        linear: the channels that are not nonlinear any more, bool (C,).
        carries: whether features pass by the activation.
        width: how many features there are now, with those that pass.
    """
    path, kept, site = _path_of(model, gate), ~linear.to(gate.frozen.device), gate.site
    keep = int(kept.sum())
    alpha, slope, intercept = _alpha(gate)[kept], gate.slope[kept], gate.intercept[kept]
    if site is not None and site.parts > 1 and keep:
        place = _places(kept, site.parts, width)
        values = [torch.full((width,), fill).to(alpha) for fill in (1.0, 1.0, 0.0)]
        for value, own in zip(values, (alpha, slope, intercept), strict=True):
            value[place] = own
        made = _beside_lines(gate, values[0], values[0] == 1, values[1], values[2])
        if made is not None:
            replace_module(model, path, made)
            return [{"path": path, "module": spec_of(made)}]
    steps: list[Step] = []
    made = _beside_lines(gate, alpha, torch.zeros(keep, dtype=torch.bool, device=alpha.device), slope, intercept)
    if made is not None:
        steps.append({"path": path, "module": spec_of(made)})
    activation = gate.activation if made is None else made
    # What lies directly between two maps that only this site reads is nobody else's memory.
    inplace = gate.in_place and site is not None and site.direct
    spec: Spec = {"type": "PartialActivation", "keep": keep, "axis": gate.axis, "inplace": inplace}
    spec = spec if keep else {"type": "Identity"}
    if carries or not keep:
        activation = build(spec, gate.released() if activation is gate.activation else activation)
        steps.append({"path": path, "module": spec})
    replace_module(model, path, gate.released() if activation is gate.activation else activation)
    return steps


def _path_of(model: nn.Module, gate: ChannelGate) -> str:
    return next(str(path) for path, module in model.named_modules() if module is gate)


def _alpha(gate: ChannelGate) -> Tensor:
    return torch.where(gate.frozen, 1.0, gate.alpha.detach())


def _places(kept: Tensor, parts: int, width: int) -> Tensor:
    """Where the nonlinear channels are, if those of each part come first in it."""
    counts = kept.view(parts, -1).sum(1).tolist()
    starts = [part * (width // parts) for part in range(parts)]
    places = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    return torch.cat(places).to(kept.device)


@torch.no_grad()
def _beside_lines(
    gate: ChannelGate, alpha: Tensor, linear: Tensor, slope: Tensor, intercept: Tensor
) -> BlendedActivation | MaskedActivation | None:
    """The activation with a line beside it for some channels; None if there are none."""
    made: BlendedActivation | MaskedActivation
    if bool(((alpha != 0) & ~linear).any()):
        made, values = BlendedActivation(gate.activation, len(alpha), gate.axis), {"alpha": alpha}
    elif bool(linear.any()):
        made, values = MaskedActivation(gate.activation, len(alpha), gate.axis), {"linear": linear}
    else:
        return None
    made.to(gate.slope.device, gate.slope.dtype)
    for name, value in {**values, "slope": slope, "intercept": intercept}.items():
        getattr(made, name).copy_(value)
    return made

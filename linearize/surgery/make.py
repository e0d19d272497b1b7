"""Turn the affine maps of a plan, in float64, into layers of the model's own dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.algebra.affine import Affine
from linearize.algebra.finite import all_finite
from linearize.algebra.piece import Piece
from linearize.errors import CollapseError
from linearize.surgery.carriers import Around, roles_of
from linearize.surgery.specs import Spec, build
from linearize.tensors import held, is_computed


def make_layer(path: str, piece: Piece, dims: int, old: nn.Module) -> nn.Module:
    """The layer of a piece, in the dtype, on the device and with the `requires_grad` of the layer that it replaces.

    Raises:
        CollapseError: the folded weights do not fit the dtype (overflow).
    """
    if piece.layer == "identity":
        return build({"type": "Identity"}, old)
    if piece.layer == "all_ones":
        return build({"type": "Ones", "width": piece.number}, old)
    if piece.affine is None:
        raise CollapseError(path, f"a piece of kind {piece.layer} without a map", "Please report this model.")
    like, trained = _like(path, old.inner if isinstance(old, Around) else old)
    kept = getattr(old, "bias", None) is not None and piece.layer != "carry"
    spec = layer_spec(piece, piece.affine, dims, bias=kept or bool((piece.affine.bias != 0).any()))
    with torch.device("meta"):
        layer = build(spec, old)
    values = {"weight": piece.affine.weight, "bias": piece.affine.bias, "border": piece.border}
    for role, (holder, name) in roles_of(layer).items():
        setattr(holder, name, _cast(f"{path}.{role}", values[role], like, trained=trained))
    return layer


_MATRIX = {"plain": "Linear", "carry": "CarryLinear", "ones": "OnesLinear"}
_CONVOLUTION = {"plain": "Conv", "carry": "CarryConv", "input_carry": "InputCarryConv", "border": "BorderConv"}


def layer_spec(piece: Piece, affine: Affine, dims: int, *, bias: bool) -> Spec:
    """The description of the layer that computes a piece."""
    outputs, inputs = affine.weight.shape[:2]
    extra = {
        "carry": {"start": piece.number},
        "ones": {"at": piece.at, "ones": piece.number},
        "input_carry": {"ones": piece.number},
    }.get(piece.layer, {})
    if dims == 0:
        return {"type": _MATRIX[piece.layer], "in_features": inputs, "out_features": outputs, "bias": bias, **extra}
    kind = _CONVOLUTION[piece.layer].replace("Conv", "SameConv" if affine.same else "Conv")
    geometry = {
        "kernel_size": list(affine.kernel),
        "stride": list(affine.stride),
        "padding": list(affine.padding),
        "dilation": list(affine.dilation),
    }
    sizes = {"in_channels": inputs * affine.groups, "out_channels": outputs}
    groups = {"groups": affine.groups} if affine.groups > 1 else {}
    return {"type": f"{kind}{dims}d", **sizes, **geometry, **groups, "bias": bias, **extra}


def _like(path: str, old: nn.Module) -> tuple[Tensor, bool]:
    """A tensor of the dtype and device of a layer's weight, and whether it is trained.

    A weight that a hook computes is of the last call, and may have been left behind by `.to()`: what it is computed
    from tells.
    """
    weight = held(old, "weight")
    if weight is None:
        raise CollapseError(path, f"is a {type(old).__name__} without a weight", "Convert the model as it is now.")
    if not is_computed(old):
        return weight, weight.requires_grad
    sources = [parameter for parameter in old.parameters() if parameter.is_floating_point()]
    return next(iter(sources), weight), any(parameter.requires_grad for parameter in sources)


def _cast(name: str, value: Tensor | None, like: Tensor, *, trained: bool) -> nn.Parameter:
    if value is None:
        raise CollapseError(name, "was not computed", "Please report this model.")
    # A tensor of its own in the old one's memory format: a convolution hands its strides on to what it puts out, and
    # `contiguous` leaves those of a 1 x 1 kernel as a product of matrices made them.
    cast = torch.empty(value.shape, dtype=like.dtype, device=like.device, memory_format=_memory_format(like, value))
    cast.copy_(value)
    if not all_finite(cast):
        raise CollapseError(name, f"does not fit {like.dtype} after folding", "Collapse in float32 and cast then.")
    return nn.Parameter(cast, requires_grad=trained)


def _memory_format(like: Tensor, value: Tensor) -> torch.memory_format:
    """Channels last if the old weight is stored so, and not only because its kernel is a single point."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if like.dim() == value.dim() and like.dim() in formats:
        last, plain = (
            torch.empty(like.shape, device="meta", memory_format=form).stride()
            for form in (formats[like.dim()], torch.contiguous_format)
        )
        if like.stride() == last != plain:
            return formats[like.dim()]
    return torch.contiguous_format

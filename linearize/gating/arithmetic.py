"""The arithmetic of a gate, with a backward pass that recomputes the activation instead of storing it.

Plain autograd would keep several tensors of the activation's size for every gate. `Recomputed` keeps only the input,
and computes the activation again in the backward pass, in pieces that fit a cache. A training step with gates then
needs about the memory and the time of one without.

Shape letters: C channels. Coefficients are (C, 1, ..., 1), so that they broadcast over an input whose channel
axis is counted from the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

__all__ = ["Mixture", "Recomputed", "Surrogate", "mix", "mix_in_pieces", "recomputable"]

# Numbers of elements worked on at once: on a CPU what stays in its second cache, elsewhere what keeps the
# temporary tensors small against the memory of the device without making its kernels small too.
_CPU_PIECE = 2**18
_PIECE = 2**25


class Surrogate(NamedTuple):
    """Per channel, the gate's value `alpha`, the line it leads to, and where alpha counts as one."""

    alpha: Tensor
    slope: Tensor
    intercept: Tensor
    frozen: Tensor

    def coefficients(self, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """The factors of act(x), of x and of one.

        In this form (1, 0, 0) gives act(x) exactly, and a first factor of 0 gives exactly the line: neither
        end takes a difference of large numbers.
        """
        a = torch.where(self.frozen, 1.0, self.alpha)
        shape = (-1,) + (1,) * (-axis - 1)
        return (1 - a).view(shape), (a * self.slope).view(shape), (a * self.intercept).view(shape)


class Mixture(NamedTuple):
    """All that a gate's value depends on besides its input."""

    activation: nn.Module
    line: Surrogate
    axis: int


def mix(mixture: Mixture, x: Tensor) -> Tensor:
    """`h + a * (slope * x + intercept - h)` for `h = activation(x)`, in differentiable operations."""
    h = mixture.activation(x)
    of_h, of_x, of_one = mixture.line.coefficients(mixture.axis)
    y = torch.addcmul(torch.addcmul(of_one, of_x, x), of_h, h)
    return y.to(h.dtype)


def mix_in_pieces(mixture: Mixture, x: Tensor) -> Tensor:
    """As `mix`, without autograd, and written over `h` unless `h` is another name of `x`."""
    h = mixture.activation(x)
    of_h, of_x, of_one = mixture.line.coefficients(mixture.axis)
    alias = h.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    y = torch.empty_like(h) if alias else h
    for piece in _pieces(x, mixture.axis):
        torch.addcmul(torch.addcmul(of_one, of_x, x[piece]), of_h, h[piece], out=y[piece])
    return y


def recomputable(activation: nn.Module, x: Tensor) -> bool:
    """True if `activation(x)` can be run again outside the autograd graph, without any other effect.

    Not so for subclasses of Tensor, on the meta device, under torch.func, forward-mode differentiation and tracing
    (each has rules of its own), for activations that draw random numbers, and where hooks watch the activation.
    """
    return (
        type(x) in {Tensor, nn.Parameter}
        and x.device.type != "meta"
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not (activation.training and isinstance(activation, nn.RReLU))
        and not (activation._forward_hooks or activation._forward_pre_hooks)
        and not (activation._backward_hooks or activation._backward_pre_hooks)
        and not _module._has_any_global_hook()
    )


class Recomputed(torch.autograd.Function):
    """`mix(activation(x), x, ...)` that saves only `x` and parameters for the backward pass."""

    @staticmethod
    def forward(ctx: Any, mixture: Mixture, x: Tensor, alpha: Tensor, *parameters: Tensor) -> Tensor:
        """Run the activation and the mix; `alpha` and `parameters` stand here to be seen by autograd."""
        ctx.mixture = mixture._replace(line=mixture.line._replace(alpha=alpha.detach()))
        device = x.device.type
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.save_for_backward(x, alpha, *parameters)
        return mix_in_pieces(mixture, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of x, alpha and the activation's own parameters, if they are needed."""
        (grad,) = grads
        inputs = ctx.saved_tensors
        wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        device, enabled, dtype = ctx.autocast
        with torch.autocast(device, enabled=enabled, dtype=dtype if enabled else None):
            if torch.is_grad_enabled():  # a second derivative is wanted: stay differentiable
                found = _differentiable(ctx, grad, inputs, wanted)
            else:
                found = _in_pieces(ctx, grad, inputs)
        return None, *found


def _differentiable(ctx: Any, grad: Tensor, inputs: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor | None]:
    x, alpha = inputs[:2]
    mixture: Mixture = ctx.mixture
    y = mix(mixture._replace(line=mixture.line._replace(alpha=alpha)), x)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[1:]]


def _in_pieces(ctx: Any, grad: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    x, alpha, *parameters = inputs
    wants_x, wants_alpha, *wanted = ctx.needs_input_grad[1:]
    activation, line, channel_axis = ctx.mixture
    of_h, of_x, _ = line.coefficients(channel_axis)
    exact = torch.promote_types(alpha.dtype, torch.float32)  # a sum over a batch is not for half precision
    slope, intercept = (value.to(exact).view(of_x.shape) for value in (line.slope, line.intercept))
    others = [axis for axis in range(x.dim()) if axis != x.dim() + channel_axis]

    grad_x = torch.empty_like(x) if wants_x else None
    grad_alpha = torch.zeros_like(alpha, dtype=torch.promote_types(exact, x.dtype)) if wants_alpha else None
    grad_parameters = [torch.zeros_like(parameter) for parameter in parameters]
    for piece in _pieces(x, channel_axis):
        part, g = x[piece], grad[piece]
        if x.device.type == "cpu" and not parameters:
            # On a CPU each operation on mixed dtypes converts its inputs anew; others do so on the fly.
            part, g = part.to(of_h.dtype), g.to(of_h.dtype)
        h, through = _activation_and_gradients(activation, part, g * of_h, parameters)
        if grad_x is not None:
            torch.addcmul(through[0], g, of_x, out=grad_x[piece])
        for total, term in zip(grad_parameters, through[1:], strict=True):
            total.add_(term)
        if grad_alpha is not None:
            moved = torch.addcmul(intercept, slope, part).sub_(h).mul_(g)
            grad_alpha += moved.sum(others) if others else moved  # a sum over no axes would be one over all
    if grad_alpha is not None:
        grad_alpha = grad_alpha.masked_fill_(line.frozen, 0).to(alpha.dtype)
    rest = [total if needed else None for total, needed in zip(grad_parameters, wanted, strict=True)]
    return [grad_x, grad_alpha, *rest]


def _activation_and_gradients(
    activation: nn.Module, x: Tensor, grad: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """`activation(x)` and, for its gradient `grad`, the gradients of x and of the parameters."""
    inputs = [x.detach().requires_grad_(), *parameters]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    with torch.enable_grad():
        h = activation(inputs[0])
    if not h.requires_grad:
        return h, [torch.zeros_like(tensor) for tensor in inputs]
    found = iter(torch.autograd.grad(h, wanted, grad.to(h.dtype), allow_unused=True))
    terms = [next(found) if tensor.requires_grad else None for tensor in inputs]
    filled = [torch.zeros_like(t) if term is None else term for t, term in zip(inputs, terms, strict=True)]
    return h.detach(), filled


def _pieces(x: Tensor, axis: int) -> Iterator[slice]:
    """Slices of the first axis, unless it is the channel axis: every layout can be cut there."""
    rows = x.shape[0]
    limit = _CPU_PIECE if x.device.type == "cpu" else _PIECE
    step = rows if x.dim() == -axis else max(1, rows * limit // max(x.numel(), 1))
    for start in range(0, rows, max(step, 1)):
        yield slice(start, start + step)

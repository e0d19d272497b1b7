"""Run models to measure or compare them: one form of inputs, eval mode, and everything restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.graph.capture import Inputs, normalize_inputs
from linearize.graph.state import to_the_end
from linearize.nest import copied, leaves_of, mapped
from linearize.running.devices import device_of
from linearize.tensors import same_values

__all__ = ["batches_of", "call", "device_of", "eagerly", "evaluating", "hold_norms", "move", "watching"]


def batches_of(inputs: Any) -> list[Inputs]:
    """Inputs as a list of (args, kwargs): a list holds batches; a tensor, a tuple or a dict is one batch.

    Raises:
        UsageError: there is no batch, or a batch holds no tensor.

    Examples:
        >>> len(batches_of(torch.zeros(2, 3))), len(batches_of([torch.zeros(2, 3), (torch.zeros(2, 3),)]))
        (1, 2)
    """
    found = [normalize_inputs(batch) for batch in inputs] if isinstance(inputs, list) else [normalize_inputs(inputs)]
    if not found:
        raise UsageError("inputs", "found an empty list", "Pass at least one batch.")
    for position, batch in enumerate(found):
        if not any(isinstance(leaf, Tensor) for _, leaf in leaves_of(batch)):
            raise UsageError(
                f"inputs[{position}]",
                "found no tensor",
                "Pass a tensor, a tuple, a dict of keyword arguments, or a list of these.",
            )
    return found


def move(batch: Inputs, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
    """A copy of a batch on a device; floating tensors in `dtype` when one is given.

    A copy always, since a model may change its input in place.
    """

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    moved: Inputs = mapped(copied(batch), one)
    return moved


def call(name: str, model: nn.Module, batch: Inputs) -> Any:
    """Output of a model on a batch, on the model's own device.

    Raises:
        UsageError: the model does not run on the batch; `name` says which model.
    """
    args, kwargs = move(batch, device_of(model))
    try:
        return model(*args, **kwargs)
    except Exception as error:
        line = next((text for text in str(error).splitlines() if text.strip()), "no message")
        raise UsageError(
            f"{name} ({type(model).__name__})",
            f"does not run on the inputs ({type(error).__name__}: {line.strip()})",
            "Pass inputs that its forward takes.",
        ) from error


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards each module has the mode and the buffers' values that it had.

    Examples:
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modes = [(module, module.training) for model in models for module in model.modules()]

    def put_back() -> None:
        for module, training in modes:
            module.training = training

    try:
        for model in models:
            model.eval()
        with torch.no_grad(), same_values(*models):
            yield
    finally:
        to_the_end(put_back)


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside this context compiled code runs as plain Python, because it does not see hooks that were added later."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def watching(
    model: nn.Module, attach: Callable[[Tensor], Iterable[Any]], *, gradients: bool = True
) -> Iterator[Tensor]:
    """Eval mode with hooks. Gives a zero that hooks can add to what they see, so that gradients reach it.

    Args:
        model: its modules are put back into the mode they were in, and their buffers to the values they had.
        attach: given the zero, puts the hooks on and gives their handles.
        gradients: whether the zero requires a gradient, and gradients are recorded inside.

    Examples:
        >>> model, seen = nn.Linear(2, 2), []
        >>> with watching(model, lambda _: [model.register_forward_hook(lambda *_: seen.append(1))], gradients=False):
        ...     _ = model(torch.zeros(1, 2))
        >>> _ = model(torch.zeros(1, 2))
        >>> seen
        [1]
    """
    modes = [(module, module.training) for module in model.modules()]
    source = torch.zeros((), device=device_of(model), requires_grad=gradients)
    handles: list[Any] = []
    try:
        handles.extend(attach(source))
        model.eval()
        with eagerly(), same_values(model), torch.set_grad_enabled(gradients):
            yield source
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def hold_norms(model: nn.Module) -> None:
    """Put norms that keep statistics of batches into eval mode: they use what they have, and learn scale and shift.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> hold_norms(net)
        >>> [module.training for module in net]
        [True, False]
    """
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.training = False  # not .eval(), which would reach what stands inside, such as dropout

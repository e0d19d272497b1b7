"""Where a model is: on one device, or distributed or offloaded by another library, which moves its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.gating.sharded import check_unsharded

__all__ = ["bring", "check_whole", "device_of", "staying"]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs: that of its first parameter or buffer, or the CPU if it has none.

    A model whose parts are moved by hooks of accelerate computes where the hooks say, whatever its parameters show.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            place = getattr(each, "execution_device", None)
            if place is not None:
                return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def check_whole(model: nn.Module, *, values: bool = False) -> None:
    """Check that a model is on one device as a whole.

    Args:
        model: any model.
        values: refuse a model on the meta device, too.

    Raises:
        UsageError: parts of it are offloaded, sharded over processes or spread over devices, or it has no values.

    Examples:
        >>> try:
        ...     check_whole(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
        ... except UsageError as error:
        ...     print(error)
        1.weight: is on meta, and 0.weight is on cpu. Load the weights of all of it.
    """
    named = dict(model.named_parameters())  # a buffer may well lie elsewhere
    empty = next((name for name, tensor in named.items() if tensor.is_meta), None)
    if any(hasattr(module, "_hf_hook") for module in model.modules()) and empty is not None:
        found = "is offloaded: it is on the meta device, and a hook of accelerate fetches it when it is needed"
        remedy = "Load the model onto one device, without device_map= or offloading; linearize needs whole tensors."
        raise UsageError(empty, found, remedy)
    check_unsharded(model)
    places = {tensor.device: name for name, tensor in reversed(named.items())}  # the first name of each
    if len(places) > 1:
        (here, first), (there, second) = sorted(places.items(), key=lambda item: item[0].type != "meta")[:2]
        remedy = "Move the model to one device, without device_map=."
        if empty is not None:
            remedy = "Load the weights of all of it."
        raise UsageError(first, f"is on {here}, and {second} is on {there}", remedy)
    if values and empty is not None:
        raise UsageError(empty, "is on the meta device and has no values", "Load the model's weights first.")


def bring(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, unless it is there, or hooks of accelerate move its parts themselves."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    if any(tensor.device != device for tensor in _tensors(model)):
        model.to(device)


@contextmanager
def staying(model: nn.Module) -> Iterator[None]:
    """Inside this context the model may be moved; afterwards it is on its own device again.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> with staying(layer):
        ...     _ = layer.to("meta").to_empty(device="cpu")
        >>> layer.weight.device
        device(type='cpu')
    """
    homes = {tensor.device for tensor in _tensors(model)}
    try:
        yield
    finally:
        if len(homes) == 1:
            bring(model, homes.pop())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()

"""The tensors that modules hold: parameters, the results of parametrizations, quantised ones.

Reading a computed weight runs other code. A spectral norm, for example, takes a step of its power iteration whenever
its weight is read in training mode. So weights are read here, as they are in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "QUANTISE_LATER",
    "at_rest",
    "has_memory",
    "held",
    "is_computed",
    "is_wrapper",
    "meddler",
    "noted_values",
    "oddity",
    "quantised_part",
    "same_values",
    "write_back",
]

QUANTISE_LATER = "convert first, quantise afterwards"


@contextmanager
def at_rest(*modules: nn.Module) -> Iterator[None]:
    """Inside this context modules are in eval mode, without gradients. Afterwards each has its own mode again.

    Examples:
        >>> layer = nn.Dropout()
        >>> with at_rest(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def same_values(*modules: nn.Module) -> Iterator[None]:
    """What modules hold besides parameters (buffers, tensors in attributes) has afterwards the values that it had.

    A forward may count its calls, or follow a running mean even in eval mode; a measurement is no call of the user's.

    Examples:
        >>> layer = nn.BatchNorm1d(2)
        >>> with same_values(layer):
        ...     _ = layer(torch.ones(3, 2))
        >>> layer.running_mean, layer.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """
    parts = [part for module in modules for part in module.modules()]
    noted = noted_values(value for part in parts for held in (vars(part), part._buffers) for value in held.values())
    try:
        yield
    finally:
        write_back(noted)


def noted_values(values: Iterable[Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The tensors among some values, each with its memory and a copy of what stands there.

    Parameters, which take most of a model's memory, are left out.
    """
    found = {id(value): value for value in values if _is_ordinary(value)}
    with torch.no_grad():
        return [(tensor, tensor.detach(), tensor.detach().clone()) for tensor in found.values()]


def _is_ordinary(value: Any) -> bool:
    """A tensor with values in memory of its own; nothing can be written into one that was expanded."""
    if type(value) is not Tensor or value.is_meta or value.layout is not torch.strided or value.is_quantized:
        return False
    return 0 not in value.stride() or value.numel() <= 1


def write_back(noted: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give tensors the memory and the values that `noted_values` saw."""
    for tensor, place, content in noted:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if tensor.data_ptr() != place.data_ptr() or tensor.shape != place.shape or tensor.dtype != place.dtype:
                tensor.data = place
            if not torch.equal(place, content):  # by value: writes through `.data` count no version
                place.copy_(content)


def held(module: nn.Module, name: str) -> Tensor | None:
    """The tensor of that name, as in eval mode if a parametrization computes it. None if there is none.

    Examples:
        >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)).train()
        >>> held(layer, "weight").equal(held(layer, "weight")), held(layer, "scale")
        (True, None)
    """
    found: Tensor | None = module._parameters.get(name)
    if found is None and hasattr(type(module), name):  # a property: of a parametrization, or of the module's own
        with at_rest(module):
            found = getattr(module, name, None)
    elif found is None:
        found = module._buffers.get(name, vars(module).get(name))
    return found if isinstance(found, Tensor) else None


def is_computed(module: nn.Module, name: str = "weight") -> bool:
    """True if a module has a tensor of that name that a hook or property computes, and not a parameter of its own.

    Examples:
        >>> is_computed(nn.Linear(2, 2)), is_computed(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        (False, True)
    """
    if getattr(type(module), "weight_of_child", False):  # a layer around another one only shows what that holds
        return False
    return module._parameters.get(name) is None and held(module, name) is not None


def meddler(module: nn.Module) -> str | None:
    """Name the hook, or the `forward` set on the object, that a layer in a module's place would lose; None if none.

    Hooks that compute the module's own weight or bias (weight norm, pruning) are no others: what they make is read.

    Examples:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=1)
        >>> seen, hook = meddler(layer), layer.register_forward_hook(lambda *_: None)
        >>> seen, meddler(layer)
        (None, 'a hook')
    """
    if hasattr(module, "_hf_hook"):
        remedy = "accelerate.hooks.remove_hook_from_submodules(model) takes it off"
        return f"a hook of accelerate ({type(module._hf_hook).__name__}; {remedy})"
    if "forward" in vars(module):
        return "a forward put on the object"
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a hook"
    return "a hook" if any(not computes(module, key) for key in module._forward_pre_hooks) else None


def computes(module: nn.Module, key: int, *names: str) -> bool:
    """True if a hook before the forward puts a new weight or bias (or those named) on the module: tried on a copy."""
    if key in module._forward_pre_hooks_with_kwargs:
        return False
    found = [name for name in names or ("weight", "bias") if name in vars(module)]
    twin = copy.copy(module)
    try:
        with at_rest(twin):
            module._forward_pre_hooks[key](twin, ())
    except Exception:  # a hook of another kind may want anything
        return False
    return any(vars(twin).get(name) is not vars(module)[name] for name in found)


def is_wrapper(tensor: Any) -> bool:
    """True for a tensor that is made of others, as those of torchao and of distributed models are."""
    return bool(is_traceable_wrapper_subclass(tensor))


def oddity(tensor: Tensor) -> str | None:
    """The kind of a weight, in words, if it is not a dense tensor of floating-point numbers.

    Examples:
        >>> oddity(torch.ones(2)), oddity(torch.ones(2, dtype=torch.int8))
        (None, 'of torch.int8')
    """
    kind = type(tensor).__name__
    if hasattr(tensor, "full_tensor"):
        return f"sharded over processes ({kind})"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized or is_wrapper(tensor):
        return f"quantised ({kind if is_wrapper(tensor) else tensor.dtype})"
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout})"
    return None if tensor.is_floating_point() or tensor.is_complex() else f"of {tensor.dtype}"


def quantised_part(module: nn.Module) -> str | None:
    """Which of a layer's own tensors is quantised or packed, and how, in words; None if there is none.

    Examples:
        >>> quantised_part(nn.BatchNorm2d(2))  # a counter is no weight
    """
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        what = None if tensor is None or tensor.dim() == 0 else oddity(tensor)
        if what is not None:
            return f"{name} is {what}"
    packed = next((name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)), None)
    return None if packed is None else f"{packed} is packed"


def has_memory(tensor: Tensor) -> bool:
    """True if a tensor's values lie in memory of its own, one after the other: no wrapper, not sparse, not nested."""
    return not (is_wrapper(tensor) or tensor.is_nested) and tensor.layout is torch.strided

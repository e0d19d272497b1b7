"""Put the tensors of a file into a model that has none yet."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from linearize.errors import CheckpointError
from linearize.running.copies import computed_tensors
from linearize.storage.manifest import Manifest
from linearize.tensors import at_rest, computes, is_computed
from linearize.zoo.structure import is_taken, plain_attributes, plain_tensors, put_tensor, stored_tensors

_REMEDY = "Load it onto the base model that it was made from, with the library versions that it was made with."


def copy_without_weights(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and persistent buffers are on the meta device.

    Examples:
        >>> copy_without_weights(nn.Linear(2, 3)).weight.is_meta
        True
    """
    memo: dict[int, Any] = computed_tensors(model)
    for tensor in stored_tensors(model).values():
        empty = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def take_plain_weights(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Remove the computation of a weight from a model without values, if a file holds the weight itself.

    The file was made when the weight norm, spectral norm or pruning had been removed; the model is built with it.
    """
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        for name in ("weight", "bias"):
            if prefix + name in shapes and is_computed(module, name):
                kept = {other for other in module._parameters if prefix + other in shapes}
                _take_plain(module, name, shapes[prefix + name], kept)


def _take_plain(module: nn.Module, name: str, shape: tuple[int, ...], kept: set[str]) -> None:
    like = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if parametrize.is_parametrized(module, name):
        with at_rest(module):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    else:
        for key in [key for key in module._forward_pre_hooks if computes(module, key, name)]:
            del module._forward_pre_hooks[key]
        for held in (module._parameters, module._buffers):
            for other in [other for other in held if other.startswith(f"{name}_") and other not in kept]:
                del held[other]
    for holder in (vars(module), module._buffers):
        holder.pop(name, None)
    dtype = None if like is None else like.dtype
    module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))


def fill(model: nn.Module, content: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Assign, without copying, the tensors of a file to a model that `fit.check_fit` has passed."""
    frozen, made, replaced = set(content.frozen), dict[str, Tensor](), dict[int, Tensor]()
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, old in list(module._parameters.items()):
            if old is not None:
                stored = content.aliases.get(dot + name, dot + name)
                if stored not in made:
                    made[stored] = _parameter(tensors[stored], old, trainable=stored not in frozen)
                replaced[id(old)] = made[stored]
                # Not by the registry: a recurrent layer keeps a second list of its weights.
                setattr(module, name, made[stored])
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = tensors[content.aliases.get(dot + name, dot + name)]
    for module in model.modules():
        # Parameters that a module also holds in an attribute of its own, unregistered.
        for where, tensor in plain_tensors(module).items():
            if id(tensor) in replaced:
                put_tensor(module, where, replaced[id(tensor)])


def _parameter(tensor: Tensor, old: nn.Parameter, *, trainable: bool) -> nn.Parameter:
    new = nn.Parameter(tensor, requires_grad=trainable and (tensor.is_floating_point() or tensor.is_complex()))
    new.__dict__.update(old.__dict__)
    return new


def _alike(old: Any, new: Any) -> bool:
    """True for values of one kind: numbers, texts, sequences; None says that nothing is set."""
    if old is None or new is None:
        return True
    if isinstance(old, (list, tuple)):
        return isinstance(new, (list, tuple))
    if isinstance(old, (bool, int, float)) and isinstance(new, (bool, int, float)):
        return isinstance(old, float) or not isinstance(new, float)
    return type(old) is type(new)


def put_extras(path: str, model: nn.Module, content: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Set tensors outside the state dict.

    Raises:
        CheckpointError: something else than a tensor of its kind is in the place of one.
    """
    modules = dict(model.named_modules())
    for key, name, where in content.extras:
        if name not in modules:
            continue
        # What has no place is left out: the model makes it anew in its forward.
        there = plain_tensors(modules[name]).get(where)
        fits = there is None or there.is_floating_point() == tensors[key].is_floating_point()
        if not fits or (not put_tensor(modules[name], where, tensors[key]) and is_taken(modules[name], where)):
            found = f"tensor {key!r:.80} would stand in the place of {'.'.join(map(str, (name, *where)))!r:.80}"
            raise CheckpointError(path, found, _REMEDY)


def put_attributes(path: str, model: nn.Module, content: Manifest) -> None:
    """Put plain attributes that differ from those of the rebuilt model.

    Raises:
        CheckpointError: one is of another kind than the model's.
    """
    modules = dict(model.named_modules())
    own: dict[str, dict[str, Any]] = {}
    for name, attribute, value in content.attributes:
        if name not in modules:
            continue
        if name not in own:
            own[name] = plain_attributes(modules[name])
        known = own[name]
        if attribute not in known:
            continue
        if not _alike(known[attribute], value):
            found = f"attribute {f'{name}.{attribute}'.strip('.')!r:.80} is {value!r:.80}, the model has another kind"
            raise CheckpointError(path, found, _REMEDY)
        modules[name].__dict__[attribute] = value


def check_values(path: str, model: nn.Module) -> None:
    """Check that nothing is left without memory.

    Raises:
        CheckpointError: a tensor of the model got no value.
    """
    for name, module in model.named_modules():
        for where, tensor in plain_tensors(module).items():
            if tensor.is_meta:
                found = f"tensor {'.'.join(map(str, (name, *where)))!r} has no value in the file"
                raise CheckpointError(path, found, _REMEDY)

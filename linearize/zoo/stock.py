"""Turn a narrower transformers model into a stock one: its config names its widths, so that any runtime can load it."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.errors import CaptureError, CheckpointError
from linearize.zoo import timm_models, timm_stock
from linearize.zoo.stock_config import described, misfit, shapes_of

__all__ = [
    "check_plain",
    "check_stock",
    "check_timm",
    "expect_stock",
    "is_ours",
    "library_class",
    "prove_stock",
    "stock_copy",
    "turned_weights",
]

_REMEDY = "Compress with stock=True, which keeps equal widths and adds no bias, or save it with linearize.save."
# What the same sums in another order may differ by, relative to the largest value.
_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def stock_copy(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Make an ordinary model of the same class with the same function. Its config describes it correctly.

    Use this on the result of `linearize.compress(..., stock=True)` for a transformers model. Its FFNs are narrower, all
    of one width, and contain no layers of linearize. The numbers in the config that give their width, such as
    `intermediate_size`, are found by trying which ones give these shapes. For a timm model these are arguments of its
    constructor, such as `mlp_ratio`. Weights and outputs of both are compared.

    Args:
        model: the compressed model. It is not changed.
        example_inputs: as for `linearize.convert`. The outputs are compared on them.

    Returns:
        A new model, in eval mode. `save_pretrained`, or `timm.models.save_for_hf`, writes a folder that can be loaded
        without linearize.

    Raises:
        CheckpointError: the model is from neither library; or no config describes it, because layers have different
            widths, come from linearize, or have a bias where the class has none; or a model of that config computes
            something else.

    Examples:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> stock_copy(BertModel(config)).config.intermediate_size
        32
    """
    if timm_models.is_timm(model):
        made = timm_stock.with_copies(check_timm(model), model)
        difference = _difference(model, made, example_inputs)
        if difference:
            raise CheckpointError(type(model).__name__, difference, "Save it with linearize.save instead.")
        return made
    kind, state, found = check_stock(model)
    reason, equal = "", None
    for config in (found, *_tied_otherwise(found)):
        made = _filled(kind, config, model, state)
        lost = [key for key, value in made.state_dict().items() if not torch.equal(value, state[key])]
        if lost:
            reason = reason or f"{lost[0]} of a model of its config cannot hold the same values: it is tied there"
            continue
        equal = equal or made
        if _shared(made) == _shared(model):
            equal = made
            break
    if equal is not None:
        reason = _difference(model, equal, example_inputs)
    if equal is None or reason:
        raise CheckpointError(type(model).__name__, reason, "Save it with linearize.save instead.")
    return equal


def _shared(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def expect_stock(model: nn.Module) -> None:
    """Check before any work: a model that is to be stock afterwards must be stock now.

    Raises:
        CheckpointError: it is not, so that nothing made of it would be.
    """
    if _has_config(model):
        check_stock(model)


def prove_stock(model: nn.Module, example_inputs: Any) -> None:
    """Check afterwards: warn with the reason if the result is not stock."""
    if _has_config(model):
        try:
            stock_copy(model, example_inputs)
        except CheckpointError as error:
            warnings.warn(f"stock=True: no stock model is the same function: {error}", stacklevel=3)


def _has_config(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "to_dict")


def check_stock(model: nn.Module) -> tuple[type[nn.Module], dict[str, Tensor], Any]:
    """The class, the state and the config of the stock model that this one is; nothing is computed.

    Raises:
        CheckpointError: as `stock_copy`, but for the comparison.
    """
    name = type(model).__name__
    if not _has_config(model):
        raise CheckpointError(name, "found no transformers config", "Save it with linearize.save instead.")
    config: Any = model.config
    check_plain(model)
    kind = library_class(type(model))
    turned = _turned(kind, model, config)
    state = {key: value.t().contiguous() if key in turned else value for key, value in model.state_dict().items()}
    found_config = described(kind, config, {key: tuple(value.shape) for key, value in state.items()})
    if found_config is None:
        where, why = misfit(shapes_of(kind, config), {key: tuple(value.shape) for key, value in state.items()})
        raise CheckpointError(where, f"{why}: found no config of {name} that gives these shapes", _REMEDY)
    return kind, state, found_config


def check_timm(model: nn.Module) -> timm_stock.TimmArguments:
    """The arguments with which timm makes a model of these shapes; nothing is computed.

    Raises:
        CheckpointError: there are none.
    """
    check_plain(model)
    found = timm_stock.arguments_of(model)
    if found is None:
        before = timm_stock.shapes_before(model)
        wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        where, why = misfit(before, wanted) if before else (type(model).__name__, "is of no name that timm knows")
        raise CheckpointError(where, f"{why}: found no arguments of timm.create_model for it", _REMEDY)
    return found


def check_plain(model: nn.Module) -> None:
    """See that every layer is one of the model's library.

    Raises:
        CheckpointError: there is one of ours.
    """
    for path, module in model.named_modules():
        if is_ours(module):
            found = f"found {type(module).__name__}, which no stock model has"
            raise CheckpointError(path, found, "Compress with stock=True, or save it with linearize.save.")


def is_ours(module: nn.Module) -> bool:
    """Whether no library but linearize has such a layer.

    A function that a rewritten forward calls as a child is the same function without the rewriting.
    """
    kind = type(module)
    return kind.__module__.startswith("linearize.") and kind.__name__ != "Elementwise"


def library_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class as its library defines it, of one that was made from it to hold a rewritten forward."""
    for base in kind.__mro__:
        if getattr(sys.modules.get(base.__module__), base.__qualname__, None) is base:
            return base  # type: ignore[no-any-return]
    return kind


def turned_weights(model: Any) -> set[str]:
    """Names of the weights that the stock class of a model stores the other way round."""
    return _turned(library_class(type(model)), model, model.config)


def _turned(kind: type[nn.Module], model: nn.Module, config: Any) -> set[str]:
    """Weights that the stock class stores the other way round (its `Conv1D`), where collapsing left a linear layer."""
    with torch.device("meta"):
        stock = kind(copy.deepcopy(config))
    modules = dict(model.named_modules())
    return {
        f"{path}.weight"
        for path, module in stock.named_modules()
        if type(module).__name__ == "Conv1D" and isinstance(modules.get(path), nn.Linear)
    }


def _tied_otherwise(config: Any) -> list[Any]:
    """The config with its weights tied where they were not, or the other way round."""
    changed = copy.deepcopy(config)
    names = [name for name, value in config.to_dict().items() if name.startswith("tie_") and isinstance(value, bool)]
    for name in names:
        setattr(changed, name, not getattr(config, name))
    return [changed] if names else []


def _filled(kind: type[nn.Module], config: Any, model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A model of a config with copies of all tensors, of their types and where they are."""
    with torch.random.fork_rng(devices=[]):
        made: Any = kind(copy.deepcopy(config))
    made.load_state_dict({key: value.detach().clone() for key, value in state.items()}, assign=True)
    made.tie_weights()
    own = dict(model.named_buffers())
    for path, module in made.named_modules():
        for name in module._non_persistent_buffers_set:
            other = own.get(f"{path}.{name}" if path else name)
            if other is not None and other.shape == module._buffers[name].shape:
                module._buffers[name] = other.detach().clone()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    stock: nn.Module = made.eval()
    return stock


def _difference(model: nn.Module, made: nn.Module, example_inputs: Any) -> str:
    """What tells the outputs apart; nothing if they are the same."""
    from linearize.graph.capture import normalize_inputs
    from linearize.zoo.inputs import example_inputs as known_inputs

    try:
        args, kwargs = known_inputs(model) if example_inputs is None else normalize_inputs(example_inputs)
    except CaptureError as error:
        return f"its inputs are not known, so that nothing can be compared ({error.found}); pass example_inputs="
    training = [(module, module.training) for module in model.modules()]
    try:
        outputs = [_tensors(m.eval(), args, kwargs) for m in (model, made)]
    finally:
        for module, was in training:
            module.training = was
    for a, b in zip(*outputs, strict=True):
        scale = a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
        worst = float((a - b).abs().max() / scale) if a.numel() else 0.0
        if not worst <= _TOLERANCES.get(a.dtype, 1e-2):
            return f"a model of its config computes something else ({worst:.2g} off, relative)"
    return ""


@torch.no_grad()
def _tensors(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(*args, **kwargs)
        leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

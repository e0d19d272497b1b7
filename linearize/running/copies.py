"""Copy a model, whatever its users have put on its modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.tensors import is_wrapper


def duplicate(model: nn.Module, error: type[LinearizeError]) -> nn.Module:
    """A deep copy. Tensors that a forward left in attributes, with the graph of their gradients, are copied without it.

    Raises:
        LinearizeError: of the given class, if an attribute cannot be copied.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> layer.last = layer(layer.weight)
        >>> duplicate(layer, LinearizeError).last.requires_grad
        False
    """
    try:
        copied = copy.deepcopy(model, computed_tensors(model))
    except Exception as failure:  # an attribute may be anything: a lock, a file, a generator
        found = f"cannot be copied ({type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''})"
        remedy = "Take away the attribute that copy.deepcopy refuses, or convert with inplace=True."
        raise error(type(model).__name__, found, remedy) from failure
    for old, new in zip(model.modules(), copied.modules(), strict=False):
        for name in new._modules:
            if name in vars(new) and name not in vars(old):
                del vars(new)[name]  # `nn.TransformerDecoderLayer` hides a child `activation` of every copy
    return copied


class Workbench:
    """A copy of a model that may be edited, and is put back as often as wanted: cheaper than another copy each time.

    Args:
        model: it must not change as long as the bench is used.
        error: what is raised if it cannot be copied.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> bench = Workbench(model, LinearizeError)
        >>> edited = bench.fresh()
        >>> _, edited[1] = edited[0].weight.data.zero_(), nn.Identity()
        >>> again = bench.fresh()
        >>> again is edited, again[1], bool((again[0].weight == model[0].weight).all())
        (True, ReLU(), True)
    """

    def __init__(self, model: nn.Module, error: type[LinearizeError]) -> None:
        self.copy = duplicate(model, error)
        self._modules = [(part, type(part), _parts(part)) for part in self.copy.modules()]
        pairs = zip(_tensors(self.copy), _tensors(model), strict=True)
        # Wrappers, such as quantised tensors, are written by nobody here, and not all of them can be compared.
        self._tensors = {id(own): (own, source) for own, source in pairs if not is_wrapper(source)}

    def fresh(self) -> nn.Module:
        """The copy as the model is."""
        for part, kind, (attributes, *containers) in self._modules:
            part.__class__ = kind
            vars(part).clear()
            vars(part).update(attributes)
            for name, content in zip(_CONTAINERS, containers, strict=True):
                held = vars(part)[name]
                held.clear()
                held.update(content)
        with torch.no_grad():
            for tensor, source in self._tensors.values():
                if not torch.equal(tensor, source):  # by value: a write through `.data` counts no version
                    tensor.data = source.detach().clone()
        return self.copy


_CONTAINERS = ("_parameters", "_buffers", "_modules")


def _parts(part: nn.Module) -> tuple[dict[str, Any], ...]:
    return dict(vars(part)), *(dict(vars(part)[name]) for name in _CONTAINERS)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for part in model.modules():
        yield from (tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None)


def computed_tensors(model: nn.Module) -> dict[int, object]:
    """Copies, by id, of the tensors in attributes that have a graph behind them: what `copy.deepcopy` would refuse."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor) and not value.is_leaf}

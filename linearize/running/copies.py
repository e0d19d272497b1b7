"""Copy a model, whatever its users have put on its modules."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from linearize.errors import LinearizeError


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


def computed_tensors(model: nn.Module) -> dict[int, object]:
    """Copies, by id, of the tensors in attributes that have a graph behind them: what `copy.deepcopy` would refuse."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor) and not value.is_leaf}

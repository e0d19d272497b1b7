"""Give one module a class of its own with the same name, so that its methods can be changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

_Change = Callable[[nn.Module], object]
_AGAIN = "_linearize_again"


def subclass(original: type[nn.Module], methods: dict[str, Callable[..., Any]], again: _Change) -> type[nn.Module]:
    """A subclass of a module's class under the same name, with other methods, whose objects are copied and pickled.

    Their attributes are copied as they are: a class may fill in what it misses when it is unpickled
    (`nn.TransformerDecoderLayer` hides a child `activation` so).

    Args:
        original: the class.
        methods: what is new in the subclass.
        again: gives a module of the original class the subclass again, when it is unpickled; it is pickled, too.
    """

    def deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def reduce(self: nn.Module, _protocol: Any) -> Any:
        cls, changes = type(self), list[_Change]()
        while _AGAIN in vars(cls):
            changes.insert(0, vars(cls)[_AGAIN][0])
            cls = cls.__mro__[1]
        # A guard (linearize.guard) refers to the object that it stands on: it comes when that is there.
        later = {name: value for name, value in self.__dict__.items() if name == "save_pretrained"}
        first = {name: value for name, value in self.__dict__.items() if name not in later}
        return _restore, (cls, changes, first), later or None

    namespace = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own = {**methods, _AGAIN: (again,), "__deepcopy__": deep_copy, "__reduce_ex__": reduce}
    return type(original.__name__, (original,), {**namespace, **own})


def _restore(
    original: type[nn.Module], changes: list[Callable[[nn.Module], object]], state: dict[str, Any]
) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(state)
    for again in changes:
        again(module)
    return module


def keep_attributes(module: nn.Module) -> nn.Module:
    """Allow a module to be copied and pickled as it is, whatever its class does when it is unpickled; in place."""
    module.__class__ = subclass(type(module), {}, keep_attributes)
    return module


def hides_children(module: nn.Module) -> bool:
    """True if copies of a module get an attribute that hides a child (`nn.TransformerDecoderLayer`: `activation`).

    Examples:
        >>> layer = nn.TransformerDecoderLayer(4, 1, 8, activation=nn.GELU())
        >>> hides_children(layer), hides_children(layer.linear1)
        (True, False)
    """
    cls: Any = type(module)
    if cls.__setstate__ is nn.Module.__setstate__ or _AGAIN in vars(cls):
        return False
    copied = cls.__new__(cls)
    try:
        copied.__setstate__(dict(vars(module)))
    except Exception:  # a class whose state is of another form: it copies itself in its own way
        return False
    return any(name in vars(copied) and name not in vars(module) for name in module._modules)

"""Numbers that a module keeps for its forward, such as how many heads it has: changed when its layers are.

Only numbers that are there can be changed, and only into numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from linearize.errors import CheckpointError

__all__ = ["ATTRIBUTES", "SETTINGS", "fewer_in", "set_attributes", "whole_numbers_of"]

ATTRIBUTES = "Attributes"
SETTINGS = "Settings"


def whole_numbers_of(module: nn.Module) -> dict[str, int]:
    """The whole numbers among a module's own attributes, those in tuples and lists too, as "name.index".

    Examples:
        >>> layer = nn.Linear(2, 3)
        >>> layer.sizes = (4, 5)
        >>> whole_numbers_of(layer)
        {'in_features': 2, 'out_features': 3, 'sizes.0': 4, 'sizes.1': 5}
    """
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            found[name] = value
        elif type(value) in (tuple, list) and value and all(type(part) is int for part in value):
            found |= {f"{name}.{index}": part for index, part in enumerate(value)}
    return found


def set_attributes(module: nn.Module, values: Mapping[str, int]) -> None:
    """Change numbers of a module, in place.

    Raises:
        CheckpointError: it has no such number.

    Examples:
        >>> layer = nn.Linear(2, 3)
        >>> layer.sizes = (4, 5)
        >>> set_attributes(layer, {"sizes.1": 6})
        >>> layer.sizes
        (4, 6)
    """
    known = whole_numbers_of(module)
    for name, value in values.items():
        if name not in known or type(value) is not int:
            found = f"has no number {name!r:.80} that could become {value!r:.40}"
            raise CheckpointError(type(module).__name__, found, "Load it onto the model that it was made from.")
        attribute, _, index = name.partition(".")
        if not index:
            vars(module)[attribute] = value
            continue
        whole: Any = list(vars(module)[attribute])
        whole[int(index)] = value
        vars(module)[attribute] = type(vars(module)[attribute])(whole)


def attributes_step(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Repeat a change when a file is loaded."""
    set_attributes(current, options["values"])
    return current


def fewer_in(
    module: nn.Module, attribute: str, numbers: Sequence[str], lists: Sequence[str], keep: Sequence[int]
) -> None:
    """Tell settings that a module holds that there are fewer layers: how many, and what lists say of each; in place.

    Args:
        module: that holds them.
        attribute: under this name.
        numbers: names of settings that count layers.
        lists: names of settings with an entry for each layer.
        keep: which layers stay.

    Raises:
        CheckpointError: there are no such settings.

    Examples:
        >>> from types import SimpleNamespace
        >>> model = nn.Identity()
        >>> model.config = SimpleNamespace(layers=3, kinds=["a", "b", "c"])
        >>> fewer_in(model, "config", ["layers"], ["kinds"], [0, 2])
        >>> model.config
        namespace(layers=2, kinds=['a', 'c'])
    """
    held: Any = vars(module).get(attribute)
    for name in (*numbers, *lists):
        value: Any = getattr(held, name, None)
        fits = type(value) is int if name in numbers else isinstance(value, (list, tuple))
        if not fits or (name in lists and max(keep, default=-1) >= len(value)):
            found = f"has no {attribute}.{name:.80} that tells of its layers"
            raise CheckpointError(type(module).__name__, found, "Load it onto the model that it was made from.")
    for name in lists:
        value = getattr(held, name)
        setattr(held, name, type(value)(value[index] for index in keep))
    for name in numbers:
        setattr(held, name, len(keep))


def settings_step(current: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Set numbers and lists of a module as a stored step says, when a file is loaded."""
    fewer_in(current, options["attribute"], options["numbers"], options["lists"], options["keep"])
    return current

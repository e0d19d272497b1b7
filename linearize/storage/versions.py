"""Read files of earlier format versions as if they were of the present one."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from linearize.storage.manifest import Manifest
from linearize.surgery.carriers import Around, roles_of


def names_since(version: int, model: nn.Module) -> dict[str, str]:
    """Names of tensors that have changed since a version: old name -> today's, for the model of a file.

    Version 1 knew the weight of a layer around another, say `fc2.linear.weight`, as `fc2.weight`.

    Examples:
        >>> from linearize.surgery.carriers import CarryLinear
        >>> names_since(1, nn.Sequential(CarryLinear(2, 3, bias=False)))
        {'0.weight': '0.linear.weight'}
    """
    names: dict[str, str] = {}
    if version > 1:
        return names
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Around):
            inside = {id(child): name for name, child in module.named_children()}
            for role, (holder, name) in roles_of(module).items():
                dot = f"{path}." if path else ""
                names[dot + role] = f"{dot}{inside[id(holder)]}.{name}"
    return names


def renamed(content: Manifest, names: dict[str, str]) -> Manifest:
    """The metadata with today's names of tensors."""
    aliases = {names.get(name, name): names.get(stored, stored) for name, stored in content.aliases.items()}
    return replace(content, aliases=aliases, frozen=[names.get(name, name) for name in content.frozen])

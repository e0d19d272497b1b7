"""All families, in the order in which they offer options. A family can build on the groups of those before it."""

from __future__ import annotations

from linearize.families.attention.family import Attentions
from linearize.families.blocks.family import Blocks
from linearize.families.channels.family import Channels
from linearize.families.depth.family import Depth
from linearize.families.family import Family
from linearize.families.heads.family import AttentionHeads
from linearize.families.lines.family import Lines
from linearize.families.modules.family import Modules
from linearize.plan import add_forms

__all__ = ["FAMILIES", "family_of", "register"]

FAMILIES: list[Family] = [Channels(), Blocks(), Lines(), AttentionHeads(), Modules(), Attentions(), Depth()]
for _family in FAMILIES:
    add_forms(*_family.forms)


def register(family: Family) -> None:
    """Add a family of your own, after all others."""
    FAMILIES.append(family)
    add_forms(*family.forms)


def family_of(form: str) -> Family:
    """The family that adds this form. For forms of collapsing, the first family.

    Examples:
        >>> family_of("block").name, family_of("merged").name
        ('blocks', 'channels')
    """
    return next((family for family in FAMILIES if form in {own.name for own in family.forms}), FAMILIES[0])

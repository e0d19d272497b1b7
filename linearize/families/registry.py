"""All families, in the order in which they offer options. A family can build on the groups of those before it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from linearize.plan import forms_from

if TYPE_CHECKING:
    from linearize.families.family import Family

    FAMILIES: list[Family]

__all__ = ["FAMILIES", "family_of", "register"]


@cache
def _families() -> list[Family]:
    """The list itself. Its modules are imported when it is first looked at: most programs never do."""
    from linearize.families.attention.family import Attentions
    from linearize.families.blocks.family import Blocks
    from linearize.families.channels.family import Channels
    from linearize.families.depth.family import Depth
    from linearize.families.experts.family import MixturesOfExperts
    from linearize.families.heads.family import AttentionHeads
    from linearize.families.lines.family import Lines
    from linearize.families.modules.family import Modules

    return [Channels(), Blocks(), Lines(), AttentionHeads(), MixturesOfExperts(), Modules(), Attentions(), Depth()]


def __getattr__(name: str) -> Any:
    if name == "FAMILIES":
        return _families()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(family: Family) -> None:
    """Add a family of your own, after all others."""
    _families().append(family)


def family_of(form: str) -> Family:
    """The family that adds this form. For forms of collapsing, the first family.

    Examples:
        >>> family_of("block").name, family_of("merged").name
        ('blocks', 'channels')
    """
    families = _families()
    return next((family for family in families if form in {own.name for own in family.forms}), families[0])


forms_from(lambda: (form for family in _families() for form in family.forms))

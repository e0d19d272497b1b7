"""Sites that must keep equal widths become one group."""

from __future__ import annotations

from linearize.families.option import Group, Option

__all__ = ["tied"]


def tied(groups: list[Group], names: set[str]) -> list[Group]:
    """Groups in which every option has the same number of channels and the same form in all sites named."""
    inside = [group for group in groups if names & set(group.sites)]
    if len(inside) < 2:
        return groups
    kinds = [{_kind(option): option for option in group.options} for group in inside]
    common = [kind for kind in kinds[0] if all(kind in other for other in kinds[1:])]
    options = tuple(_merged([kind[key] for kind in kinds]) for key in common)
    reason = next((group.reason for group in inside if group.reason), None)
    if len(options) == 1:
        reason = reason or "the sites tied to equal widths have no other option in common"
    tied = Group(tuple(name for group in inside for name in group.sites), options, reason)
    place = groups.index(inside[0])
    rest = [group for group in groups if group not in inside]
    return [*rest[:place], tied, *rest[place:]]


def _kind(option: Option) -> tuple[tuple[int, int, str], ...]:
    return tuple((choice.keep, choice.rank, choice.form) for choice in option.choices)


def _merged(options: list[Option]) -> Option:
    choices = tuple(choice for option in options for choice in option.choices)
    sums = {name: sum(getattr(o, name) for o in options) for name in ("loss", "flops", "params", "activations")}
    return Option(choices, **sums)

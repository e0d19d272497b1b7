"""What a user should know of the experts of a model, beside the plan."""

from __future__ import annotations

from collections.abc import Sequence

from linearize.families.experts.place import Experts

__all__ = ["remarks"]

_FEW = 10  # tokens that pick an expert: with fewer, nothing is known of it
_NAMED = 8


def remarks(places: Sequence[Experts]) -> list[str]:
    """Which experts no token picks, and of which too little is known."""
    return [text for place in places for text in _of(place)]


def _of(place: Experts) -> list[str]:
    rows = place.sums.rows.tolist()
    nobody = [expert for expert, count in enumerate(rows) if not count]
    width = 0 if place.channels is None else place.channels.width
    seen = [covariance.count for covariance in place.sums.hidden]
    scarce = [e for e, count in enumerate(rows) if 0 < count < _FEW or (width and 0 < seen[e] < width)]
    found = []
    if nobody:
        change = "can go with no change on this data"
        if place.fixed is not None:
            change = "no data tells how to narrow"
        elif not place.closed:
            change = "can go; what others weigh grows by its share, as the router does not divide by their sum"
        found.append(f"{place.bank}: no token picks {_named(nobody)}, which {change}")
    if scarce:
        text = f"{place.bank}: few tokens pick {_named(scarce)}"
        found.append(f"{text}; their refits are drawn towards what they were" if width else text)
    return found


def _named(experts: Sequence[int]) -> str:
    """Numbers of experts in words.

    Examples:
        >>> _named([3]), _named([1, 2])
        ('expert 3', 'experts 1, 2')
    """
    some = ", ".join(map(str, experts[:_NAMED])) + (
        f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
    )
    return f"expert{'s' if len(experts) > 1 else ''} {some}"

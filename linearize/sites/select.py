"""Which sites a user chose, by patterns of their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace

from linearize.errors import UsageError
from linearize.sites.site import Site

__all__ = ["UNSELECTED", "selected"]

UNSELECTED = ("not in include=", "in exclude=")  # why a site has no gate if the user did not want one


def selected(
    sites: tuple[Site, ...], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> tuple[Site, ...]:
    """The sites, told which of them shall have no gate.

    Raises:
        UsageError: a pattern matches no site.
    """
    wanted, unwanted = _patterns(include), _patterns(exclude)
    names = [site.name for site in sites]
    for option, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns or ():
            if not fnmatch.filter(names, pattern):
                some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise UsageError(f"{option}={pattern!r}", "matches no site", f"The sites are: {some}.")

    def choose(site: Site) -> Site:
        if site.ungated is not None:
            return site
        if wanted is not None and not _matches(site.name, wanted):
            return replace(site, ungated=UNSELECTED[0])
        return replace(site, ungated=UNSELECTED[1]) if _matches(site.name, unwanted or ()) else site

    return tuple(choose(site) for site in sites)


def _patterns(value: str | Sequence[str] | None) -> list[str] | None:
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if not isinstance(value, Sequence) or not all(isinstance(pattern, str) for pattern in value):
        raise UsageError("include= or exclude=", f"found {value!r}", "Pass a pattern, or a list of patterns.")
    return list(value)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

"""Check stored statistics before they are used. Damaged ones are gathered again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linearize.checks import is_number, is_whole

__all__ = ["flaw_in"]

_KINDS = ("site", "refit", "block", "module")
_ROUNDING = 1e-8  # of the largest variance: how far below 0 rounding may take an eigenvalue


def flaw_in(kind: str, noted: Any) -> str | None:
    """The flaw in stored statistics of a kind ("site", "refit", "block" or "module"); None if there is none.

    Of other kinds nothing is known but that they are told by name.

    Examples:
        >>> flaw_in("module", {"samples": 1, "rows": None})
        'no sensitivity'
    """
    if not isinstance(noted, Mapping):
        return f"a {type(noted).__name__}"
    if kind not in _KINDS:
        return None
    of_site = kind in ("site", "refit")
    wanted = ["samples", "rows", "sensitivity"] + ["inputs", "seen", "shape"] * of_site + ["shape"] * (kind == "block")
    for name in wanted:
        if name not in noted:
            return f"no {name}"
    for name in ("samples", "inputs", "seen"):
        if name in noted and not _counts(noted[name]):
            return f"{name} that are no count"
    if "shape" in noted and not (isinstance(noted["shape"], tuple | list) and all(map(_is_size, noted["shape"]))):
        return "a shape that is none"
    rows = noted["rows"]
    if kind == "block":
        if not isinstance(rows, Mapping) or not all(map(is_whole, rows)):
            return "no rows by size of the kernel"
        flaws = [_flaw_in_rows(each) for each in rows.values()]
        return next((flaw for flaw in flaws if flaw), None) or _flaw_in_sensitivity(noted["sensitivity"])
    if rows is None and not of_site:
        return _flaw_in_sensitivity(noted["sensitivity"])
    return _flaw_in_rows(rows) or _flaw_in_sensitivity(noted["sensitivity"], needed=of_site)


def _counts(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and value >= 0


def _is_size(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _flaw_in_rows(rows: Any) -> str | None:
    """The flaw in the state of a `Covariance`."""
    if not isinstance(rows, Mapping) or not {"count", "weight", "mean", "scatter"} <= rows.keys():
        return "no rows"
    mean, scatter = rows["mean"], rows["scatter"]
    if not is_whole(rows["count"]) or rows["count"] < 0 or not _counts(rows["weight"]):
        return "rows that were not counted"
    if not _is_vector(mean) or not _is_square(scatter) or len(scatter) != len(mean):
        return "rows of no shape"
    return None if _is_positive(scatter) else "a covariance that is none"


def _flaw_in_sensitivity(found: Any, *, needed: bool = False) -> str | None:
    if found is None and not needed:
        return None
    return None if _is_square(found) and _is_positive(found) else "a sensitivity that is none"


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype == torch.float64 and _is_finite(value)


def _is_square(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != value.shape[1]:
        return False
    return value.is_floating_point() and _is_finite(value)


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _is_positive(matrix: Tensor) -> bool:
    """Whether a matrix is symmetric and has no eigenvalue below 0, but for rounding."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not largest:
        return True
    scaled = matrix.double() / largest
    if float((scaled - scaled.t()).abs().max()) > _ROUNDING:
        return False
    _, info = torch.linalg.cholesky_ex(scaled + _ROUNDING * torch.eye(len(scaled), dtype=scaled.dtype))
    return not int(info)

"""The errors of linearize. Each names the place, what was found there, and what to do."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CollapseError",
    "ConvertError",
    "DataError",
    "ExportError",
    "LinearizeError",
    "TrainingError",
    "UsageError",
]


class LinearizeError(Exception):
    """The base class of every error that linearize raises on purpose.

    Args:
        where: the module path, file, tensor or option concerned.
        found: what was found there.
        remedy: what the reader can do.

    Examples:
        >>> print(LinearizeError("blocks.0.act", "found no channel axis", "Pass exclude='blocks.0.act'."))
        blocks.0.act: found no channel axis. Pass exclude='blocks.0.act'.
    """

    def __init__(self, where: str, found: str, remedy: str) -> None:
        self.where = where
        self.found = found
        self.remedy = remedy
        super().__init__(where, found, remedy)

    def __str__(self) -> str:
        return f"{self.where}: {self.found.rstrip('.')}. {self.remedy}"


class CaptureError(LinearizeError):
    """The model cannot be read. It does not run on the example inputs, or its graph cannot be captured."""


class ConvertError(LinearizeError):
    """No gate could be put in, or not at the place that was asked for."""


class CollapseError(LinearizeError):
    """The model cannot be collapsed: it has no gates, its weights are not finite, or the plan does not fit it."""


class CheckpointError(LinearizeError):
    """A file cannot be written or read, or its content is not valid."""


class ExportError(LinearizeError):
    """A format cannot hold a model, or its runtime computes something else."""


class DataError(LinearizeError):
    """The data cannot be used. It is missing, empty, without labels, or not finite."""


class TrainingError(LinearizeError):
    """Training cannot continue. The loss is not a finite scalar, or a checkpoint belongs to another run."""


class UsageError(LinearizeError, ValueError):
    """An argument has a value that the function does not accept."""

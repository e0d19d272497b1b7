"""The errors of linearize: each says where, what was found, and what to do about it."""

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
    """Base of every error that linearize raises on purpose.

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
    """The model could not be read: its example inputs do not run, or its graph cannot be captured."""


class ConvertError(LinearizeError):
    """No gate could be put in, or not where it was asked for."""


class CollapseError(LinearizeError):
    """A plan does not fit the model, or its weights are not finite."""


class CheckpointError(LinearizeError):
    """A file cannot be written, read, or does not hold what it should."""


class ExportError(LinearizeError):
    """A format cannot hold a model, or its runtime computes something else."""


class DataError(LinearizeError):
    """The data cannot be used: missing, empty, unlabelled, or not finite."""


class TrainingError(LinearizeError):
    """Training cannot go on: a loss that is no finite scalar, a checkpoint of another run."""


class UsageError(LinearizeError, ValueError):
    """An argument is outside what the function takes."""

"""The record: what linearize knows about a model that it has changed, as plain data, kept on the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from linearize.sites.site import Site

Step = dict[str, Any]
"""One change of the module tree: ``{"path": where, "module": the spec of what stands there now}``."""

_ATTRIBUTE = "_linearize"
_WATCHERS: list[Callable[[nn.Module, Record], None]] = []


@dataclass
class Record:
    """The history of a model that linearize has changed.

    Attributes:
        sites: every activation that was found, gated or not, in order of execution.
        steps: changes of the module tree since the base model, without the gates; replayed when a file is loaded.
        inputs: example inputs with tensors on the meta device: shapes and dtypes only.
    """

    sites: tuple[Site, ...] = ()
    steps: list[Step] = field(default_factory=list)
    inputs: Any = None


def record_of(model: nn.Module) -> Record | None:
    """The record of a model, or None if linearize has not touched it."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Record) else None


def converted_parts(model: nn.Module) -> list[str]:
    """Paths of the modules that were converted: "" for the model itself, or submodules converted by themselves."""
    paths: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in paths)
        if record_of(module) is not None and not inside:
            paths.append(path)
    return paths


def set_record(model: nn.Module, record: Record) -> None:
    """Attach a record to a model; it survives deepcopy and pickle, and is no part of the state dict."""
    model.__dict__[_ATTRIBUTE] = record
    for watch in _WATCHERS:
        watch(model, record)


def when_recorded(watch: Callable[[nn.Module, Record], None]) -> None:
    """Register a function that is called with every model that gets a record, and the record."""
    _WATCHERS.append(watch)

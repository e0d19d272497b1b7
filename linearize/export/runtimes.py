"""Other programs' runtimes as places where a latency can be measured: a model, or a layer of it, ready to run there."""

from __future__ import annotations

import importlib.util
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from linearize import checks
from linearize.errors import ExportError, LinearizeError, UsageError
from linearize.export.batches import cache_off
from linearize.export.face import Subject
from linearize.export.registry import format_of
from linearize.graph.capture import Inputs
from linearize.running.devices import device_of

__all__ = ["FORMATS", "Runtime", "RuntimeCall", "Session", "check_runtime", "runtime_of"]

RuntimeCall = Callable[[], Any]
"""One forward pass on inputs that are there already."""

FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Runtimes by their names, with the format of `linearize.export` that each reads."""


class Session(Protocol):
    """A file in its runtime."""

    def fits(self, batch: Inputs) -> bool:
        """Whether a batch has the sizes that the file leaves open, or fixes."""

    def run(self, batch: Inputs) -> RuntimeCall:
        """A function without arguments that runs the file once on the batch."""


class Runtime:
    """Where models run. Models that are exported for it stay ready as long as they live.

    Attributes:
        told: its name and version, or that of a function of the user's.
    """

    def __init__(self, told: str) -> None:
        self.told = told

    def run(self, model: nn.Module, batch: Inputs) -> RuntimeCall:
        """A model, ready to run there on a batch.

        Args:
            model: in eval mode.
            batch: its inputs.

        Raises:
            LinearizeError: it cannot be brought there, with the reason.
        """
        raise NotImplementedError


class _Exported(Runtime):
    """A runtime that reads a format of `linearize.export`."""

    def __init__(self, name: str) -> None:
        from linearize.export import onnx, openvino

        opened: dict[str, tuple[Callable[[], str], Callable[[Path], Session]]] = {
            "onnxruntime": (onnx.version, onnx.OrtSession),
            "openvino": (openvino.version, openvino.OvSession),
        }
        told, self._open = opened[name]
        super().__init__(told())
        self._format = format_of(FORMATS[name])
        self._ready: weakref.WeakKeyDictionary[nn.Module, list[Session]] = weakref.WeakKeyDictionary()

    def run(self, model: nn.Module, batch: Inputs) -> RuntimeCall:
        if device_of(model).type != "cpu":
            found = f"found a model on {device_of(model)}, and {self.told} runs on the processor here"
            raise UsageError("runtime", found, "Move it (model.cpu()), or pass a function that measures elsewhere.")
        args, kwargs = batch
        batch = (args, {**kwargs, **cache_off(model, kwargs)})
        ready = self._ready.setdefault(model, [])
        session = next((one for one in ready if one.fits(batch)), None)
        if session is None:
            session = self._exported(model, batch)
            ready.append(session)
        return session.run(batch)

    def _exported(self, model: nn.Module, batch: Inputs) -> Session:
        refusal = self._format.can(model)
        if refusal is not None:
            raise ExportError(refusal.where, f"{refusal.why}: it cannot run in {self.told}", "Leave runtime= out.")
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, torch.no_grad():
                path = Path(folder) / f"model{self._format.suffix}"
                self._format.write(Subject(model, [batch]), path)
                return self._open(path)
        except LinearizeError:
            raise
        except Exception as error:  # whatever an exporter or a runtime raises
            line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
            found = f"cannot be brought to {self.told} ({type(error).__name__}: {line[:200]})"
            raise ExportError(type(model).__name__, found, "Leave runtime= out.") from error


class _Own(Runtime):
    """A function of the user's."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(f"the function {getattr(function, '__qualname__', type(function).__name__)}")
        self._function = function

    def run(self, model: nn.Module, batch: Inputs) -> RuntimeCall:
        args, kwargs = batch
        made: Any = self._function(model, args, kwargs)
        if not callable(made):
            found = f"the function gave a {type(made).__name__}"
            raise UsageError("runtime", found, "Return a function without arguments that runs the model once.")
        ready: RuntimeCall = made
        return ready


def check_runtime(given: Any) -> None:
    """Check what a user passes as `runtime=`, and that it is installed.

    Raises:
        UsageError: it is none, or a package is missing.

    Examples:
        >>> check_runtime(lambda model, args, kwargs: lambda: model(*args, **kwargs))
        >>> check_runtime("tensorrt")
        Traceback (most recent call last):
        ...
        linearize.errors.UsageError: runtime: found 'tensorrt'. Pass one of "onnxruntime", "openvino", or a function.
    """
    if callable(given):
        return
    if not isinstance(given, str) or given not in FORMATS:
        checks.refuse("runtime", given, "one of " + ", ".join(f'"{name}"' for name in FORMATS) + ", or a function")
    chosen = format_of(FORMATS[given])
    for module, extra in {**chosen.writes, **chosen.runs}.items():
        if importlib.util.find_spec(module) is None:
            raise UsageError("runtime", f"{module} is not installed", f'Install it: pip install "linearize[{extra}]".')


def runtime_of(given: Any) -> Runtime:
    """The runtime that a user names, or brings.

    Args:
        given: one of `FORMATS`; a function of (model, args, kwargs) that gives a function without arguments, which runs
            the model once; or a `Runtime`.

    Raises:
        UsageError: it is none, or a package is missing.
    """
    if isinstance(given, Runtime):
        return given
    check_runtime(given)
    return _Exported(given) if isinstance(given, str) else _Own(given)

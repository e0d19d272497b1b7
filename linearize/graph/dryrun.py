"""Run a model on fake tensors and record what it does. Nothing is computed or changed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.graph.capture import Inputs, fake_inputs, tensors_of
from linearize.graph.fakes import fake_runs
from linearize.graph.op_calls import given_to, numbers_of, op_of, written_of
from linearize.graph.protect import untouched
from linearize.nest import copied

_log = logging.getLogger(__name__)


class Op(NamedTuple):
    """One ATen op, in place or not: its name, the numbers that it computes with, and the ops whose results it read."""

    name: str
    numbers: tuple[complex | str, ...]
    sources: tuple[int, ...]


@dataclass
class Trace:
    """What a model did in one run.

    Attributes:
        ops: every op, in order; the last one stands for the outputs.
        called: paths of the modules that were called; all of them, for a module with several.
        outputs: shape and dtype of every tensor that came out.
    """

    ops: list[Op] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    outputs: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)

    @property
    def numbers(self) -> Counter[tuple[str, tuple[complex | str, ...]]]:
        """The ops that compute with a number, and how often."""
        return Counter((op.name, op.numbers) for op in self.ops if op.numbers)


class _Noter(TorchDispatchMode):
    """Notes ops as long as `silent` is empty."""

    def __init__(self, trace: Trace, silent: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.silent = silent
        self.made_by: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no id is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.silent:
            return func(*args, **kwargs)
        given = given_to(func, args, kwargs)
        read = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        sources = tuple(self.made_by.get(id(value), -1) for value in read)
        position = len(self.trace.ops)
        name = op_of(func)
        self.trace.ops.append(Op(name, tuple(numbers_of(func, given)), sources))
        out = func(*args, **kwargs)
        for value in pytree.tree_leaves((out, written_of(given))):
            self.made_by[id(value)] = position
            self.alive.append(value)
        return out


def dry_run(
    model: nn.Module,
    inputs: Inputs,
    *,
    training: bool = False,
    skip: frozenset[str] = frozenset(),
    real: bool = False,
    gradients: bool = False,
    on_cpu: bool = False,
) -> Trace:
    """Run `model` on inputs whose values do not matter, and return what it did. The model stays as it is.

    Args:
        model: any model; no memory is taken for it.
        inputs: arguments of its forward, on any device: they are moved to the model's.
        training: run in training mode instead of eval mode.
        skip: paths of modules; what these and their children do is not noted.
        real: compute, with the values that there are, because the model's control flow depends on them.
        gradients: with gradients recorded. A model may take another path then: torch's transformer layers do.
        on_cpu: as if everything were on the CPU.

    Raises:
        Exception: whatever the model's own code raises.

    Examples:
        >>> trace = dry_run(nn.Sequential(nn.Linear(2, 3), nn.Hardtanh(-2, 2)), ((torch.ones(1, 2),), {}))
        >>> trace.ops[-2].name, trace.ops[-2].numbers, trace.outputs
        ('hardtanh', (-2, 2), [((1, 3), torch.float32)])
    """
    trace, silent = Trace(), list[str]()
    noter = _Noter(trace, silent)
    with (
        fake_runs(model, inputs, real=real, on_cpu=on_cpu) as run,
        calls_watched(model, trace.called, skip, silent),
    ):
        out = run(training=training, gradients=gradients, around=noter)
    return _finished(trace, noter, out)


def _finished(trace: Trace, noter: _Noter, out: Any) -> Trace:
    trace.outputs = [(tuple(t.shape), t.dtype) for t in tensors_of(out)]
    trace.ops.append(Op("output", (), tuple(noter.made_by.get(id(t), -1) for t in tensors_of(out))))
    return trace


def called_by_mode(model: nn.Module, inputs: Inputs) -> list[set[str]]:
    """Paths of the modules that a model calls in eval mode, without gradients and with them; nothing if it is unknown.

    A model on the meta device is run as if it were on a CPU: fused paths ask for the device.
    """
    on_cpu = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    found: list[set[str]] = []
    for gradients in (False, True):
        for real in (False, True):
            try:
                found.append(dry_run(model, inputs, real=real, gradients=gradients, on_cpu=on_cpu).called)
                break
            except Exception as error:  # whatever the model's own code raises
                _log.debug("no run to see what is called: %s", error)
    return found if len(found) == 2 else []


def called_modules(model: nn.Module, inputs: Inputs) -> set[str]:
    """Paths of the modules that a model calls in eval mode; all of them, if it does not run.

    A model on the meta device does not run if its control flow depends on values.
    """
    called: set[str] = set()
    try:
        with calls_watched(model, called, frozenset(), []):
            run_once(model, inputs, before=called.clear)
    except Exception as error:  # whatever the model's own code raises
        _log.debug("does not run: %s", error)
        return {path for path, _ in model.named_modules(remove_duplicate=False)}
    return called


def run_once(
    model: nn.Module, inputs: Inputs, *, training: bool = False, before: Callable[[], object] = lambda: None
) -> None:
    """Run a model as cheaply as it goes: on the meta device, on fake tensors, or else for real.

    Args:
        model: it stays as it was.
        inputs: of its forward.
        training: run in training mode instead of eval mode; never for real then, which would move statistics.
        before: called before every attempt.

    Raises:
        Exception: whatever the model's own code raises in the last attempt.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hollow = {name: tensor.detach().to("meta") for name, tensor in tensors}
    fake = fake_inputs(copied(inputs))  # objects of other kinds, such as caches, would keep what is written into them
    attempts: tuple[Callable[[], object], ...] = (
        lambda: torch.func.functional_call(model, hollow, *fake),
        lambda: dry_run(model, inputs, training=training),
        lambda: _on_copies(model, inputs),
    )
    attempts = attempts[:2] if training else attempts
    for number, attempt in enumerate(attempts, 1):
        before()
        try:
            with untouched(model, training=training), torch.no_grad():
                attempt()
        except Exception as error:  # code that makes tensors on another device, or reads their values
            if number == len(attempts):
                raise
            _log.debug("attempt %d does not run: %s", number, error)
        else:
            return


def _on_copies(model: nn.Module, inputs: Inputs) -> object:
    """A real run on copies of the inputs, since a model may work in place on what it is given."""
    args, kwargs = copied(inputs)
    return model(*args, **kwargs)


@contextmanager
def calls_watched(model: nn.Module, called: set[str], skip: frozenset[str], silent: list[str]) -> Iterator[None]:
    """Note in `called` each module that runs, and keep in `silent` the one that is to be skipped."""
    paths: dict[int, list[str]] = {}
    for path, part in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(part), []).append(path)

    def enter(module: nn.Module, _: Any) -> None:
        called.update(paths.get(id(module), ()))
        silent.extend([path for path in paths.get(id(module), ()) if path in skip][:1])

    def leave(module: nn.Module, *_: Any) -> None:
        if silent and silent[-1] in paths.get(id(module), ()):
            silent.pop()

    hooks = [
        _module.register_module_forward_pre_hook(enter),
        _module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for a message of our own."""
    line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


__all__ = ["Trace", "called_by_mode", "called_modules", "calls_watched", "dry_run", "first_line", "run_once"]

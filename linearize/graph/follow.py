"""Follow a run op by op: how the modules that are watched get their inputs."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.graph.capture import on_modules, tensors_of
from linearize.graph.dryrun import calls_watched
from linearize.graph.fakes import FakeRun
from linearize.graph.memory import storage_of
from linearize.graph.op_calls import given_to, numbers_of, op_of, written_of

# They move values or give them another shape or memory, and compute nothing.
_SILENT = frozenset(
    "view _unsafe_view reshape unsqueeze squeeze expand clone contiguous _to_copy to detach alias lift_fresh".split()
)
# Made from another tensor's shape, not from its values.
_SHAPED = frozenset(
    "new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like rand_like randn_like".split()
)


@dataclass(frozen=True)
class Derivation:
    """How one call of a module gets its input: the ops since the watched modules before it."""

    ops: tuple[tuple[Any, ...], ...]
    drawn: bool


class Ways(NamedTuple):
    """What one run shows.

    Attributes:
        inputs: by path of a module, how each of its calls gets its input.
        uses: by path of a module, what reads its outputs, and how often.
        works: by path of a module, the ops inside each of its calls.
        called: paths of all modules that were called.
        overwritten: paths of the watched modules whose input is written after they have run.
    """

    inputs: Mapping[str, list[Derivation]]
    uses: Mapping[str, Counter[str]]
    works: Mapping[str, list[list[tuple[Any, ...]]]]
    called: set[str]
    overwritten: set[str]


@dataclass
class _Done:
    """An op that ran, or the end of a watched module (then `label` is its path)."""

    name: str
    numbers: tuple[complex | str, ...] = ()
    sources: tuple[int, ...] = ()
    noise: bool = False
    label: str = ""


class Follower(TorchDispatchMode):
    """Notes the ops of a run, and how watched modules get their inputs."""

    def __init__(self, model: nn.Module, read: Collection[str], made: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.read, self.made = read, made
        self._clear()

    def _clear(self) -> None:
        self.done: list[_Done] = []
        self.made_by: dict[int, int] = {}
        self.written: dict[int, int] = {}  # by memory, the last op that wrote into a part of it
        self.alive: list[Any] = []  # so that no id is used twice
        self.inside: list[list[tuple[Any, ...]]] = []  # ops of the watched modules that are running, outermost first
        self.draws: list[int] = []
        self.state = _generators()
        self.found: dict[str, list[Derivation]] = {}
        self.uses: dict[str, Counter[str]] = {}
        self.works: dict[str, list[list[tuple[Any, ...]]]] = {}
        self.given: list[tuple[str, Tensor, int]] = []  # what modules were given, and how often it had been written to

    def ways(self, run: FakeRun, **kind: Any) -> Ways:
        """How the watched modules get their inputs in one run, and what reads their outputs."""
        self._clear()
        before = {id(tensor) for tensor in on_modules(self.model)}
        called: set[str] = set()
        with self._watched(), calls_watched(self.model, called, frozenset(), []):
            output = run(around=self, **kind)
        self._used([self._source(tensor) for tensor in tensors_of(output)], "the model's caller")
        kept = [tensor for tensor in on_modules(self.model) if id(tensor) not in before]
        self._used([self._source(tensor) for tensor in kept], "an attribute of a module")
        overwritten = {path for path, value, version in self.given if value._version != version}
        return Ways(self.found, self.uses, self.works, called, overwritten)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        modules = {path: self.model.get_submodule(path) for path in (*self.read, *self.made)}
        hooks = [
            module.register_forward_pre_hook(self._enter(path), with_kwargs=True) for path, module in modules.items()
        ]
        hooks += [module.register_forward_hook(self._leave(path), with_kwargs=True) for path, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._look()
            start = [self._source(tensor) for tensor in tensors_of((args, kwargs))]
            self._used(start, path)
            self.inside.append([])
            if path in self.read:
                self.found.setdefault(path, []).append(self._way(start))

        return note

    def _leave(self, path: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self._look()
            first = [value for value in _tensors((args, kwargs))[:1] if not value.is_inference()]
            self.given += [(path, value, value._version) for value in first]
            self.works.setdefault(path, []).append(self.inside.pop())
            self.done.append(_Done("", label=path))
            self._put(tensors_of(out), len(self.done) - 1)

        return note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = given_to(func, args, kwargs)
        name = op_of(func)
        sources = tuple(self._source(value) for value in _tensors((args, kwargs))) if name not in _SHAPED else ()
        out = func(*args, **kwargs)
        made = _tensors(out)
        position = len(self.done)
        numbers = tuple(numbers_of(func, given))
        self.done.append(done := self._op(func, name, numbers, sources))
        for ops in self.inside if name not in _SILENT and made else ():
            ops.append((name, numbers))
        if done.name and not done.noise and made:  # else it asks for a size or a device
            self._used(sources, done.name)
        written = _tensors(written_of(given))
        self._put([*made, *written], position)
        self.written.update((storage_of(value), position) for value in written)
        return out

    def _op(self, func: Any, name: str, numbers: tuple[complex | str, ...], sources: tuple[int, ...]) -> _Done:
        drawn = torch.Tag.nondeterministic_seeded in func.tags and name != "native_dropout"
        from_noise = [source >= 0 and self.done[source].noise for source in sources]
        if name == "native_dropout":
            return _Done("", sources=sources[:1])
        if name in ("mul", "div") and any(from_noise) and not all(from_noise):
            return _Done("", sources=tuple(s for s, noise in zip(sources, from_noise, strict=True) if not noise))
        constant = [noise or source < 0 for source, noise in zip(sources, from_noise, strict=True)]
        noise = drawn or (any(from_noise) and all(constant))
        return _Done("" if name in _SILENT else name, numbers, sources, noise)

    def _put(self, values: Sequence[Tensor], position: int) -> None:
        for value in values:
            self.made_by[id(value)] = position
            self.alive.append(value)

    def _source(self, value: Tensor) -> int:
        """What made a tensor: the last op that gave it, or that wrote into its memory."""
        made = self.made_by.get(id(value), -1)
        return max(made, self.written.get(storage_of(value), -1)) if self.written else made

    def _used(self, sources: Iterable[int], by: str) -> None:
        """Note what reads outputs of watched modules, outside of such."""
        for source in sources if not self.inside else ():
            position = source
            while position >= 0 and not self.done[position].label:
                done = self.done[position]
                position = done.sources[0] if not done.name and len(set(done.sources)) == 1 else -1
            if position >= 0:
                self.uses.setdefault(self.done[position].label, Counter())[by] += 1

    def _look(self) -> None:
        """Note whether random numbers were drawn since a watched module began or ended."""
        state = _generators()
        if state != self.state:
            self.draws.append(len(self.done))
            self.state = state

    def _way(self, start: list[int]) -> Derivation:
        inside, reached, ahead = set[int](), list[int](), list(start)
        while ahead:
            position = ahead.pop()
            if position < 0 or position in inside:
                continue
            if self.done[position].label:
                reached.append(position)
                continue
            inside.add(position)
            ahead += self.done[position].sources
        number: dict[int, Any] = {-1: -1}
        ops: list[tuple[Any, ...]] = []
        for position in sorted({*inside, *reached}):
            op = self.done[position]
            sources = tuple(number[source] for source in op.sources)
            if op.label:
                number[position] = op.label
            elif not op.name and len(set(sources)) == 1:
                number[position] = sources[0]
            else:
                number[position] = len(ops)
                ops.append((op.name or "view", op.numbers, sources))
        ends = tuple(number[position] for position in start)
        drawn = bool(reached) and any(position > min(reached) for position in self.draws)
        return Derivation((*ops, ("input", (), ends)), drawn)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if type(values) in (tuple, list):
        return [tensor for value in values for tensor in _tensors(value)]
    if type(values) is dict:
        return [tensor for value in values.values() for tensor in _tensors(value)]
    return []


def _generators() -> tuple[Any, ...]:
    """The states of Python's and NumPy's generators."""
    numpy = sys.modules.get("numpy")
    drawn = None
    if numpy is not None:
        _, keys, position, *rest = numpy.random.get_state()
        drawn = (keys.tobytes(), position, *rest)
    return random.getstate(), drawn

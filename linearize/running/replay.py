"""Runs of a model that differ from one before in a late place only: what comes first is replayed, not computed.

A *stage* is an entry of an `nn.ModuleList` or an `nn.Sequential` that a forward calls once, such as a block of a
transformer. A run notes what every stage gives. A later run on the same batch, with other modules in some
places, gets the same values at all stages before the first of these places; so these are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.nest import leaves_of, mapped
from linearize.running.batches import Batch
from linearize.running.outputs import tensors_in

__all__ = ["Replay"]

_ROWS = (nn.ModuleList, nn.Sequential)


class Replay:
    """A model's run on one batch, and further runs that start late.

    Whether replaying gives the very same output is tried on the first batch, by a run in which all stages but the last
    are replayed. If it does not, because stages write what is read elsewhere, all runs are whole ones.

    Args:
        model: in eval mode, and in no other way random. It is left as it was.
        memory: bytes that the values of the stages may take.

    Examples:
        >>> from linearize.running.batches import read_batch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).eval()
        >>> replay, batch = Replay(model), read_batch(model, torch.ones(1, 2))
        >>> with torch.no_grad():
        ...     first = replay.run(batch)
        ...     with replay.before(["2"]):
        ...         again = batch.run(model)
        >>> torch.equal(first, again), replay.stages
        (True, ('0', '1', '2'))
    """

    def __init__(self, model: nn.Module, memory: float = 1e9) -> None:
        self.model, self.memory = model, memory
        self._given: dict[str, Any] = {}
        self._works: bool | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """Paths of the stages, in the order of their calls; none if replaying does not work."""
        return tuple(self._given) if self._works else ()

    def run(self, batch: Batch) -> Any:
        """The model's output on a batch; what the stages give is noted."""
        if self._works is False:
            return batch.run(self.model)
        self._given = {}
        with self._noting():
            output = batch.run(self.model)
        if self._works is None and len(self._given) > 1:
            kept = mapped(output, _copied)
            with self._replaying(list(self._given)[:-1]):
                self._works = _same(kept, batch.run(self.model))
            return kept
        return output

    @contextmanager
    def before(self, paths: Iterable[str]) -> Iterator[None]:
        """Inside, the stages before the first of these places give what they gave in the last run."""
        stages, homes = list(self.stages), set[int]()
        for path in paths:
            homes.add(next((n for n, stage in enumerate(stages) if f"{path}.".startswith(f"{stage}.")), 0))
        with self._replaying(stages[: min(homes, default=0)]):
            yield

    @contextmanager
    def _noting(self) -> Iterator[None]:
        calls: dict[str, int] = {}
        depth, left = 0, self.memory

        def starts(_module: nn.Module, _args: Any) -> None:
            nonlocal depth
            depth += 1

        def ends(path: str, output: Any) -> None:
            nonlocal depth, left
            depth -= 1
            calls[path] = calls.get(path, 0) + 1
            values = [value for _, value in leaves_of(output)]
            left -= sum(value.nbytes for value in values if isinstance(value, Tensor))
            plain = all(isinstance(value, Tensor) or value is None for value in values)
            if calls[path] > 1 or depth or left < 0 or not plain:
                self._given.pop(path, None)
            else:
                self._given[path] = mapped(output, _copied)

        with ExitStack() as stack:
            for path, module in _candidates(self.model):
                stack.callback(module.register_forward_pre_hook(starts).remove)
                stack.callback(module.register_forward_hook(_telling(ends, path)).remove)
            yield
        if left < 0:
            self._given = {}

    @contextmanager
    def _replaying(self, paths: Iterable[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(_answering(self.model.get_submodule(path), self._given[path]))
            yield


def _telling(ends: Callable[[str, Any], None], path: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        ends(path, output)

    return hook


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The entries of all rows of modules that do not lie inside such an entry, each module once."""
    seen, inside = set[int](), set[str]()
    for path, row in model.named_modules():
        if not isinstance(row, _ROWS) or any(path == home or path.startswith(f"{home}.") for home in inside):
            continue
        for name, module in row.named_children():
            place = f"{path}.{name}" if path else name
            inside.add(place)
            if id(module) not in seen:
                seen.add(id(module))
                yield place, module


@contextmanager
def _answering(module: nn.Module, given: Any) -> Iterator[None]:
    """Inside, the module gives a copy of a value, and computes nothing."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return mapped(given, _copied)

    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs have the same floating tensors, bit for bit: all that a loss can see. Caches do not count."""
    first, second = tensors_in(a), tensors_in(b)
    if {name: len(row) for name, row in first.items()} != {name: len(row) for name, row in second.items()}:
        return False
    pairs = [pair for name in first for pair in zip(first[name], second[name], strict=True)]
    return all(x.shape == y.shape and x.dtype == y.dtype and torch.equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)

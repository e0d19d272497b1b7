"""The real loss: the distance between the outputs of a changed model and of the original, on some batches."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.running.batches import count_of, read_batches
from linearize.running.models import evaluating
from linearize.running.outputs import tensors_in
from linearize.running.processes import from_first
from linearize.running.progress import progress_bar
from linearize.running.replay import Replay
from linearize.surgery.specs import replace_module
from linearize.training.divergence import distillation_loss

_log = logging.getLogger(__name__)

_SEEN = 1e-3  # relative difference of outputs that no loss may overlook; less may be rounding
_PREDICTED = 1e-6  # loss

_BEHIND = 1.25  # times the loss of the best so far on the same batches: no further batch is tried

__all__ = ["Yardstick", "check_seen", "losses_with", "losses_with_all", "real_loss", "some_of"]


def some_of(data: Iterable[Any], count: int) -> list[Any]:
    """Some batches, spread over the data."""
    step = max(1, count_of(data) // count)
    return list(itertools.islice(itertools.islice(data, step - 1, None, step), count))


def real_loss(reference: nn.Module, candidate: nn.Module, batches: Iterable[Any]) -> float:
    """Mean distance of a model's output to another's: relative squared error, or divergence of classes."""
    return from_first(lambda: _real_loss(reference, candidate, batches))


def _real_loss(reference: nn.Module, candidate: nn.Module, batches: Iterable[Any]) -> float:
    total, count = 0.0, 0
    with evaluating(reference, candidate):
        for batch in read_batches(reference, batches):
            taught, output = batch.run(reference), batch.run(candidate)
            total += float(distillation_loss(output, taught, batch, 1.0)) * batch.size
            count += batch.size
    return math.inf if math.isnan(total) else total / max(1, count)


class Yardstick:
    """How far models are from one reference, on some batches: the reference runs once, not once for each model.

    Args:
        reference: it stays as it was.
        batches: a few.
        memory: bytes that its outputs may take; beyond, it runs again for each model.

    Examples:
        >>> import torch
        >>> model, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> batches = [torch.randn(4, 2), torch.randn(3, 2)]
        >>> measure = Yardstick(model, batches)
        >>> abs(sum(measure.losses(other)) / real_loss(model, other, batches) - 1) < 1e-4
        True
    """

    def __init__(self, reference: nn.Module, batches: Sequence[Any], memory: float = 1e9) -> None:
        self.reference = reference
        self.batches = list(read_batches(reference, batches))
        self.count = sum(batch.size for batch in self.batches)
        self.outputs: list[Any] = []
        with evaluating(reference):
            for batch in self.batches:
                output = batch.run(reference)
                memory -= bytes_of(output)
                if memory < 0:
                    self.outputs = []
                    return
                self.outputs.append(output)

    def losses(self, candidate: nn.Module, best: Sequence[float] = ()) -> list[float]:
        """What each batch adds to the mean distance of a model's output to the reference's.

        Args:
            candidate: a model.
            best: what another one came to. Where this one falls far behind it, the rest is told as infinite.
        """
        return from_first(lambda: self._losses(candidate, best))

    def _losses(self, candidate: nn.Module, best: Sequence[float]) -> list[float]:
        found: list[float] = []
        with evaluating(self.reference, candidate):
            for index, batch in enumerate(self.batches):
                taught = self.outputs[index] if self.outputs else batch.run(self.reference)
                loss = float(distillation_loss(batch.run(candidate), taught, batch, 1.0))
                found.append(math.inf if math.isnan(loss) else loss * batch.size / max(1, self.count))
                if best and sum(found) > _BEHIND * sum(best[: len(found)]):
                    return [*found, math.inf] if len(found) < len(self.batches) else found
        return found


def bytes_of(output: Any) -> int:
    """Memory of all tensors that an output holds, those in caches and other objects too."""
    total, waiting, seen = 0, [output], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type, str, bytes, int, float)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        else:
            waiting += getattr(value, "__dict__", {}).values()
    return total


def check_seen(reference: nn.Module, candidate: nn.Module, data: Iterable[Any], predicted: float = 0.0) -> None:
    """Check that the loss sees a change: it is not exactly 0 if the output, or the prediction, changed.

    Channels that never matter may go without any loss. But a loss of which nothing was to be seen (classes of which
    there is one, a part of the output that does not depend on what is changed) would let everything go.

    Raises:
        UsageError: the measured loss is 0, and it should not be.
    """
    some = some_of(data, 4)
    if real_loss(reference, candidate, some) != 0:
        return
    apart = _apart(reference, candidate, some)
    if apart > _SEEN:
        found = f"found a measured loss of exactly 0 for a changed model, with outputs that are {apart:.2g} apart"
    elif predicted > _PREDICTED and real_loss(reference, candidate, data) == 0:
        found = f"found a measured loss of exactly 0 for a changed model; {predicted:.2g} was predicted"
    else:
        return
    remedy = 'Pass output= with the parts that count, or what they are, such as output={"logits": "values"}; '
    raise UsageError("output", found, remedy + "or exclude= what the output does not depend on.")


def _apart(reference: nn.Module, candidate: nn.Module, batches: Iterable[Any]) -> float:
    """The largest relative error, RMS, of any floating tensor in the outputs, whether it counts or not."""
    found = 0.0
    with evaluating(reference, candidate):
        for batch in read_batches(reference, batches):
            taught, output = (tensors_in(batch.run(model)) for model in (reference, candidate))
            for name in taught.keys() & output.keys():
                for a, b in zip(taught[name], output[name], strict=False):
                    if a.shape == b.shape and a.numel():
                        error = (b - a).abs().double().square().mean() / a.abs().double().square().mean()
                        found = max(found, float(error.sqrt().nan_to_num(0.0)))
    return found


def losses_with(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any], *, progress: bool = False
) -> dict[str, float]:
    """The real loss of a model with another module in one place, for each of the places; it is left as it was.

    Infinite where the model does not run with it.
    """
    standing = {path: {path: module} for path, module in modules.items()}
    return losses_with_all(model, standing, batches, progress=progress)


def losses_with_all(
    model: nn.Module,
    standing: Mapping[str, Mapping[str, nn.Module]],
    batches: Sequence[Any],
    *,
    progress: bool = False,
) -> dict[str, float]:
    """The real loss of a model with other modules in some places, for each set of these by its name; as `losses_with`.

    Of the modules of a set, none lies inside another.
    """
    return from_first(lambda: _losses_with(model, standing, batches, progress=progress))


def _losses_with(
    model: nn.Module, standing: Mapping[str, Mapping[str, nn.Module]], batches: Sequence[Any], *, progress: bool
) -> dict[str, float]:
    totals, count = dict.fromkeys(standing, 0.0), 0
    places = {path: model.get_submodule(path) for modules in standing.values() for path in modules}
    with (
        evaluating(model, *(module for modules in standing.values() for module in modules.values())),
        progress_bar("modules", len(batches) * len(standing), enabled=progress) as advance,
    ):
        replay = Replay(model)
        for batch in read_batches(model, batches):
            taught = replay.run(batch)
            for name, modules in standing.items():
                try:
                    for path, module in modules.items():
                        replace_module(model, path, module)
                    with replay.before(modules):
                        output = batch.run(model)
                    totals[name] += float(distillation_loss(output, taught, batch, 1.0)) * batch.size
                except Exception as error:  # the code around it wants something that only the original module has
                    _log.debug("%s cannot be replaced: %s", name, error)
                    totals[name] = float("inf")
                finally:
                    for path in modules:
                        replace_module(model, path, places[path])
                advance(name)
            count += batch.size
    return {name: total / max(1, count) for name, total in totals.items()}

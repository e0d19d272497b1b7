"""The real loss: how far a changed model's output is from the original's, on some batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from linearize.running.batches import count_of, read_batches
from linearize.running.models import evaluating
from linearize.running.progress import progress_bar
from linearize.surgery.specs import replace_module
from linearize.training.divergence import distillation_loss

__all__ = ["losses_with", "real_loss", "some_of"]


def some_of(data: Iterable[Any], count: int) -> list[Any]:
    """Some batches, spread over the data."""
    step = max(1, count_of(data) // count)
    return list(itertools.islice(itertools.islice(data, step - 1, None, step), count))


def real_loss(reference: nn.Module, candidate: nn.Module, batches: Iterable[Any]) -> float:
    """Mean distance of a model's output to another's: relative squared error, or divergence of classes."""
    total, count = 0.0, 0
    with evaluating(reference, candidate):
        for batch in read_batches(reference, batches):
            taught, output = batch.run(reference), batch.run(candidate)
            total += float(distillation_loss(output, taught, batch, 1.0)) * batch.size
            count += batch.size
    return total / max(1, count)


def losses_with(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any], *, progress: bool = False
) -> dict[str, float]:
    """The real loss of a model with another module in one place, for each of the places; it is left as it was.

    Infinite where the model does not run with it.
    """
    totals, count = dict.fromkeys(modules, 0.0), 0
    places = {path: model.get_submodule(path) for path in modules}
    with (
        evaluating(model, *modules.values()),
        progress_bar("modules", len(batches) * len(modules), enabled=progress) as advance,
    ):
        for batch in read_batches(model, batches):
            taught = batch.run(model)
            for path, module in modules.items():
                try:
                    replace_module(model, path, module)
                    output = batch.run(model)
                    totals[path] += float(distillation_loss(output, taught, batch, 1.0)) * batch.size
                except Exception:  # the code around it wants something of the module that only the original has
                    totals[path] = float("inf")
                finally:
                    replace_module(model, path, places[path])
                advance(path)
            count += batch.size
    return {path: total / max(1, count) for path, total in totals.items()}

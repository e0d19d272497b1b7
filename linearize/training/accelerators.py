"""The accelerator of a run, the user's own or one for the run alone, and what one of several processes does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from linearize.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["accelerator_for", "accumulation", "mean_over_processes", "on_main", "tell_of_whole_data"]

Thing = TypeVar("Thing")


@contextmanager
def accelerator_for(given: Accelerator | None, mixed_precision: str | None) -> Iterator[Accelerator]:
    """The accelerator that was passed, or a new one, after which accelerate's own state is as it was before.

    Args:
        given: the user's.
        mixed_precision: None leaves it to the user's accelerator, to one that the user has made before, or to
            accelerate's launcher.

    Raises:
        UsageError: accelerate is not installed, the precision is not that of the user's accelerator, or the device
            does not know it.
    """
    if given is not None:
        if mixed_precision is not None and given.mixed_precision != mixed_precision:
            found = f"found {mixed_precision!r}, and an accelerator with {given.mixed_precision!r}"
            raise UsageError("mixed_precision", found, "Leave mixed_precision out: the accelerator's is used.")
        yield given
        return
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
    except ImportError as error:
        raise UsageError("finetune", "found no accelerate", "Run: pip install 'linearize[train]'") from error
    # accelerate has one state for a process: a new accelerator must not change that of another one of the user's.
    states = (AcceleratorState._shared_state, GradientState._shared_state)
    before = [dict(state) for state in states]
    try:
        if mixed_precision is not None and states[0] and AcceleratorState().mixed_precision != mixed_precision:
            states[0].clear()
        try:
            made = Accelerator(mixed_precision=mixed_precision)
        except ValueError as error:  # fp16 on a CPU, for one
            raise UsageError("finetune", f"accelerate says: {error}", "Pass another mixed_precision.") from error
        yield made
    finally:
        for state, old in zip(states, before, strict=True):
            state.clear()
            state.update(old)


def accumulation(accelerator: Accelerator, given: int | None) -> int:
    """How many batches a step of the optimizer takes: as asked for, or as the accelerator says.

    Raises:
        UsageError: the two differ.
    """
    own = int(accelerator.gradient_accumulation_steps)
    if given is not None and own not in (1, given):
        found = f"found {given}, and an accelerator with gradient_accumulation_steps={own}"
        raise UsageError("accumulate", found, "Leave accumulate out: the accelerator's is used.")
    return own if given is None else given


def on_main(accelerator: Accelerator, call: Callable[[], Thing]) -> Thing:
    """What a function gives in the main process, in all of them; if it fails there, all of them stop.

    Raises:
        TrainingError: it has failed in the main process, and this is another one.
    """
    if accelerator.num_processes == 1:
        return call()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = call()
        except Exception as error:
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise TrainingError("finetune", f"the main process stopped ({outcome[1]})", "See its own message.")
    found: Thing = outcome[0]
    return found


def mean_over_processes(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    """The means of numbers over all processes; each has the same names."""
    if accelerator.num_processes == 1:
        return values
    together = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    means = accelerator.reduce(together, "mean")
    return dict(zip(values, means.tolist(), strict=True))


def tell_of_whole_data(data: Any, accelerator: Accelerator) -> None:
    """Warn of a loader that gives each of several processes all of the data."""
    if accelerator.num_processes == 1 or not isinstance(data, DataLoader):
        return
    from accelerate.data_loader import DataLoaderAdapter

    samplers = (data.sampler, getattr(data.batch_sampler, "sampler", None))
    if not isinstance(data, DataLoaderAdapter) and not any(isinstance(each, DistributedSampler) for each in samplers):
        text = (
            f"each of {accelerator.num_processes} processes gets all of the data. Pass accelerator.prepare(loader), or "
            "a loader with a DistributedSampler."
        )
        warnings.warn(text, stacklevel=3)

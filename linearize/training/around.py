"""What stands around the steps of a run: the model as it is called, who is told, and all put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linearize.running.devices import bring
from linearize.running.progress import progress_bar
from linearize.tensors import same_values
from linearize.training.loop import TrainingRun
from linearize.training.losses import Evaluate, scores_of

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["judged", "prepared", "tell_of_epoch", "teller", "wrapped"]


@contextmanager
def prepared(run: TrainingRun, total: int, *, progress: bool) -> Iterator[Callable[[str], None]]:
    """Model and teacher as training needs them, afterwards as they were; gives what moves the bar."""
    teacher, inside = run.objective.teacher, run.objective.features
    with (
        _modes_kept(run.model, teacher),
        same_values(*(m for m in (teacher,) if m is not None)),
        nullcontext() if inside is None else inside.watching(),
        progress_bar("fine-tune", total, enabled=progress and run.accelerator.is_main_process) as advance,
    ):
        if teacher is not None:
            bring(teacher, run.accelerator.device)
            teacher.eval()
        yield advance


def wrapped(model: nn.Module, accelerator: Accelerator, torch_compile: bool | Mapping[str, Any]) -> nn.Module:  # noqa: FBT001
    """The model as it is called in training: spread over processes, compiled."""
    called: nn.Module = accelerator.prepare_model(model) if accelerator.num_processes > 1 else model
    if torch_compile is False:
        return called
    compiled: Any = torch.compile(called, **(torch_compile if isinstance(torch_compile, Mapping) else {}))
    return compiled  # type: ignore[no-any-return]


def teller(
    accelerator: Accelerator, on_step: Callable[[dict[str, float]], None] | None
) -> Callable[[dict[str, float]], None] | None:
    """What is told of each step, to trackers and to the user; None if nobody listens."""
    if on_step is None and not accelerator.trackers:
        return None

    def tell(record: dict[str, float]) -> None:
        if accelerator.is_main_process:
            accelerator.log({name: value for name, value in record.items() if name != "step"}, step=int(record["step"]))
            if on_step is not None:
                on_step(record)

    return tell


def judged(run: TrainingRun, record: dict[str, float], evaluate: Evaluate | None) -> dict[str, float]:
    """The record of an epoch with the share of linear channels and what the evaluation says."""
    record = record | {"share": run.share}
    if evaluate is None:
        return record
    with run.accelerator.autocast():
        return record | scores_of(run.model, evaluate)


def tell_of_epoch(run: TrainingRun, on_epoch: Callable[[dict[str, float]], None] | None) -> None:
    """Tell trackers and the user of the epoch that is over."""
    record = run.history[-1]
    if run.accelerator.trackers:
        run.accelerator.log({f"epoch/{name}": value for name, value in record.items()}, step=run.step)
    if on_epoch is not None:
        on_epoch(record)


@contextmanager
def _modes_kept(*models: nn.Module | None) -> Iterator[None]:
    """Afterwards every module is in the mode (train or eval) it was in."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

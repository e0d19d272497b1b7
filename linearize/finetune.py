"""Fine-tuning of gated (or any) models: task loss, prior and distillation, with checkpoints that resume bitwise."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from linearize import checks
from linearize.errors import DataError, UsageError
from linearize.graph.state import same_modes
from linearize.running.batches import length_of
from linearize.running.devices import bring
from linearize.running.order import set_epoch
from linearize.running.outputs import OutputChoice, OutputMeaning
from linearize.running.randomness import seed_everything
from linearize.training.accelerators import accelerator_for, accumulation, on_main, tell_of_whole_data
from linearize.training.arguments import check_numbers, check_training
from linearize.training.around import judged, prepared, tell_of_epoch, teller, wrapped
from linearize.training.features import Features
from linearize.training.kept import checkpoints_in
from linearize.training.loop import TrainingRun
from linearize.training.losses import Evaluate
from linearize.training.objective import Loss, Objective, Prior
from linearize.training.priors import param_groups

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FinetuneResult", "finetune"]

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class FinetuneResult:
    """The result of `finetune`.

    Attributes:
        model: the model that was passed in, trained.
        history: a record per epoch: "epoch", "loss" and its parts "task", "prior", "distill" and "features" (means
            over the epoch), "share" (of linear channels), "lr", "seconds", and the results of the evaluation.
        steps: optimizer steps of the whole run, including those before it was resumed.
        resumed_from: the number of epochs that were already done when the run was resumed; 0 for a new run.
    """

    model: nn.Module
    history: list[dict[str, float]]
    steps: int
    resumed_from: int = 0


@same_modes()
def finetune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 1,
    loss: Loss | None = None,
    prior: Prior | None = None,
    teacher: nn.Module | None = None,
    distill_weight: float = 0.5,
    temperature: float = 2.0,
    features: str | Sequence[str] | None = None,
    feature_weight: float = 1.0,
    output: OutputChoice = None,
    evaluate: Evaluate | None = None,
    lr: float = 1e-3,
    gate_lr: float = 1e-2,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip: float | None = 1.0,
    mixed_precision: Precision | None = None,
    accumulate: int | None = None,
    keep_norms: bool = False,
    torch_compile: bool | Mapping[str, Any] = False,
    steps_per_epoch: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    keep: int = 2,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = True,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    accelerator: Accelerator | None = None,
) -> FinetuneResult:
    """Train `model` in place with AdamW, a warm-up and a cosine schedule, on the device that accelerate chooses.

    Args:
        model: with gates or without. It ends on accelerate's device, in its own mode (train or eval).
        data: batches, iterated once per epoch: tensors, tuples (inputs, labels) or dicts of keyword arguments. If the
            data or its sampler has `set_epoch`, this is called before each epoch, and once more at the end.
        epochs: number of passes over the data.
        loss: a function of (the model's output, the labels or None) that gives a scalar. By default the output's own
            `loss`. Otherwise it depends on the labels: cross entropy for classes (whole numbers, or rows that sum to
            1), binary cross entropy for zeros and ones of the output's shape, else the relative squared error.
        prior: added to the loss. Its `step` is called after each optimizer step. Without one, gates are not trained.
        teacher: a model to imitate, usually the original. It runs in eval mode and is not changed.
        distill_weight: w in [0, 1], where the loss is (1 - w) * task + w * distillation; 1 needs no labels.
        temperature: softens the logits that are distilled.
        features: glob patterns of modules, such as "blocks.*". Their outputs are compared with those of the teacher's
            modules of the same names.
        feature_weight: factor of that term, the squared error relative to the teacher's mean square.
        output: the parts of the output that the teacher's are compared with, such as "logits" or ["boxes*"], or a dict
            of these with weights, or with kinds ("classes", "multilabel", "values"); None takes all, equally weighted.
        evaluate: after each epoch, in the main process: a function of the model that gives a number or a dict of
            numbers, or batches on which `evaluate_batches` runs.
        lr: learning rate of everything except the gates, at the end of the warm-up.
        gate_lr: learning rate of the gates' alpha.
        weight_decay: of parameters with two or more dimensions; see `param_groups`.
        warmup: share of all steps over which the learning rate rises; then it falls to 0 along a cosine.
        clip: largest norm of the gradients of everything except the gates, above 0; None does not clip.
        mixed_precision: "no", "bf16" or "fp16", by autocast; the gates' alpha stays float32. None leaves it to
            `accelerator`, or to accelerate: what its launcher or an accelerator of yours has set, else "no".
        accumulate: batches whose gradients make one step of the optimizer, each in equal parts; fewer at the end of an
            epoch. The prior counts once for them. None takes the accelerator's `gradient_accumulation_steps`.
        keep_norms: batch norms use and keep the statistics they have, and learn scale and shift only: what few or small
            batches need.
        torch_compile: train the model compiled; or options of `torch.compile`. It is not compiled afterwards.
        steps_per_epoch: ends each epoch early; needed if the data has no length.
        checkpoint_dir: folder that gets a checkpoint after each epoch. A checkpoint is complete or not there. No
            other process can use the folder during the run.
        keep: how many of the latest checkpoints are kept.
        resume: continue from the latest checkpoint in `checkpoint_dir`, if there is one. On a CPU the weights at the
            end are bitwise those of a run that was never interrupted. A damaged checkpoint is skipped with a line in
            the log, and its epoch is trained again.
        seed: if given, all global random generators are seeded with it at the start.
        progress: show a bar, if standard error is a terminal.
        on_step: called in the main process with the record of each optimizer step: "step", "loss" and its parts there,
            "lr" and "share".
        on_epoch: called in the main process with the record of each epoch.
        accelerator: your own; by default one is made for this run alone. Its trackers get every record, those of epochs
            with "epoch/" before each name.

    Returns:
        The model and the history of its training.

    Raises:
        UsageError: an argument is out of range, or the prior's schedule does not fit the number of steps.
        DataError: no batches, fewer than announced, or labels missing.
        TrainingError: the loss is not a finite scalar (the weights are then those before this step), or a checkpoint
            belongs to another run.
        CheckpointError: a checkpoint cannot be written or read.

    Examples:
        >>> x = torch.randn(64, 4)
        >>> batches = [(x, (x[:, 0] > 0).long())] * 20
        >>> result = finetune(nn.Linear(4, 2), batches, epochs=2, lr=0.1)
        >>> result.history[1]["loss"] < result.history[0]["loss"]
        True
    """
    check_training(
        model, data, loss=loss, prior=prior, teacher=teacher, evaluate=evaluate, on_epoch=on_epoch,
        on_step=on_step, torch_compile=torch_compile, accelerator=accelerator, features=features,
    )  # fmt: skip
    check_numbers(
        epochs=epochs, distill_weight=distill_weight, temperature=temperature, feature_weight=feature_weight, lr=lr,
        gate_lr=gate_lr, weight_decay=weight_decay, warmup=warmup, clip=clip, mixed_precision=mixed_precision,
        accumulate=accumulate, keep_norms=keep_norms, steps_per_epoch=steps_per_epoch, keep=keep, resume=resume,
        seed=seed, progress=progress,
    )  # fmt: skip
    options: dict[str, Any] = {
        "epochs": epochs, "lr": lr, "gate_lr": gate_lr, "weight_decay": weight_decay, "warmup": warmup, "clip": clip,
        "distill_weight": distill_weight, "temperature": temperature,
    }  # fmt: skip
    inside = None if features is None or teacher is None else Features(model, teacher, features)
    for name, value in {
        "output": output,
        "torch_compile": torch_compile or None,
        "keep_norms": keep_norms or None,
    }.items():
        options |= {} if value is None else {name: repr(value)}
    if inside is not None:
        options |= {"features": list(inside.paths), "feature_weight": feature_weight}
    length = _length(data, steps_per_epoch)
    objective = Objective(loss, teacher, distill_weight, temperature, prior, inside, feature_weight)
    with accelerator_for(accelerator, mixed_precision) as chosen:
        together = accumulation(chosen, accumulate)
        steps = math.ceil(length / together)
        _check_prior(prior, model, epochs * steps)
        tell_of_whole_data(data, chosen)
        options |= {"steps per epoch": steps, "mixed_precision": str(chosen.mixed_precision)}
        options |= {"accumulate": together} if together > 1 else {}
        options = {name: checks.plain_number(value) for name, value in options.items()}
        with checkpoints_in(checkpoint_dir, options, keep=keep, resume=resume, main=chosen.is_main_process) as kept:
            if seed is not None:
                seed_everything(seed)
            groups = param_groups(model, lr, gate_lr, weight_decay)
            groups = [group for group in groups if prior is not None or group["name"] != "gates"]
            bring(model, chosen.device)
            run = TrainingRun(
                model=model,
                wrapped=wrapped(model, chosen, torch_compile),
                optimizer=chosen.prepare_optimizer(torch.optim.AdamW(groups)),
                accelerator=chosen,
                objective=objective,
                total=epochs * steps,
                warmup=round(warmup * epochs * steps),
                clip=clip,
                meaning=OutputMeaning.of(model, output),
                accumulate=together,
                keep_norms=keep_norms,
                on_step=teller(chosen, on_step),
            )
            kept.restore(lambda state: run.load_state_dict(state, data))
            done = len(run.history)
            with prepared(run, epochs * length, progress=progress) as advance:
                for _ in range(done * length):
                    advance("")
                while len(run.history) < epochs:
                    record = run.epoch(data, length, advance)
                    run.history.append(on_main(chosen, partial(judged, run, record, evaluate)))
                    if checkpoint_dir is not None:
                        chosen.wait_for_everyone()
                        if chosen.is_main_process:
                            kept.write(run.state_dict(data), len(run.history))
                    on_main(chosen, partial(tell_of_epoch, run, on_epoch))
        set_epoch(data, epochs)  # where a run that was not interrupted leaves it
    model.zero_grad()  # leave no gradients behind: they take as much memory as the weights
    return FinetuneResult(model, run.history, run.step, done)


def _check_prior(prior: Prior | None, model: nn.Module, total: int) -> None:
    if prior is None:
        return
    if not set(prior.gates) <= set(model.modules()):
        raise UsageError("finetune", "found a prior on gates of another model", "Make the prior for this model.")
    decides = prior if prior.competition is None else prior.competition
    steps = int(getattr(decides, "steps", 0))
    if prior.steps_taken + total < steps:
        found = f"found a prior that reaches its target at step {steps}, but {total} steps of training"
        raise UsageError("finetune", found, f"Make the prior with steps={total} or fewer, or train longer.")


def _length(data: Iterable[Any], steps_per_epoch: int | None) -> int:
    if steps_per_epoch is not None:
        return steps_per_epoch
    length = length_of(data)
    if length is None:
        raise UsageError("finetune", "found data without a length", "Pass steps_per_epoch=.")
    if not length:
        raise DataError("data", "found no batches", "Pass at least one.")
    return length

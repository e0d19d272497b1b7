"""Fine-tuning of gated (or any) models: task loss, prior and distillation, with checkpoints that resume bitwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from linearize import checks
from linearize.errors import DataError, UsageError
from linearize.graph.state import same_modes
from linearize.running.batches import length_of
from linearize.running.devices import bring
from linearize.running.order import set_epoch
from linearize.running.outputs import Choice, Meaning
from linearize.running.progress import progress_bar
from linearize.running.randomness import seed_everything
from linearize.training.arguments import check_numbers, check_training
from linearize.training.features import Features
from linearize.training.kept import checkpoints_in
from linearize.training.losses import Evaluate, scores_of
from linearize.training.path import PlannedPath
from linearize.training.priors import SparsityPrior, param_groups
from linearize.training.run import Loss, Objective, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FinetuneResult", "finetune"]

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did.

    Attributes:
        model: the model that was passed in, trained.
        history: a record per epoch: "epoch", "loss" and its parts "task", "prior", "distill" and "features" (means
            over the epoch), "share" (of linear channels), "lr", "seconds", and what the evaluation gave.
        steps: optimizer steps of the whole run, those before a resumption included.
        resumed_from: the epoch that a resumed run started from, else 0.
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
    prior: SparsityPrior | PlannedPath | None = None,
    teacher: nn.Module | None = None,
    distill_weight: float = 0.5,
    temperature: float = 2.0,
    features: str | Sequence[str] | None = None,
    feature_weight: float = 1.0,
    output: Choice = None,
    evaluate: Evaluate | None = None,
    lr: float = 1e-3,
    gate_lr: float = 1e-2,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip: float | None = 1.0,
    mixed_precision: Precision = "no",
    steps_per_epoch: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    keep: int = 2,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    accelerator: Accelerator | None = None,
) -> FinetuneResult:
    """Train `model` in place with AdamW, warm-up and a cosine, on the device that accelerate chooses.

    Args:
        model: with gates or without. It ends on accelerate's device, in the mode (train or eval) it was in.
        data: batches, iterated once per epoch: tensors, tuples (inputs, labels) or dicts of keyword arguments. If it,
            or a sampler of it, has `set_epoch`, that is called before each epoch, and once more at the end.
        epochs: passes over the data.
        loss: a function of (the model's output, the labels or None) that gives a scalar. By default the output's own
            `loss`, or by what the labels are: cross entropy for classes (whole numbers, or rows that sum to 1), binary
            cross entropy for zeros and ones of the output's shape, else the relative squared error.
        prior: added to the loss; its `step` follows each optimizer step. Without one, gates are not trained.
        teacher: the model to imitate, for instance the original; it is used in eval mode and not changed.
        distill_weight: share in [0, 1] of the distillation in (task loss, distillation); 1 needs no labels.
        temperature: of the distillation of logits.
        features: glob patterns of modules, such as "blocks.*", whose outputs are to be like those of the teacher's
            modules of the same names.
        feature_weight: of that in the loss: times the squared error, relative to the teacher's mean square.
        output: the parts of the output that the teacher's are compared with, such as "logits" or ["boxes*"], or a dict
            of these with weights, or with kinds ("classes", "multilabel", "values"); None takes all, in equal shares.
        evaluate: after each epoch: a function of the model that gives a number or a dict of numbers, or batches
            on which `evaluate_batches` runs.
        lr: learning rate of all but the gates, at the end of the warm-up.
        gate_lr: learning rate of the gates' alpha.
        weight_decay: for parameters of two and more dimensions; see `param_groups`.
        warmup: share of all steps over which the learning rate rises; then it falls to 0 along a cosine.
        clip: largest norm of the gradients of all but the gates, above 0; None does not clip.
        mixed_precision: "no", "bf16" or "fp16", by autocast; the gates' alpha stays float32.
        steps_per_epoch: ends each epoch early; needed if the data has no length.
        checkpoint_dir: folder that gets a checkpoint after each epoch, complete or not at all. It is this run's alone
            while the run goes on.
        keep: how many checkpoints stay there, the latest.
        resume: continue from the latest checkpoint in `checkpoint_dir`, if there is one. On a CPU the weights at the
            end are bitwise those of a run that was never interrupted. A damaged checkpoint is left out, with a line in
            the log, and its epoch is done again.
        seed: if given, seeds every global random generator at the start.
        progress: show a bar, if standard error is a terminal.
        on_epoch: called with the record of each epoch.
        accelerator: your own; by default one is made with `mixed_precision`.

    Returns:
        The model and the history of its training.

    Raises:
        UsageError: an argument is out of range, or the prior's schedule does not fit the number of steps.
        DataError: no batches, fewer than announced, or labels missing.
        TrainingError: the loss is no scalar, or not finite (the weights are those of the step before); a checkpoint
            of another run.
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
        accelerator=accelerator, features=features,
    )  # fmt: skip
    check_numbers(
        epochs=epochs, distill_weight=distill_weight, temperature=temperature, feature_weight=feature_weight, lr=lr,
        gate_lr=gate_lr, weight_decay=weight_decay, warmup=warmup, clip=clip, mixed_precision=mixed_precision,
        steps_per_epoch=steps_per_epoch, keep=keep, resume=resume, seed=seed, progress=progress,
    )  # fmt: skip
    length = _length(data, steps_per_epoch)
    options: dict[str, Any] = {
        "epochs": epochs, "steps per epoch": length, "lr": lr, "gate_lr": gate_lr, "weight_decay": weight_decay,
        "warmup": warmup, "clip": clip, "distill_weight": distill_weight, "temperature": temperature,
        "mixed_precision": mixed_precision,
    }  # fmt: skip
    options = {name: checks.plain(value) for name, value in options.items()}
    inside = None if features is None or teacher is None else Features(model, teacher, features)
    if output is not None:
        options |= {"output": repr(output)}
    if inside is not None:
        options |= {"features": list(inside.paths), "feature_weight": checks.plain(feature_weight)}
    _check_prior(prior, model, epochs * length)
    accelerator = accelerator or _accelerator(mixed_precision)
    main = accelerator.is_main_process
    with checkpoints_in(checkpoint_dir, options, keep=keep, resume=resume, main=main) as kept:
        if seed is not None:
            seed_everything(seed)
        groups = param_groups(model, lr, gate_lr, weight_decay)
        groups = [group for group in groups if prior is not None or group["name"] != "gates"]
        bring(model, accelerator.device)
        run = Run(
            model=model,
            wrapped=accelerator.prepare_model(model) if accelerator.num_processes > 1 else model,
            optimizer=accelerator.prepare_optimizer(torch.optim.AdamW(groups)),
            accelerator=accelerator,
            objective=Objective(loss, teacher, distill_weight, temperature, prior, inside, feature_weight),
            total=epochs * length,
            warmup=round(warmup * epochs * length),
            clip=clip,
            meaning=Meaning.of(model, output),
        )
        kept.restore(lambda state: run.load_state_dict(state, data))
        done = len(run.history)
        watching = nullcontext() if inside is None else inside.watching()
        with _modes_kept(model, teacher), watching, progress_bar("fine-tune", run.total, enabled=progress) as advance:
            for _ in range(run.step):
                advance("")
            if teacher is not None:
                bring(teacher, accelerator.device)
                teacher.eval()
            while len(run.history) < epochs:
                record = run.epoch(data, length, advance)
                record |= {"share": run.share} | _evaluated(run, evaluate)
                run.history.append(record)
                if checkpoint_dir is not None:
                    accelerator.wait_for_everyone()
                    if main:
                        kept.write(run.state_dict(data), len(run.history))
                if on_epoch is not None:
                    on_epoch(record)
        set_epoch(data, epochs)  # where a run that was not interrupted leaves it
    model.zero_grad()  # leave no gradients behind: they take as much memory as the weights
    return FinetuneResult(model, run.history, run.step, done)


def _evaluated(run: Run, evaluate: Evaluate | None) -> dict[str, float]:
    if evaluate is None:
        return {}
    with run.accelerator.autocast():
        return scores_of(run.model, evaluate)


def _check_prior(prior: SparsityPrior | PlannedPath | None, model: nn.Module, total: int) -> None:
    if prior is None:
        return
    if not set(prior.gates) <= set(model.modules()):
        raise UsageError("finetune", "found a prior on gates of another model", "Make the prior for this model.")
    competes = prior.competition.steps if prior.competition is not None else 0
    steps = prior.steps if isinstance(prior, PlannedPath) else competes
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


def _accelerator(mixed_precision: Precision) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UsageError("finetune", "found no accelerate", "Run: pip install 'linearize[train]'") from error
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        # accelerate remembers the precision of the first run in a process, and refuses any other.
        AcceleratorState._reset_state()
    try:
        return Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:  # fp16 on a CPU, for one
        raise UsageError("finetune", f"accelerate says: {error}", "Pass another mixed_precision.") from error


@contextmanager
def _modes_kept(*models: nn.Module | None) -> Iterator[None]:
    """Afterwards every module is in the mode (train or eval) it was in."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""What fine-tuning minimises when the user names nothing else: a task loss, and distillation from a teacher.

Shape letters: B samples, T positions, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from linearize.errors import DataError, TrainingError
from linearize.running.batches import Batch, read_batch, to_device
from linearize.running.models import device_of, evaluating

__all__ = [
    "IGNORED",
    "counted",
    "distillation_loss",
    "evaluate_batches",
    "has_loss",
    "is_logits",
    "main_output",
    "relative_error",
    "task_loss",
    "without_padding",
]

IGNORED = -100  # the label of positions that count for nothing, in PyTorch and transformers alike


def main_output(output: Any) -> Tensor:
    """The tensor that matters of what a model returned: the logits, else the first floating tensor with axes.

    Raises:
        TrainingError: there is no such tensor.

    Example:
        >>> import torch
        >>> main_output({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        values = [output["logits"]] if "logits" in output else list(output.values())
    elif isinstance(output, tuple | list):
        values = list(output)
    else:
        values = [output.logits] if hasattr(output, "logits") else list(getattr(output, "__dict__", {}).values())
    for value in values:
        if isinstance(value, Tensor) and value.dim() and value.is_floating_point():
            return value
    found = f"found no tensor in an output of type {type(output).__name__}"
    raise TrainingError("finetune", found, "Pass loss=, a function of (output, labels).")


def task_loss(output: Any, labels: Any) -> Tensor:
    """The output's own `loss` if it has one, else the cross entropy of its logits (..., K) and labels (...).

    Raises:
        DataError: there are no labels, or they do not fit.
    """
    if has_loss(output):
        own: Tensor = output["loss"] if isinstance(output, Mapping) else output.loss
        return own
    if labels is None:
        remedy = "Yield (inputs, labels) or a dict with 'labels'; or pass loss=, or teacher= with distill_weight=1."
        raise DataError("data", "found no labels in a batch", remedy)
    logits = main_output(output)
    if not isinstance(labels, Tensor) or not (logits.dim() > 1 and labels.shape in {logits.shape, logits.shape[:-1]}):
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        found = f"found labels {shape} for an output {tuple(logits.shape)}"
        raise DataError("data", found, "Pass loss=, a function of (output, labels).")
    if labels.shape == logits.shape:  # probabilities of the classes, as mixup makes them
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(0, -2).float())
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


def has_loss(output: Any) -> bool:
    """Whether a model's output holds a loss of its own, as that of transformers does if it is given labels."""
    return isinstance(output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None), Tensor)


def distillation_loss(output: Any, taught: Any, batch: Batch, temperature: float = 2.0) -> Tensor:
    """How far a model's output is from its teacher's, padding left out.

    Logits (the output has some by name, or the labels are class indices): `temperature ** 2` times the
    Kullback-Leibler divergence of the softened distributions (Hinton, Vinyals and Dean, 2015), mean over positions.
    Anything else: mean squared error, relative to the mean square of the teacher's output, so that its unit does not
    matter.
    """
    student, teacher = main_output(output).float(), main_output(taught).float()
    if student.shape != teacher.shape:
        found = f"found an output {tuple(student.shape)} and a teacher's output {tuple(teacher.shape)}"
        raise TrainingError("finetune", found, "Pass a teacher with the model's outputs.")
    student, teacher = without_padding(student, teacher, batch)
    if is_logits(output, batch.labels):
        log_p, log_q = (F.log_softmax(z / temperature, -1) for z in (teacher, student))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2
    return relative_error(student, teacher)


def without_padding(student: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """What a model and its teacher gave at the positions that count."""
    keep = counted(student, batch)
    return (student, teacher) if keep is None else (student[keep], teacher[keep])


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the mean square of the teacher's."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp(min=1e-12)


def evaluate_batches(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Mean loss over batches ("eval_loss") and, for class labels, the share of hits ("accuracy"), in eval mode.

    Raises:
        DataError: there are no batches, or no labels.

    Example:
        >>> import torch
        >>> sorted(evaluate_batches(nn.Linear(2, 2), [(torch.zeros(3, 2), torch.tensor([0, 1, 0]))]))
        ['accuracy', 'eval_loss']
    """
    losses, counts, hits, seen = 0.0, 0, 0, 0
    device = device_of(model)
    with evaluating(model):
        for raw in batches:
            batch = read_batch(model, to_device(raw, device))
            output = model(*batch.args, **batch.kwargs)
            if batch.labels is None and not has_loss(output):
                remedy = "Yield (inputs, labels) or a dict with 'labels', or pass a function of the model."
                raise DataError("evaluate", "found no labels in a batch", remedy)
            losses += float(task_loss(output, batch.labels)) * batch.size
            counts += batch.size
            logits, labels = main_output(output), batch.labels
            if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.shape == logits.shape[:-1]:
                counted = labels != IGNORED
                hits += int(((logits.argmax(-1) == labels) & counted).sum())
                seen += int(counted.sum())
    if not counts:
        raise DataError("evaluate", "found no batches", "Pass at least one.")
    return {"eval_loss": losses / counts} | ({"accuracy": hits / seen} if seen else {})


def is_logits(output: Any, labels: Any) -> bool:
    """Whether the main output holds logits: it is called so, or the labels are class indices."""
    if hasattr(output, "logits") or (isinstance(output, Mapping) and "logits" in output):
        return True
    return isinstance(labels, Tensor) and not labels.is_floating_point()


def counted(output: Tensor, batch: Batch) -> Tensor | None:
    """Bool (B, T): positions of an output (B, T, ...) that are not padding; None if all count."""
    for mask in (batch.labels, batch.kwargs.get("attention_mask")):
        if isinstance(mask, Tensor) and mask.dim() == 2 and output.dim() > 2 and output.shape[:2] == mask.shape:
            return mask != IGNORED if mask is batch.labels else mask.bool()
    return None

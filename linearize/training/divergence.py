"""The distance between two outputs of a model. Everything in this package uses this metric.

Every part of an output is measured by its kind (`linearize.running.outputs`). Distillation, sensitivities, measured
losses and the search for a plan all use this distance, or its second derivative (`linearize.training.probes`).

Shape letters: B samples, T positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everywhere

from linearize.errors import TrainingError
from linearize.running.batches import IGNORED, Batch
from linearize.running.outputs import OutputPart
from linearize.running.targets import OutputKind

__all__ = ["counted", "distances", "distillation_loss", "relative_error"]

_LOWEST = -1e30  # in place of minus infinity, of which no difference can be taken


def distillation_loss(output: Any, taught: Any, batch: Batch, temperature: float = 2.0) -> Tensor:
    """The distance between a model's output and its teacher's: the weighted mean over parts, without padding.

    Classes: `temperature ** 2` times the Kullback-Leibler divergence of the softened distributions (Hinton, Vinyals and
    Dean, 2015), mean over positions. Multi-label: the same of each yes or no, mean over all of them. Values: mean
    squared error relative to the mean square of the teacher's, so that its unit does not matter.

    Raises:
        TrainingError: the outputs have other parts, or parts of other shapes.
    """
    terms = distances(output, taught, batch, temperature)
    if not terms:
        return batch.meaning.parts(taught)[0].tensor.new_zeros(())
    total = sum(weight for weight, _ in terms.values())
    return torch.stack([value * (weight / total) for weight, value in terms.values()]).sum()


def distances(output: Any, taught: Any, batch: Batch, temperature: float = 1.0) -> dict[str, tuple[float, Tensor]]:
    """By name, the weight and the distance of the parts of an output. Parts without counted positions are left out."""
    teachers = batch.meaning.parts(taught, batch.labels)
    students = {part.name: part for part in batch.meaning.parts(output, batch.labels)}
    if len(students) == len(teachers) == 1:  # one may be bare, and the other in a dict
        students = {teachers[0].name: next(iter(students.values()))}
    found: dict[str, tuple[float, Tensor]] = {}
    for teacher in teachers:
        if teacher.name not in students:
            raise _other(teacher.name, "nothing", _shapes(teacher))
        a, b = _pair(students[teacher.name], teacher, batch)
        if b.numel():
            found[teacher.name] = teacher.weight, _DISTANCES[teacher.kind](a, b, temperature)
    return found


def _pair(student: OutputPart, teacher: OutputPart, batch: Batch) -> tuple[Tensor, Tensor]:
    """What a model and its teacher gave at the positions that count, classes last."""
    if "*" in teacher.name:
        student, teacher = _as_long(student, teacher)
    a, b = replace(student, kind=teacher.kind, axis=teacher.axis).tensor, teacher.tensor
    if a.shape != b.shape:
        raise _other(teacher.name, _shapes(student), _shapes(teacher))
    keep = counted(b, batch, teacher.name)
    a, b = (a, b) if keep is None else (a[keep], b[keep])
    if not bool(b.detach().sum().isfinite()):
        infinite = torch.isinf(b) & (a == b)  # a mask, which is no difference
        fill = 0.0 if teacher.kind == "values" else _LOWEST
        a, b = a.masked_fill(infinite, fill), b.masked_fill(infinite, fill)
    return a, b


def _as_long(student: OutputPart, teacher: OutputPart) -> tuple[OutputPart, OutputPart]:
    """Lists of samples with equally many rows in each: a detection that only one of the two has is one of zeros."""
    if len(student.tensors) != len(teacher.tensors):
        raise _other(teacher.name, _shapes(student), _shapes(teacher))
    pairs = []
    for a, b in zip(student.tensors, teacher.tensors, strict=True):
        if a.dim() and a.shape[1:] == b.shape[1:] and len(a) != len(b):
            rows = max(len(a), len(b))
            a, b = (torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])]) for t in (a, b))  # noqa: PLW2901
        pairs.append((a, b))
    first, second = zip(*pairs, strict=True)
    return replace(student, tensors=first), replace(teacher, tensors=second)


def _shapes(part: OutputPart) -> str:
    return ", ".join(str(tuple(t.shape)) for t in part.tensors)


def _other(name: str, found: str, taught: str) -> TrainingError:
    text = f"found {found} where the teacher's output {name} is {taught}"
    return TrainingError("output", text, "Pass a teacher with the model's outputs, or the parts that count as output=.")


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p, log_q = (F.log_softmax(z / temperature, -1) for z in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


def _yes_or_no(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of Bernoulli distributions."""
    s, t = student / temperature, teacher / temperature
    yes = torch.sigmoid(t) * (F.logsigmoid(t) - F.logsigmoid(s))
    no = torch.sigmoid(-t) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return (yes + no).mean() * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the mean square of the teacher's."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp(min=1e-12)


_DISTANCES: dict[OutputKind, Callable[[Tensor, Tensor, float], Tensor]] = {
    "classes": _divergence,
    "multilabel": _yes_or_no,
    "values": lambda student, teacher, _: relative_error(student, teacher),
}


def counted(z: Tensor, batch: Batch, name: str = "") -> Tensor | None:
    """Bool, (B, T) or of any shape that labels have: positions of a tensor (B, T, ...) that count; None if all do.

    Args:
        z: of an output or of a module inside, classes last.
        batch: labels of -100 count for nothing, nor does padding.
        name: of the part, or path of the module: an encoder beside a decoder has the encoder's mask.
    """
    masks, labels = batch.masks or {}, batch.labels
    candidates: list[Tensor] = []
    if "decoder_attention_mask" not in masks or "encoder" not in name:
        if isinstance(labels, Tensor) and labels.dim() >= 2 and not labels.is_floating_point():
            candidates.append(labels != IGNORED)
        candidates += [masks["decoder_attention_mask"]] if "decoder_attention_mask" in masks else []
    candidates += [masks["attention_mask"]] if "attention_mask" in masks else []
    fitting = (mask for mask in candidates if z.dim() > mask.dim() and z.shape[: mask.dim()] == mask.shape)
    return next((mask.bool() for mask in fitting), None)

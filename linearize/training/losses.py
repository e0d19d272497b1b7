"""The default loss: the weighted mean over the parts of an output that have labels.

Shape letters: B samples, T positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from linearize.errors import DataError, UsageError
from linearize.nest import leaves_of
from linearize.running.batches import IGNORED, read_batches
from linearize.running.models import evaluating
from linearize.running.outputs import UNKNOWN, OutputMeaning, OutputPart, real, tensors_in
from linearize.running.targets import fitted
from linearize.training.divergence import relative_error

__all__ = ["evaluate_batches", "has_loss", "scores_of", "task_loss"]

Evaluate = Callable[[nn.Module], float | Mapping[str, float]] | Iterable[Any]


def task_loss(output: Any, labels: Any, meaning: OutputMeaning = UNKNOWN) -> Tensor:
    """The output's own `loss` if it has one, else that of the part that the labels belong to.

    Classes: cross entropy; multi-label: binary cross entropy; values: squared error relative to the mean square of the
    labels. Labels in a nest like that of the output belong to several parts: then it is their weighted mean.

    Raises:
        DataError: there are no labels, they do not fit, or they name a class that there is not.

    Examples:
        >>> float(task_loss(torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)))  # log 4
        1.38629...
        >>> float(task_loss(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8) / 2))
        1.0
    """
    if has_loss(output):
        own: Tensor = output["loss"] if isinstance(output, Mapping) else output.loss
        return own
    if labels is None:
        remedy = "Yield (inputs, labels) or a dict with 'labels'; or pass loss=, or teacher= with distill_weight=1."
        raise DataError("data", "found no labels in a batch", remedy)
    parts = meaning.parts(output, labels)
    labelled = _labelled(parts, labels)
    known = {part.name for part in parts} | set(tensors_in(output))
    if not labelled or any(isinstance(y, Tensor) and name and name not in known for name, y in leaves_of(labels)):
        raise _unfitting(parts, labels)
    total = sum(part.weight for part in labelled)
    return torch.stack([_loss(part) * (part.weight / total) for part in labelled]).sum()


def _labelled(parts: Sequence[OutputPart], labels: Any) -> list[OutputPart]:
    """The parts that have labels; of a single tensor of labels only the logits, or else the first."""
    found = [part for part in parts if part.labels is not None]
    found.sort(key=lambda part: part.name.rsplit(".", 1)[-1] != "logits")
    return found[:1] if isinstance(labels, Tensor) else found


def _loss(part: OutputPart) -> Tensor:
    """The loss of an output's part that has labels."""
    z, y = part.tensor, part.labels
    if y is None or fitted(part.tensors[0], y) is None:
        raise _unfitting([part], y)
    if part.kind == "classes" and y.shape != part.tensors[0].shape:
        rows, classes = z.reshape(-1, z.shape[-1]), y.flatten().long()
        _check_range(classes, rows.shape[1])
        return F.cross_entropy(rows, classes, ignore_index=IGNORED)
    if part.kind == "classes":  # distributions, as mixup makes them
        rows, shares = z.reshape(-1, z.shape[-1]), real(y).movedim(part.axis, -1)
        return F.cross_entropy(rows, shares.reshape(rows.shape))
    if y.numel() != part.tensors[0].numel():  # class indices, for what the configuration says is something else
        raise _unfitting([part], y)
    y = real(y).reshape(z.shape)
    return F.binary_cross_entropy_with_logits(z, y) if part.kind == "multilabel" else relative_error(z, y)


def _check_range(labels: Tensor, classes: int) -> None:
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if len(wrong):
        remedy = f"Classes are 0 to {classes - 1}; {IGNORED} marks what shall count for nothing."
        raise DataError("data", f"found the label {int(wrong[0])} for {classes} classes", remedy)


def _unfitting(parts: Sequence[OutputPart], labels: Any) -> DataError:
    shapes = ", ".join(f"{part.name} {tuple(part.tensors[0].shape)}" for part in parts)
    if not isinstance(labels, Tensor):
        names = ", ".join(name for name, _ in leaves_of(labels)) or "nothing"
        found = f"found labels of type {type(labels).__name__} ({names}) for an output of {shapes}"
        return DataError("data", found, "Yield a tensor, or tensors by name of the part; or pass loss=.")
    floats = labels.is_floating_point() and any(labels.shape == part.tensors[0].shape[:-1] for part in parts)
    remedy = "If they are classes, pass labels.long(); else pass" if floats else "Pass"
    found = f"found {str(labels.dtype).removeprefix('torch.')} labels {tuple(labels.shape)} for an output of {shapes}"
    return DataError("data", found, f"{remedy} loss=, a function of (output, labels).")


def has_loss(output: Any) -> bool:
    """True if a model's output holds its own loss, as that of transformers does if it gets labels."""
    return isinstance(output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None), Tensor)


def evaluate_batches(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Mean loss over batches ("eval_loss") and, for class labels, the share of hits ("accuracy"), in eval mode.

    Raises:
        DataError: there are no batches, or no labels.

    Examples:
        >>> import torch
        >>> sorted(evaluate_batches(nn.Linear(2, 2), [(torch.zeros(3, 2), torch.tensor([0, 1, 0]))]))
        ['accuracy', 'eval_loss']
    """
    losses, counts, hits, seen = 0.0, 0, 0, 0
    with evaluating(model):
        for index, batch in enumerate(read_batches(model, batches)):
            output = batch.checked(model, index)
            if batch.labels is None and not has_loss(output):
                remedy = "Yield (inputs, labels) or a dict with 'labels', or pass a function of the model."
                raise DataError("evaluate", "found no labels in a batch", remedy)
            losses += float(task_loss(output, batch.labels, batch.meaning)) * batch.size
            counts += batch.size
            for part in _labelled(batch.meaning.parts(output, batch.labels), batch.labels):
                z, labels = part.tensor, part.labels
                if part.kind == "classes" and labels is not None and labels.shape == z.shape[:-1]:
                    known = labels != IGNORED
                    hits += int(((z.argmax(-1) == labels) & known).sum())
                    seen += int(known.sum())
    if not counts:
        raise DataError("evaluate", "found no batches", "Pass at least one.")
    return {"eval_loss": losses / counts} | ({"accuracy": hits / seen} if seen else {})


def scores_of(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """The scores of an evaluation of a model in eval mode, by name, or as "score".

    Args:
        model: it is left in the mode it was in.
        evaluate: batches, for `evaluate_batches`, or a function of the model that gives a number or a dict of numbers.

    Raises:
        UsageError: the function gives something else.

    Examples:
        >>> scores_of(nn.Linear(2, 2), lambda model: 0.5)
        {'score': 0.5}
    """
    if not callable(evaluate):
        return evaluate_batches(model, evaluate)
    with evaluating(model):
        found = evaluate(model)
    named = {str(name): value for name, value in found.items()} if isinstance(found, Mapping) else {"score": found}
    try:
        return {name: float(value) for name, value in named.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        wrong = f"found a function that gives {found!r:.80}"
        raise UsageError("evaluate", wrong, "Return a number, or a dict of names and numbers.") from error

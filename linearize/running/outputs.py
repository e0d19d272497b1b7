"""The parts of a model's output: every floating tensor in it is a part, and has a kind.

The kinds are "classes" (logits of a softmax over one axis), "multilabel" (each entry is the logit of a yes-or-no
decision), and "values" (real numbers, measured relative to their mean square). A part is classes only if something says
so. In this order: the user, the model's configuration (`problem_type`), the labels, and the sizes in that
configuration. Otherwise a part is values, because a relative squared error sees every change, and a divergence of
classes does not.

Shape letters: B samples, T positions, H height, W width, K classes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from linearize.errors import TrainingError, UsageError
from linearize.running.targets import OutputKind, class_axes, fitted, labels_by_part

__all__ = ["UNKNOWN", "OutputChoice", "OutputKind", "OutputMeaning", "OutputPart", "main_part", "real", "tensors_in"]

OutputChoice = str | Sequence[str] | Mapping[str, float | str] | None
"""Which parts of an output count: glob patterns of their names; or by pattern a weight, or a kind."""

# Names, in all of transformers, of what is inside a model, and of what its loss is: no results. They can be chosen.
_INSIDE = ("loss", "*_loss", "*hidden_states", "*attentions", "*past_key_values", "mems", "encoder_last_hidden_state")


@dataclass(frozen=True)
class OutputPart:
    """One part of an output.

    Attributes:
        name: its path in the output, such as "logits" or "0.boxes"; "output" for an output that is one tensor. In a
            list of dicts, one for each sample, "*" stands for the sample.
        tensors: that are there; several only in such a list.
        kind: what the numbers are.
        axis: of the classes.
        weight: in a loss.
        labels: that belong to it, in its own shape or that without the axis.
    """

    name: str
    tensors: tuple[Tensor, ...]
    kind: OutputKind = "values"
    axis: int = -1
    weight: float = 1.0
    labels: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The part as one tensor in float32, its classes last; a list of samples is one vector."""
        several = len(self.tensors) != 1
        whole = torch.cat([t.reshape(-1) for t in map(real, self.tensors)]) if several else real(self.tensors[0])
        return whole.movedim(self.axis, -1) if self.kind == "classes" else whole


def real(tensor: Tensor) -> Tensor:
    """Real numbers to compute a loss with: a complex number becomes two."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).float()


def tensors_in(output: Any) -> dict[str, list[Tensor]]:
    """Every floating tensor of an output, by name; through tuples, lists, dicts, dataclasses, and what an object holds.

    Examples:
        >>> list(tensors_in({"logits": torch.zeros(2), "ids": torch.tensor(3), "states": (torch.ones(1), None)}))
        ['logits', 'states.0']
        >>> list(tensors_in([{"boxes": torch.zeros(3, 4)}, {"boxes": torch.zeros(1, 4)}]))
        ['*.boxes']
    """
    found: dict[str, list[Tensor]] = {}
    for name, value in _named(output):
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            found.setdefault(name or "output", []).append(value)
    if not found and hasattr(output, "__dict__") and not isinstance(output, Tensor | nn.Module):
        return tensors_in(dict(vars(output)))
    return found


def _named(output: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of an output by path; "*" in place of the position in a list of dicts of the same keys."""
    if isinstance(output, list | tuple) and _alike(output):
        for entry in output:
            yield from ((f"*.{name}", value) for name, value in _named(entry))
    elif isinstance(output, Mapping | list | tuple):
        entries = output.items() if isinstance(output, Mapping) else enumerate(output)
        for key, entry in entries:
            yield from ((f"{key}.{name}" if name else str(key), value) for name, value in _named(entry))
    elif hasattr(output, "__dataclass_fields__"):
        yield from _named({key: getattr(output, key, None) for key in output.__dataclass_fields__})
    else:
        yield "", output


def _alike(entries: Sequence[Any]) -> bool:
    keys = [set(e if isinstance(e, Mapping) else getattr(e, "__dataclass_fields__", ())) for e in entries]
    return bool(keys) and bool(keys[0]) and all(key == keys[0] for key in keys)


@dataclass(frozen=True)
class OutputMeaning:
    """What is known about a model's output before it exists.

    Attributes:
        weights: by glob pattern, those of the parts that count; None: all count alike.
        kinds: by glob pattern, what the user says that a part is.
        problem: `problem_type` of the model's configuration.
        sizes: numbers of classes that the configuration knows.
        inside: names of what is no result, besides the usual ones.
        head: whether the configuration is of a model whose float targets are multi-label.
    """

    weights: Mapping[str, float] | None = None
    kinds: Mapping[str, OutputKind] | None = None
    problem: str | None = None
    sizes: frozenset[int] = frozenset()
    inside: tuple[str, ...] = ()
    head: bool = False

    @classmethod
    def of(cls, model: nn.Module, output: OutputChoice = None) -> OutputMeaning:
        """From the model's configuration, if it has one, and the choice of the user.

        Raises:
            UsageError: the choice is no pattern, weight or kind.

        Examples:
            >>> OutputMeaning.of(nn.Linear(2, 2), {"boxes": 2.0}).weights
            {'boxes': 2.0}
        """
        weights, kinds = _chosen(output)
        config = getattr(model, "config", None)
        problem = getattr(config, "problem_type", None)
        ignored = getattr(config, "keys_to_ignore_at_inference", None)
        inside = tuple(ignored) if isinstance(ignored, list | tuple) else ()
        labels = getattr(config, "num_labels", None)
        head = hasattr(config, "problem_type") and isinstance(labels, int) and labels > 1
        return cls(weights, kinds, problem if isinstance(problem, str) else None, _sizes(config), inside, head)

    def parts(self, output: Any, labels: Any = None) -> list[OutputPart]:
        """The parts of an output that count. Their weights sum to 1.

        Raises:
            TrainingError: there is no floating tensor.
            UsageError: a chosen pattern names no part.
        """
        tensors = tensors_in(output)
        if not tensors:
            kind = f"found no floating tensor in an output of type {type(output).__name__}"
            raise TrainingError("output", kind, "Pass a model whose forward gives tensors of numbers.")
        weights = self._weighed(tensors)
        total = sum(weights.values())
        given = labels_by_part(list(weights), {name: tensors[name] for name in weights}, labels)
        found: list[OutputPart] = []
        for name, weight in weights.items():
            part = OutputPart(name, tuple(tensors[name]), weight=weight / total, labels=given.get(name))
            found.append(self._read(part))
        return found

    def _weighed(self, tensors: Mapping[str, list[Tensor]]) -> dict[str, float]:
        """The parts that count, each with its weight."""
        if self.weights is None:
            patterns = (*_INSIDE, *self.inside)
            plain = {n for n in tensors if not any(fnmatch.fnmatchcase(k, p) for k in n.split(".") for p in patterns)}
            shaped = [name for name in tensors if name in plain and all(t.dim() for t in tensors[name])]
            return dict.fromkeys(shaped or [name for name in tensors if name in plain] or tensors, 1.0)
        found: dict[str, float] = {}
        for pattern, weight in self.weights.items():
            some = [name for name in tensors if _names(pattern, name)]
            if not some:
                remedy = f"Its parts are {', '.join(tensors)}."
                raise UsageError("output", f"found {pattern!r}, which names no part of the output", remedy)
            found |= dict.fromkeys(some, weight)
        return {name: found[name] for name in tensors if name in found}

    def _read(self, part: OutputPart) -> OutputPart:
        """The part with its kind."""
        z, y = part.tensors[0], part.labels
        told = next((kind for pattern, kind in (self.kinds or {}).items() if _names(pattern, part.name)), None)
        said = fitted(z, y) if y is not None else None
        if len(part.tensors) != 1 or z.is_complex():
            return part
        if told is not None:
            axis = said[1] if said is not None and said[0] == told else self._axis(z, any_size=True)
            return replace(part, kind=told, axis=-1 if axis is None else axis)
        named = part.name.rsplit(".", 1)[-1] == "logits"
        if named and self.problem in {"regression", "multi_label_classification"}:
            return replace(part, kind="values" if self.problem == "regression" else "multilabel")
        if named and self.head and y is not None and y.is_floating_point() and y.shape == z.shape:
            return replace(part, kind="multilabel")  # what transformers takes such labels for
        if said is not None:
            return replace(part, kind=said[0], axis=said[1])
        axis = self._axis(z, any_size=self.problem == "single_label_classification") if named else None
        return part if axis is None else replace(part, kind="classes", axis=axis)

    def _axis(self, z: Tensor, *, any_size: bool) -> int | None:
        """The axis of a number of classes that the configuration knows, two or more; None if there is none."""
        axes = class_axes(z) if any_size or z.dim() != 3 else (-1,)  # a short sequence may have such a length
        some = [axis for axis in axes if z.shape[axis] > 1]
        return next((axis for axis in some if any_size or z.shape[axis] in self.sizes), None)


UNKNOWN = OutputMeaning()


def main_part(output: Any) -> OutputPart:
    """The part to use where only one is possible: the logits, or else the first.

    Raises:
        TrainingError: there is no floating tensor.

    Examples:
        >>> main_part({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}).name
        'logits'
    """
    parts = UNKNOWN.parts(output)
    return next((part for part in parts if part.name.rsplit(".", 1)[-1] == "logits"), parts[0])


def _names(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*") or pattern == name


def _chosen(output: OutputChoice) -> tuple[dict[str, float] | None, dict[str, OutputKind] | None]:
    if output is None:
        return None, None
    known = ", ".join(get_args(OutputKind))
    remedy = f"Pass patterns of names, or a dict of patterns with weights above 0 or kinds ({known})."
    if isinstance(output, str):
        output = [output]
    given = dict(output) if isinstance(output, Mapping) else None
    if given is None:
        if not isinstance(output, Sequence) or not output or not all(isinstance(name, str) for name in output):
            raise UsageError("output", f"found {output!r}", remedy)
        return dict.fromkeys(output, 1.0), None
    weights: dict[str, float] = {}
    kinds: dict[str, OutputKind] = {}
    for name, value in given.items():
        told: Any = value
        number = isinstance(told, int | float) and not isinstance(told, bool) and 0 < float(told) < float("inf")
        if not isinstance(name, str) or not (number or told in get_args(OutputKind)):
            raise UsageError("output", f"found {name!r}: {value!r}", remedy)
        weights[name] = float(told) if number else 1.0
        if not number:
            kinds[name] = told
    if not weights:
        raise UsageError("output", "found an empty dict", remedy)
    return weights, kinds


def _sizes(config: Any) -> frozenset[int]:
    """Numbers of classes in a configuration: of labels (or one more for "none of these"), and of words."""
    if config is None:
        return frozenset()
    labels = getattr(config, "num_labels", None)
    found = {labels, labels + 1} if isinstance(labels, int) else set()
    inner = [value for value in getattr(config, "__dict__", {}).values() if hasattr(value, "to_dict")]
    for each in (config, *inner):
        size = getattr(each, "vocab_size", None)
        found |= {size} if isinstance(size, int) else set()
    return frozenset(size for size in found if size > 1)

"""The one convention for batches, and the one place where batches are read, wherever linearize runs a model over data.

A batch is a tensor (the input), a tuple or list of positional inputs whose last entry may be the labels, or a
dict of keyword arguments, which may include "labels". The last entry of a tuple is taken as labels if there
are at least two entries and more than `forward` requires. A dict's labels are passed on to a `forward` that
takes them.

Batches belong to the user. Every call of a model gets its own copies of containers and tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from linearize.errors import DataError, LinearizeError
from linearize.nest import copied, leaves_of, mapped, plain_nest
from linearize.running.models import device_of
from linearize.running.outputs import UNKNOWN, OutputChoice, OutputMeaning

__all__ = [
    "IGNORED",
    "Batch",
    "ReadData",
    "count_of",
    "labels_are_inputs",
    "length_of",
    "padding_mask",
    "read_batch",
    "read_batches",
    "to_device",
]

IGNORED = -100  # the label of positions that count for nothing, in PyTorch and transformers alike
_MOST = 10_000  # batches of data without a length: what has more is taken for endless


@dataclass
class Batch:
    """The inputs of one call of a model, and the labels that its output is compared with.

    Attributes:
        args, kwargs: of the call.
        labels: to compare the output with; None: there are none.
        masks: by name, those of positions that count, (B, T), wherever in the inputs they are.
        meaning: what is known about the output.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Any = None
    masks: dict[str, Tensor] | None = None
    meaning: OutputMeaning = UNKNOWN

    def __post_init__(self) -> None:
        if self.masks is None:
            self.masks = _masks((self.args, self.kwargs))

    @property
    def size(self) -> int:
        """Number of samples: the length of the first tensor."""
        leaves = (value for _, value in leaves_of((self.args, self.kwargs)))
        first = next((value for value in leaves if isinstance(value, Tensor)), None)
        return int(first.shape[0]) if first is not None and first.dim() else 1

    def run(self, model: nn.Module) -> Any:
        """The output of a model. It gets copies, so it may write into a dict or overwrite a tensor."""
        args, kwargs = copied((self.args, self.kwargs))
        return model(*args, **kwargs)

    def checked(self, model: nn.Module, index: int) -> Any:
        """Like `run`, but if the model cannot take a batch, the error names it.

        Raises:
            DataError: the batch does not go through the model.
        """
        try:
            return self.run(model)
        except (LinearizeError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            line = next((text.strip() for text in str(error).splitlines() if text.strip()), "no message")
            found = f"batch {index} does not go through the model ({type(error).__name__}: {line})"
            raise DataError(
                "data", found, "Give it shapes, dtypes and labels that the model's forward takes."
            ) from error


def read_batch(model: nn.Module, batch: Any, meaning: OutputMeaning | None = None) -> Batch:
    """Sort a batch into inputs and labels.

    Raises:
        DataError: the batch is none of the forms above, or holds what no model can be given here: arrays of NumPy,
            sparse or nested tensors, tensors without values.

    Examples:
        >>> read_batch(nn.Linear(2, 2), (torch.zeros(3, 2), torch.zeros(3))).labels
        tensor([0., 0., 0.])
    """
    if isinstance(batch, Batch):
        return batch
    _check(batch)
    meaning = meaning or OutputMeaning.of(model)
    if isinstance(batch, Tensor):
        return Batch((batch,), meaning=meaning)
    batch = plain_nest(batch)
    if isinstance(batch, dict):
        labels = batch.get("labels")
        kwargs = batch if _takes(model, "labels") else {key: batch[key] for key in batch if key != "labels"}
        masks = _masks(kwargs)
        decoded = _decoded(model, batch)
        if decoded is not None:
            masks.setdefault("decoder_attention_mask", decoded)
        return Batch((), kwargs, labels, masks, meaning)
    if isinstance(batch, tuple | list) and batch:
        if len(batch) > 1 and len(batch) > _required(model):
            return Batch(tuple(batch[:-1]), {}, batch[-1], meaning=meaning)
        return Batch(tuple(batch), meaning=meaning)
    found = f"found a batch of type {type(batch).__name__}" + (" without entries" if batch in ((), []) else "")
    raise DataError("data", found, "Yield tensors, tuples (inputs, labels), or dicts of keyword arguments.")


def read_batches(model: nn.Module, data: Iterable[Any]) -> Iterator[Batch]:
    """The batches of data, on the device of the model."""
    device = device_of(model)
    return (to_device(read_batch(model, raw), device) for raw in data)


class ReadData:
    """A user's data as `Batch`es, read again in every pass. It has a length, counted if necessary.

    Args:
        model: whose forward tells inputs from labels.
        data: re-iterable batches.
        output: parts of the output that count, as `linearize.compress` takes them.

    Raises:
        DataError: there is no end to the data.

    Examples:
        >>> data = ReadData(nn.Linear(2, 2), [(torch.zeros(3, 2), torch.zeros(3))])
        >>> len(data), next(iter(data)).size
        (1, 3)
    """

    def __init__(self, model: nn.Module, data: Iterable[Any], output: OutputChoice = None) -> None:
        self.model, self.data, self.length = model, data, count_of(data)
        self.meaning = OutputMeaning.of(model, output)

    def __iter__(self) -> Iterator[Batch]:
        return (read_batch(self.model, raw, self.meaning) for raw in self.data)

    def __len__(self) -> int:
        return self.length


def length_of(data: Any) -> int | None:
    """Number of batches, or None if the data does not tell: a loader of an iterable data set raises a TypeError.

    Examples:
        >>> length_of([1, 2]), length_of(iter([1, 2]))
        (2, None)
    """
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def count_of(data: Iterable[Any]) -> int:
    """Number of batches. Data without a length are counted.

    Raises:
        DataError: there is no end to them.
    """
    known = length_of(data)
    if known is not None:
        return known
    count = sum(1 for _ in islice(data, _MOST + 1))
    if count > _MOST:
        remedy = "Give the data a __len__, or pass so many of its batches as shall count: list(islice(data, 500))."
        raise DataError("data", f"found no length, and more than {_MOST} batches", remedy)
    return count


def to_device(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts, or the same batch, with its tensors on `device`."""
    if isinstance(value, Batch):
        args, kwargs, labels, masks = (
            to_device(v, device) for v in (value.args, value.kwargs, value.labels, value.masks)
        )
        return replace(value, args=args, kwargs=kwargs, labels=labels, masks=masks)
    return mapped(value, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def labels_are_inputs(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """True if a model makes its decoder's input from labels: forward takes both, and the batch has no such input."""
    if not _are_classes(batch.get("labels")) or not _takes(model, "labels"):
        return False
    given = any(batch.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    return not given and _has_decoder(model)


def _has_decoder(model: nn.Module) -> bool:
    """Whether a model is a sequence-to-sequence one: with a decoder that has an input of its own."""
    names = {parameter.name for parameter in _parameters(model)}
    told = hasattr(model, "prepare_decoder_input_ids_from_labels") or "decoder_input_ids" in names
    return told or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _decoded(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Bool (B, T): positions of the decoder that count, as the labels say; all, if only its input is given."""
    labels, given = batch.get("labels"), batch.get("decoder_input_ids")
    if not _has_decoder(model):
        return None
    if isinstance(labels, Tensor) and _are_classes(labels) and (given is None or given.shape == labels.shape):
        return labels.ne(IGNORED)
    return torch.ones_like(given, dtype=torch.bool) if isinstance(given, Tensor) and given.dim() == 2 else None


def _are_classes(labels: Any) -> bool:
    """Whether labels are class indices of positions, (B, T)."""
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def _masks(inputs: Any) -> dict[str, Tensor]:
    """The masks (B, T) in a nest of inputs, by name; the first of each name counts."""
    found: dict[str, Tensor] = {}
    for path, value in leaves_of(inputs):
        name = path.rsplit(".", 1)[-1]
        if name in {"attention_mask", "decoder_attention_mask"} and isinstance(value, Tensor) and value.dim() == 2:
            found.setdefault(name, value)
    return found


def _check(batch: Any) -> None:
    for path, value in leaves_of(batch):
        where = f"a batch, at {path}" if path else "a batch"
        if type(value).__module__ == "numpy" and getattr(value, "shape", ()) != ():
            raise DataError("data", f"found an array of NumPy in {where}", "Yield tensors: torch.from_numpy(array).")
        if not isinstance(value, Tensor):
            continue
        kind, remedy = "", "Yield dense tensors: tensor.to_dense()."
        if value.is_nested:
            kind, remedy = "a nested tensor", "Yield dense tensors, padded, with a mask."
        elif value.layout != torch.strided:
            kind = f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
        elif value.is_meta or isinstance(value, FakeTensor):
            kind, remedy = "a tensor without values (on the meta device, or a fake one)", "Yield tensors with values."
        if kind:
            raise DataError("data", f"found {kind} in {where}", remedy)


def padding_mask(model: nn.Module, name: str, masks: Mapping[str, Tensor] | None) -> Tensor | None:
    """The padding mask of a batch that belongs to a site."""
    masks, key = masks or {}, "attention_mask"
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "decoder_attention_mask" in masks
    if both and any("decoder" in part for part in name.split(".")):
        key = "decoder_attention_mask"  # the two sequences may be of the same length by chance
    return masks.get(key)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _takes(model: nn.Module, name: str) -> bool:
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in _parameters(model))


def _required(model: nn.Module) -> int:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in _parameters(model))

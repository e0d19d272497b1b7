"""A model as a program of `torch.export`: tensors in, tensors out, sizes of the batch and of sequences left open."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.errors import CaptureError
from linearize.export.batches import batch_tensors, length_axes
from linearize.export.face import Subject
from linearize.graph.capture import Inputs, silent, tensors_of
from linearize.graph.protect import untouched
from linearize.nest import copied, leaves_of

__all__ = ["Program", "program_of"]


@dataclass(frozen=True)
class Program:
    """A captured model.

    Attributes:
        exported: the program.
        inputs: name of each input.
        outputs: name of each output.
        open: for each input, its axes whose size is left open, and their names.
    """

    exported: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    open: tuple[dict[int, str], ...]

    @property
    def told(self) -> str:
        """Which sizes are open, in words."""
        found = [f"{name} {list(axes.values())}" for name, axes in zip(self.inputs, self.open, strict=True) if axes]
        return ", ".join(found).replace("'", "") or "none"


class Flat(nn.Module):
    """A model as a function of a row of tensors that returns a row of tensors; all other arguments are constants."""

    def __init__(self, model: nn.Module, batch: Inputs) -> None:
        super().__init__()
        self.model = model
        leaves, self.form = pytree.tree_flatten(batch)
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's outputs, in order."""
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return tuple(tensors_of(self.model(*args, **kwargs)))


def program_of(subject: Subject) -> Program:
    """Capture a model on its first batch, with as many open sizes as its code allows.

    Raises:
        CaptureError: its control flow depends on the data.
    """
    model, batch = subject.model, subject.batches[0]
    tensors = [t.detach().clone() for t in batch_tensors(batch)]
    names = input_names(model, batch)
    wanted = [dict(axes) for axes in subject.axes or ()]
    if not wanted:
        wanted = [_wanted(t, axis, tensors[0]) for t, axis in zip(tensors, length_axes(batch), strict=True)]
    shapes = ([dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in wanted],)
    try:
        with untouched(model), warnings.catch_warnings(), torch.no_grad(), silent():
            warnings.simplefilter("ignore")
            outputs = tuple(output_names(model, batch))
            exported = torch.export.export(
                Flat(model, batch), tuple(tensors), dynamic_shapes=_matching(shapes), strict=False
            )
    except Exception as error:  # whatever the model's own code raises while it is watched
        line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
        found = f"torch.export cannot capture it ({type(error).__name__}: {line.strip()})"
        raise CaptureError(type(model).__name__, found, "Make its control flow independent of the data.") from error
    return Program(exported, names, outputs, _open(exported, wanted))


def _matching(shapes: Any) -> Any:
    """The shapes in the form that a forward of any number of tensors wants: one entry, which is the row of them."""
    return tuple(tuple(entry) for entry in shapes)


def _wanted(tensor: Tensor, length: int | None, first: Tensor) -> dict[int, str]:
    """Axes whose size shall be open, with names."""
    axes = {0: "batch"} if tensor.dim() and first.dim() and tensor.shape[0] == first.shape[0] > 1 else {}
    return axes | ({length: "length"} if length is not None else {})


def _open(exported: torch.export.ExportedProgram, wanted: list[dict[int, str]]) -> tuple[dict[int, str], ...]:
    """The wanted axes whose size the captured code does leave open."""
    user = set(exported.graph_signature.user_inputs)
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in user]
    found = []
    for node, axes in zip(nodes, wanted, strict=True):
        shape = node.meta["val"].shape
        found.append({axis: name for axis, name in axes.items() if not isinstance(shape[axis], int)})
    return tuple(found)


def input_names(model: nn.Module, batch: Inputs) -> tuple[str, ...]:
    """The tensors of a batch by the arguments of the model's forward that they are."""
    args, kwargs = batch
    try:
        known = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
    except (TypeError, ValueError):
        known = []
    nest = {**{known[i] if i < len(known) else f"input_{i}": value for i, value in enumerate(args)}, **kwargs}
    return tuple(_word(model, name) for name, value in leaves_of(nest) if isinstance(value, Tensor))


def output_names(model: nn.Module, batch: Inputs) -> list[str]:
    """The tensors of the model's output by their paths in it; "output" for a single one."""
    args, kwargs = copied(batch)
    output = model(*args, **kwargs)
    names = [_word(model, name) if name else "output" for name, value in leaves_of(output) if isinstance(value, Tensor)]
    count = len(tensors_of(output))
    return names if len(names) == count == len(set(names)) else [f"output_{i}" for i in range(count)]


def _word(model: nn.Module, name: str) -> str:
    """A path as a name: other programs take dots for parts of an object, but where they are used to them."""
    if getattr(model, "dotted", False):
        return name
    return name.replace(".", "_") if not name[:1].isdigit() else f"output_{name.replace('.', '_')}"

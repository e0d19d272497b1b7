"""Saving and loading: one .safetensors file with tensors, the base model's recipe, and the changes to it.

There is no pickle and no code: a file names library models and layers from a short list, and holds plain data.
docs/checkpoints.md specifies the format.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize import checks, zoo
from linearize.errors import CheckpointError, LinearizeError
from linearize.sites.record import record_of, set_record
from linearize.storage import atomic, tensorfile
from linearize.storage.content import check_value, is_plain_tensor, tensors_to_store
from linearize.storage.fit import check_fit, check_sites, check_steps
from linearize.storage.manifest import Manifest, may_hold
from linearize.storage.restore import (
    check_values,
    copy_without_weights,
    fill,
    put_attributes,
    put_extras,
    take_plain_weights,
)
from linearize.storage.trial import check_runs
from linearize.storage.versions import names_since, renamed
from linearize.surgery.specs import all_steps, replay
from linearize.zoo.building import Limit, parameters_on_meta
from linearize.zoo.sealed import sealed
from linearize.zoo.structure import Difference, compare, plain_tensors

__all__ = ["FILE", "load", "save", "save_from"]

FILE = "linearize.safetensors"
"""Name of our file in a folder that a library's own `save_pretrained` has written."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one .safetensors file. `load` builds it again in any process.

    The file holds the tensors, how to build the base model if it comes from timm or transformers (the recipe), and the
    steps that change the base model into this one. It is written to another name and renamed when complete, so a
    failure leaves an old file unchanged. Forward hooks and the training flag are not saved.

    Args:
        model: any model: base, with gates, or collapsed. Data-parallel and compile wrappers are left out.
        path: the file to write; its folder must exist.

    Raises:
        CheckpointError: a tensor is NaN, infinite, empty (a shard), without memory, or of a kind that the format does
            not know; the path is a folder, or cannot be written.

    Warns:
        UserWarning: a timm or transformers model was changed and cannot be built from its name; `load` will need
            ``model=``.

    Examples:
        >>> import tempfile
        >>> model = zoo.create("timm:test_vit")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/small.safetensors")
        ...     again = load(f"{folder}/small.safetensors")
        >>> torch.equal(again.head.weight, model.head.weight)
        True
    """
    checks.module("model", model)
    checks.path("path", path)
    _save(model, path, None)


def save_from(model: nn.Module, path: str | os.PathLike[str], value: Callable[[str], Tensor]) -> None:
    """Like `save`, for a model that is too large for the memory: one tensor at a time is there.

    Args:
        model: parameters and persistent buffers without values are on the meta device.
        path: the file to write; its folder must exist.
        value: gives such a tensor by its name, when it is its turn to be written.

    Raises:
        CheckpointError: as for `save`.
    """
    _save(model, path, value)


def _save(model: nn.Module, path: str | os.PathLike[str], value: Callable[[str], Tensor] | None) -> None:
    atomic.destination(path)  # before any work is done
    model = zoo.unwrap(model)
    record = record_of(model)
    content = Manifest(steps=all_steps(model))
    if record is not None:
        content.sites, content.inputs = [site.to_dict() for site in record.sites], record.inputs
    tensors = tensors_to_store(model, content)
    later = {name for name, tensor in tensors.items() if value is not None and tensor.is_meta}
    for name, tensor in tensors.items():
        if name not in later:
            check_value(name, tensor)
    difference = _find_recipe(model, content)
    for name, tensor in tensors.items():
        # A layer that the library itself builds with no elements is no shard.
        if tensor.numel() == 0 and content.recipe is None:
            found = f"it has no elements, shape {tuple(tensor.shape)}, as shards have outside their process"
            raise CheckpointError(name, found, "Gather the full model on one process, then save.")
    content.attributes = [item for item in difference.attributes if may_hold(item[2])]
    for path_of_module, where, tensor in difference.tensors:
        if tensor.dtype in tensorfile.DTYPE_NAMES and is_plain_tensor(tensor) and not tensor.is_meta:
            key = f"extra:{path_of_module}:{'/'.join(map(str, where))}"
            tensors[key] = tensor
            content.extras.append((key, path_of_module, where))

    def held(name: str) -> Tensor:
        if value is None or name not in later:
            return tensors[name]
        tensor = value(name)
        check_value(name, tensor)
        return tensor

    tensorfile.write_tensors(Path(path), tensors, content.to_texts(), held)


def load(
    path: str | os.PathLike[str], *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Build the model of a file that `save` wrote, in eval mode.

    Args:
        path: the file, or a folder that `save_pretrained` of a changed model has written.
        model: the base model as it was before `linearize.convert`. Needed if the model is from neither timm nor
            transformers. Its structure is copied, and it is not changed.
        device: where the tensors go. On the CPU they are mapped from the file and read when first used.

    Raises:
        CheckpointError: the file is missing, damaged, of another program or of a newer format; its plan or its tensors
            do not fit the model; or the base model must be given.
    """
    source = checks.path("path", path)
    with suppress(OSError):  # of a path that no file can have: reading says so
        if source.is_dir():
            source = _inside(source)
    if model is not None:
        checks.module("model", model)
    header = tensorfile.read_header(source)
    content = Manifest.from_texts(source, header.metadata)
    check_steps(str(path), content)
    model = None if model is None else zoo.unwrap(model)
    limit = Limit.of_file(len(header.shapes), header.elements, header.size)
    try:
        loaded = _skeleton(source, content, model, limit)
        names = names_since(content.version, loaded)
        content, today = renamed(content, names), header.renamed(names)
        if model is not None:
            take_plain_weights(loaded, today.shapes)
        check_fit(str(path), loaded, content, today)
        check_sites(str(path), loaded, content)
        put_attributes(str(path), loaded, content)
        put_extras(str(path), loaded, content, today.empty(key for key, _, _ in content.extras))
        if content.steps or content.attributes or content.extras:
            fill(loaded, content, today.hollow())  # of the file's types: a layer that a step makes is float32 at first
            with _doors(model):
                check_runs(str(path), loaded, content.inputs, lambda: _base(source, content, model, limit), limit)
    except CheckpointError as error:
        if error.where == str(path):
            raise
        raise CheckpointError(str(path), f"its plan does not fit the model ({error})", _remedy(model)) from error
    except LinearizeError as error:
        raise CheckpointError(str(path), f"its base model cannot be built ({error})", _remedy(model)) from error
    except Exception as error:  # code of a library, or of the model given, that a wrong plan has led astray
        found = f"its plan does not fit the model ({type(error).__name__}: {error!s:.200})"
        raise CheckpointError(str(path), found, _remedy(model)) from error
    tensors = tensorfile.read_tensors(source, device)
    _check_same(source, header, tensors)
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    fill(loaded, content, tensors)
    put_extras(str(path), loaded, content, tensors)
    check_values(str(path), loaded)
    if content.steps or content.sites:
        set_record(loaded, content.record())
    return loaded.to(device).eval()


def _inside(folder: Path) -> Path:
    """Our file in a folder.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / FILE).is_file():
        return folder / FILE
    remedy = (
        "Pass the path of a .safetensors file, or a folder that save_pretrained of a changed model wrote. A trainer's "
        "checkpoint holds weights alone: read them into the model that was trained, with load_state_dict, and call "
        "linearize.save."
    )
    raise CheckpointError(str(folder), f"it is a folder without {FILE}", remedy)


def _find_recipe(model: nn.Module, content: Manifest) -> Difference:
    """Find the recipe that, with the steps, gives this model; return what else a file must hold."""
    problem = None
    for candidate in zoo.candidates(model):
        try:
            fresh = zoo.skeleton(candidate)
            with parameters_on_meta():
                replay(fresh, content.steps)
        except LinearizeError as error:
            problem = problem or str(error)
            continue
        difference = compare(fresh, model)
        if difference.problem is None:
            content.recipe = candidate
            return difference
        problem = problem or difference.problem
    if problem is not None:
        content.no_recipe = f"a rebuilt one differs: {problem}"
        text = f"{type(model).__name__} cannot be rebuilt from its name ({problem}); load() will need model=."
        warnings.warn(text, stacklevel=3)
    modules = model.named_modules()
    rest = [(name, where, item) for name, part in modules for where, item in plain_tensors(part).items()]
    return Difference(tensors=rest)


def _base(path: Path, content: Manifest, model: nn.Module | None, limit: Limit) -> nn.Module:
    """The base model of the file without its weights: as the recipe says, or a copy of the one given."""
    if model is None:
        return zoo.skeleton(_known_recipe(path, content), limit)
    try:
        return copy_without_weights(model)
    except Exception as error:  # user modules may hold anything, also what cannot be copied
        found = f"the model given cannot be copied: {error}"
        raise CheckpointError(str(path), found, "Pass a model that copy.deepcopy can copy.") from error


def _skeleton(path: Path, content: Manifest, model: nn.Module | None, limit: Limit) -> nn.Module:
    """The model of the file without its weights."""
    steps = [] if model is None else all_steps(model)
    if steps and steps != content.steps:
        found = "the model given has been rewritten already, in another way than the file's"
        raise CheckpointError(str(path), found, "Pass the base model, as it was before linearize.convert.")
    base = _base(path, content, model, limit)
    with _doors(model), parameters_on_meta(limit):
        return base if steps else replay(base, content.steps)


def _doors(model: nn.Module | None) -> AbstractContextManager[None]:
    """Shut where all that runs is of a file and of libraries; code of the user's own model may do what it does."""
    return sealed() if model is None else nullcontext()


def _check_same(path: Path, header: tensorfile.Header, tensors: dict[str, Tensor]) -> None:
    """The library that reads the tensors must have understood the header as we did."""
    for name, shape in header.shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape or tensors[name].dtype != header.dtypes[name]:
            raise CheckpointError(str(path), f"tensor {name!r} is described twice", "Copy or save the file again.")


def _known_recipe(path: Path, content: Manifest) -> dict[str, Any]:
    if content.recipe is None:
        found = f"it does not say how to build its base model: {content.no_recipe}"
        remedy = "Build the base model as before saving and call load(path, model=base)."
        raise CheckpointError(str(path), found, remedy)
    return content.recipe


def _remedy(model: nn.Module | None) -> str:
    if model is None:
        return "Install the library versions that wrote it, or pass the base model: load(path, model=base)."
    return "Pass the base model that the file was made from, as it was before linearize.convert."

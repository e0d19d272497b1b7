"""Check that the content of a file fits its model: the tensors, and the sites that its gates know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from linearize.algebra.constants import names_in
from linearize.errors import CheckpointError
from linearize.gating.gate import ChannelGate
from linearize.sites.site import Fold, Port, Site
from linearize.storage.manifest import Manifest
from linearize.storage.tensorfile import Header
from linearize.zoo.structure import stored_tensors

__all__ = ["check_fit", "check_sites", "check_steps"]

_REMEDY = "Load it onto the base model that it was made from, with the library versions that it was made with."


def check_fit(path: str, model: nn.Module, content: Manifest, header: Header) -> None:
    """Check names, shapes and kinds of a file's tensors against the model that they belong to.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or kind, or not shared as in the model.
    """
    shapes = header.shapes
    extras = {key for key, _, _ in content.extras}
    found = {name: shape for name, shape in shapes.items() if name not in extras}
    for name, stored in content.aliases.items():
        if stored not in found or name in shapes:
            raise CheckpointError(path, f"tensor {name!r} shares {stored!r}, which is not stored", _REMEDY)
    found.update({name: shapes[stored] for name, stored in content.aliases.items()})
    if lost := extras - set(shapes):
        raise CheckpointError(path, f"tensor {min(lost)!r} is missing", "Copy or save the file again.")
    tensors = stored_tensors(model)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [
        *(f"tensor {name!r} is missing" for name in expected if name not in found),
        *(f"tensor {name!r} is not expected" for name in found if name not in expected),
        *(
            f"tensor {name!r} is of shape {found[name]}, the model has {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(path, f"it does not fit the model: {problems[0]}{more}", _REMEDY)
    _check_kinds(path, model, content, header)
    _check_sharing(path, model, content)


def _check_kinds(path: str, model: nn.Module, content: Manifest, header: Header) -> None:
    """Numbers stay what they are: a model may be cast from one floating dtype to another, as whole layers are."""
    for name, tensor in stored_tensors(model).items():
        found = header.dtypes[content.aliases.get(name, name)]
        cast = tensor.is_floating_point() and found.is_floating_point
        if found != tensor.dtype and not cast:
            raise CheckpointError(path, f"tensor {name!r} is of {found}, the model has {tensor.dtype}", _REMEDY)
    for prefix, module in model.named_modules():
        names = [f"{prefix}.{name}" if prefix else name for name, p in module._parameters.items() if p is not None]
        kinds = {kind for name in names if (kind := header.dtypes[content.aliases.get(name, name)]).is_floating_point}
        if len(kinds) > 1 and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            raise CheckpointError(path, f"{prefix!r} mixes {' and '.join(sorted(map(str, kinds)))}", _REMEDY)


def _check_sharing(path: str, model: nn.Module, content: Manifest) -> None:
    """A slot that the model reaches under two names must be one tensor in the file, too."""
    slots: dict[tuple[int, str], str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in (*module._parameters, *module._buffers):
            full = f"{prefix}.{name}" if prefix else name
            other = slots.setdefault((id(module), name), full)
            if content.aliases.get(full, full) != content.aliases.get(other, other):
                raise CheckpointError(path, f"{full!r} and {other!r} are one tensor in the model", _REMEDY)


def check_steps(path: str, content: Manifest) -> None:
    """Check the steps of a file against its sites: a partial activation cannot have more channels than before.

    Raises:
        CheckpointError: a step is for other channels.
    """
    sites = {site["name"]: site for site in content.sites}
    for step in content.steps:
        site, spec = sites.get(step["path"]), step["module"]
        if site is None or spec["type"] not in ("PartialActivation", "MaskedActivation", "BlendedActivation"):
            continue
        count = spec.get("keep", spec.get("channels", 0))
        if not isinstance(count, int) or count > site["channels"] or spec.get("axis") != site["axis"]:
            found = f"{spec['type']} at {step['path']!r} is for {count} channels on axis {spec.get('axis')}"
            known = f"the site has {site['channels']} on axis {site['axis']}"
            raise CheckpointError(path, f"{found}, {known}", "Copy or save the file again.")


def check_sites(path: str, model: nn.Module, content: Manifest) -> None:
    """Check what each gate says about the layers around it against these layers, because `collapse` relies on it.

    Raises:
        CheckpointError: a site is not the one that the file's list has, of other channels than its gate, or names a
            layer of another kind or width.
    """
    known = {site["name"]: Site.from_dict(site) for site in content.sites}
    for name, gate in model.named_modules():
        if isinstance(gate, ChannelGate) and gate.site is not None:
            if known and known.get(gate.site.name) != gate.site:
                found = f"what the gate {name!r} says of its site is not what the list of sites says"
                raise CheckpointError(path, found, "Copy or save the file again.")
            for problem in _problems(model, gate, gate.site):
                raise CheckpointError(path, f"the site of the gate {name!r} does not fit: {problem}", _REMEDY)


def _problems(model: nn.Module, gate: ChannelGate, site: Site) -> Iterator[str]:
    ours = (gate.channels, gate.axis, gate.gated_unit)
    theirs = (site.channels, site.axis, site.gated_unit)
    if ours != theirs:
        yield f"it has channels, axis and unit {theirs}, the gate {ours}"
    if site.reason is not None:  # never collapsed
        return
    for port in (site.producer, site.up):
        if port is not None:
            yield from _port_problems(model, port, outputs=True)
    for port in site.consumers:
        yield from _port_problems(model, port, outputs=False)
    for fold in (*site.folds, *site.up_folds, *site.consumer_folds):
        yield from _fold_problems(model, fold)


def _port_problems(model: nn.Module, port: Port, *, outputs: bool) -> Iterator[str]:
    module: Any = _module(model, port.module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != port.dims + 2:
        yield f"{port.module!r} is no {port.kind} layer"
        return
    if type(module) is nn.Linear or type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        width = weight.shape[0] if outputs else weight.shape[1] * getattr(module, "groups", 1)
        if port.transposed or width != port.total:
            yield f"{port.module!r} has {width} features, the site knows {port.total}"
    elif port.dims == 0 and port.total not in weight.shape:
        yield f"{port.module!r} has {tuple(weight.shape)} features, the site knows {port.total}"


def _fold_problems(model: nn.Module, fold: Fold) -> Iterator[str]:
    module = _module(model, fold.module)
    if module is None:
        yield f"there is no {fold.module!r}"
        return
    for child in fold.children:
        if _module(module, child) is None:
            yield f"{fold.module!r} has no {child!r}"
    sizes: dict[str, int] = {}
    norm = (fold.weight, fold.bias, fold.mean, fold.var)
    for name in (*norm, *names_in(fold.scale), *names_in(fold.shift)):
        owner, _, attribute = (name or "").rpartition(".")
        tensor = None if name is None else getattr(_module(model, owner), attribute, None)
        if name is not None and not isinstance(tensor, Tensor):
            yield f"there is no tensor {name!r}"
        elif name in norm and isinstance(tensor, Tensor):
            sizes[str(name)] = tensor.numel()
    if len(set(sizes.values())) > 1:
        yield f"the tensors of {fold.module!r} are of the sizes {sizes}"


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None

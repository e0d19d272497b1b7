"""Put a gate in the place of every activation that can be reached."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from linearize import checks
from linearize.algebra.finite import all_finite
from linearize.errors import CaptureError, ConvertError, UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.graph.capture import Inputs, fake_inputs, normalize_inputs
from linearize.graph.discover import discover
from linearize.graph.parts import discover_parts
from linearize.graph.protect import ALONE
from linearize.graph.state import same_modes
from linearize.nest import copied
from linearize.running.copies import duplicate
from linearize.running.devices import check_whole
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.sites.select import selected
from linearize.sites.site import Site
from linearize.surgery.modes import settle_modes
from linearize.surgery.owners import read_after_write, rewrite_owners
from linearize.surgery.specs import replace_module
from linearize.surgery.subclass import hides_children, keep_attributes
from linearize.tensors import oddity

_log = logging.getLogger(__name__)


@same_modes()
def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Put a `ChannelGate` in the place of every activation. The output stays bitwise equal until an alpha changes.

    Args:
        model: an eager model. Wrappers for data parallelism are removed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of its forward.
            None takes them from the model's library (timm's input size, a transformers config).
        include: glob patterns of site names (`linearize.summary` lists them). Only these sites get a gate.
        exclude: glob patterns of sites that get no gate.
        inplace: change `model` itself instead of a copy.

    Returns:
        A model of the same class with the same state-dict names, plus those of the gates.

    Raises:
        CaptureError: the model does not run on the inputs, or its graph cannot be captured.
        ConvertError: no activation was found, or none of them can get a gate.
        UsageError: a pattern matches no site.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> convert(net, torch.randn(1, 4))[1]
        ChannelGate(
          channels=8, axis=-1
          (activation): ReLU()
        )
    """
    checks.boolean("inplace", inplace)
    model = eager_model(checks.module("model", model))
    check_whole(model)
    with ALONE, torch.inference_mode(mode=False), _plain_default_device(model):
        return _convert(model, example_inputs, include, exclude, inplace=inplace)


@same_modes()
def converted(
    model: nn.Module,
    example_inputs: Any,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> nn.Module:
    """Convert a copy; if no activation can get a gate, give the copy with the reasons on record (`check_gated`)."""
    model = eager_model(model)
    with ALONE, torch.inference_mode(mode=False), _plain_default_device(model):
        return _convert(model, example_inputs, include, exclude, inplace=False, bare=True)


def check_gated(model: nn.Module) -> None:
    """Check that a converted model has a gate.

    Raises:
        ConvertError: none of its activations could get one.
    """
    record = record_of(model)
    if record is not None and not gates(model):
        raise _without_gates(model, record.sites)


def _without_gates(model: nn.Module, sites: Sequence[Site]) -> ConvertError:
    reasons = "; ".join(f"{site.name}: {site.ungated}" for site in sites[:3])
    found = f"none of its {len(sites)} activations can get a gate ({reasons})"
    return ConvertError(type(model).__name__, found, "Change include= or exclude=, or mend what is named.")


def _convert(
    model: nn.Module,
    example_inputs: Any,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    *,
    inplace: bool,
    bare: bool = False,
) -> nn.Module:
    if gates(model):
        raise ConvertError(type(model).__name__, "has gates already", "Convert the original model once.")
    _check_finite(model)
    inputs = on_device(copied(_inputs(model, example_inputs)), model)  # the user's own are neither altered nor kept
    model = _trainable(model, inplace=inplace)
    sites = _sites(model, inputs)
    if not sites:
        remedy = "Convert a model (or the submodule) that has elementwise activations such as nn.ReLU or F.gelu."
        raise ConvertError(type(model).__name__, "no activation was found in it", remedy)
    sites = selected(sites, include, exclude)
    if inplace:
        with unchanged_on_error(model):
            return _put_gates(model, sites, inputs)
    return _put_gates(duplicate(model, ConvertError), sites, inputs, bare=bare)


def _trainable(model: nn.Module, *, inplace: bool) -> nn.Module:
    """The model, or an ordinary copy of one that was built under torch.inference_mode: no gradient may go through that.

    Raises:
        ConvertError: it is to be changed in place.
    """
    if not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        return model
    if inplace:
        found = "was built under torch.inference_mode, so that it can never be trained"
        raise ConvertError(type(model).__name__, found, "Build it outside, or convert a copy: inplace=False.")
    return duplicate(model, ConvertError)


@contextmanager
def _plain_default_device(model: nn.Module) -> Iterator[None]:
    """Where models are just being built on the meta device, a model with values is still run where its values are."""
    tensors = (*model.parameters(), *model.buffers())
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
    if device is None or torch.get_default_device().type != "meta":
        yield
        return
    with device:
        yield


def _sites(model: nn.Module, inputs: Inputs) -> tuple[Site, ...]:
    """The sites of the whole model; of its parts, if its control flow depends on its data."""
    try:
        return discover(model, inputs)
    except CaptureError as error:
        on_meta = any(tensor.device.type == "meta" for tensor in model.parameters())
        if on_meta or "torch.export cannot capture it" not in error.found:
            raise
        sites = discover_parts(model, inputs)
        if not sites:
            raise
        _log.warning("%s; its parts are captured one by one.", error.found)
        return sites


def _put_gates(target: nn.Module, sites: tuple[Site, ...], inputs: Inputs, *, bare: bool = False) -> nn.Module:
    """Rewrite what must be rewritten, and put the gates in, all in place; at least one, unless `bare`."""
    known = record_of(target) or Record()
    sites, steps = rewrite_owners(target, sites, inputs)
    sites = read_after_write(target, sites, inputs)
    replaced = {site.name: target.get_submodule(site.name) for site in sites if site.ungated is None}
    for site in sites:
        if site.ungated is None:
            _put_gate(target, site)
    sites, unfused = settle_modes(target, sites, replaced, inputs)
    steps += _keep_children(target, sites)
    for site in sites:
        gate = target.get_submodule(site.name) if site.ungated is None else None
        if isinstance(gate, ChannelGate):
            gate.site = site
    left = sum(site.ungated is not None for site in sites)
    if left == len(sites) and not bare:
        raise _without_gates(target, sites)
    set_record(target, Record(sites, [*known.steps, *steps, *unfused], fake_inputs(inputs)))
    if left:
        _log.info("%d of %d activations got no gate; linearize.summary says why.", left, len(sites))
    return target


def _keep_children(model: nn.Module, sites: tuple[Site, ...]) -> list[Step]:
    """Let the modules around the gates be copied with them, where their classes would hide a child in a copy."""
    owners = dict.fromkeys(site.name.rpartition(".")[0] for site in sites if site.ungated is None)
    hiding = [path for path in owners if hides_children(model.get_submodule(path))]
    for path in hiding:
        keep_attributes(model.get_submodule(path))
    return [{"path": path, "module": {"type": "Kept"}} for path in hiding]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Inside this context, an exception restores the modules of the model."""
    held = [(module, type(module), dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, children in held:
            module.__class__ = kind
            module._modules.clear()
            module._modules.update(children)
        raise


def on_device(inputs: Inputs, model: nn.Module) -> Inputs:
    """The inputs on the device of the model, if all of the model is on one device."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return inputs
    device = devices.pop()
    moved: Inputs = pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs)
    return moved


def eager_model(model: nn.Module) -> nn.Module:
    """The model inside DataParallel and DistributedDataParallel.

    Raises:
        ConvertError: the model is compiled or scripted, so that there is no eager code to rewrite.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return eager_model(model.module)
    if isinstance(model, torch.jit.ScriptModule):
        found = "is a scripted module, which has no Python code left to rewrite"
        raise ConvertError(type(model).__name__, found, "Pass the eager model.")
    if hasattr(model, "_orig_mod"):
        raise ConvertError(type(model).__name__, "is a compiled model", "Pass the eager model and compile the result.")
    if not isinstance(model, nn.Module):
        raise UsageError("model", f"found {type(model).__name__}", "Pass a torch.nn.Module.")
    return model


def _inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    if example_inputs is None:
        from linearize import zoo

        return zoo.example_inputs(model)
    return normalize_inputs(example_inputs)


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ConvertError(name, "is not initialised", "Run the model once on a batch, then convert it.")
        if parameter.device.type == "meta" or oddity(parameter) is not None:
            continue
        if not all_finite(parameter):
            raise ConvertError(
                name, "holds NaN or Inf", "Mend the weights first: nothing can be proven about such a model."
            )


def _put_gate(model: nn.Module, site: Site) -> None:
    activation = model.get_submodule(site.name)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    with like.device if like is not None else nullcontext():
        gate = ChannelGate(activation, site.channels, site.axis, gated_unit=site.gated_unit, site=site)
    if like is not None:
        gate = gate.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
    replace_module(model, site.name, gate)

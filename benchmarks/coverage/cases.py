"""The models of the sweep: each name, its family, and how a small one of it is built with inputs that fit."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.errors import LinearizeError
from linearize.graph.capture import Inputs

# Smallest first: a reduced input finds the same activations and the same algebra in a fraction of the time.
SIZES = (64, 96, 128, 192, 224, 256)
# A model of more modules than this is tried with fewer layers: it repeats itself.
DEEP = 100
SHALLOW: tuple[dict[str, Any], ...] = (
    {"depth": 2},
    {"depths": (1, 1, 2, 1)},
    {"depths": (1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"depth_multiplier": 0.1},
)


_TAGS = {"pretrained_cfg", "default_cfg", "training"}


@dataclass
class Case:
    """One model to check: in eval mode, in float64, or float32 if it is large, or on the meta device beyond that."""

    model: nn.Module
    inputs: Inputs
    size: str


class DoesNotRun(LinearizeError):
    """The library's own forward does not run as it is built here: nothing to hold `linearize` against."""


def timm_names() -> list[tuple[str, str]]:
    """Every name of timm with its family, which is the file that defines it."""
    import timm

    pairs = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    return sorted(pairs.items(), key=lambda pair: (pair[1], pair[0]))


def timm_case(name: str, megabytes: float, *, shallow: bool) -> Case:
    """A timm model at the smallest size that it takes; on the meta device if its weights would be too large.

    Args:
        name: of the model.
        megabytes: of weights; in float64, if they fit, else in float32.
        shallow: whether a deep model may lose layers; a model that is too large may in any case.

    Raises:
        DoesNotRun: it takes no size at all.
    """
    import timm

    from linearize import zoo

    last: Exception | None = None
    for options, size in _timm_options(name, shallow=shallow):
        try:
            with torch.device("meta"):
                hollow = timm.create_model(name, **options).eval()
            with torch.no_grad():
                hollow(torch.empty(2, *size, device="meta"))
        except Exception as error:  # whatever a model says to a size that it does not take
            last = error
            continue
        weight = 8e-6 * sum(p.numel() for p in hollow.parameters())
        note = "x".join(str(n) for n in size) + "".join(f" {k}={v}" for k, v in options.items() if k != "img_size")
        note += " one block a stage" if shallow and not options.keys() - {"img_size"} and _DECODERS else ""
        if weight > megabytes and not shallow:
            return timm_case(name, megabytes, shallow=True)
        if weight > 2 * megabytes:
            return Case(hollow, ((torch.empty(2, *size, device="meta"),), {}), note)
        dtype = torch.float64 if weight <= megabytes else torch.float32
        torch.manual_seed(0)
        model = zoo.create(f"timm:{name}", pretrained=False, **options).eval().to(dtype)
        return Case(model, ((torch.randn(2, *size, dtype=dtype),), {}), note)
    raise DoesNotRun(name, f"it takes no input size: {last}", "See timm.")


def _timm_options(name: str, *, shallow: bool) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Options and input sizes to try for a timm model, the cheapest first."""
    import timm

    with torch.device("meta"):
        modules = len(list(timm.create_model(name).modules()))
    depth: dict[str, Any] = {}
    for option in SHALLOW if shallow and modules > DEEP else ():
        try:
            with torch.device("meta"):
                fewer = len(list(timm.create_model(name, **option).modules()))
        except Exception as error:  # most models know only one of these options
            del error
            continue
        if fewer < modules:
            depth = option
            break
    if shallow and modules > DEEP and not depth:
        _one_block_a_stage()
        with torch.device("meta"):
            if len(list(timm.create_model(name).modules())) >= modules:
                all_blocks()
    config = timm.models.get_pretrained_cfg(name)
    own = tuple(config.input_size) if config is not None else (3, 224, 224)
    for size in SIZES:
        if len(own) == 3 and size < own[-1]:
            yield {"img_size": size, **depth}, (own[0], size, size)
            yield depth, (own[0], size, size)
    yield depth, own
    if depth:
        yield {}, own


_DECODERS: dict[Any, Any] = {}


def _one_block_a_stage() -> None:
    """EfficientNets take no option for their depth: their descriptions are read with one block a stage.

    Until `all_blocks`: the model is loaded again, too.
    """
    from timm.models import efficientnet, hardcorenas, mobilenetv3

    for module in (efficientnet, hardcorenas, mobilenetv3):
        decode = _DECODERS.setdefault(module, module.decode_arch_def)
        module.decode_arch_def = functools.partial(_shorter, decode)


def _shorter(decode: Any, arch: Any, *_: Any, **options: Any) -> Any:
    return decode(arch, 0.01, **{name: value for name, value in options.items() if name != "depth_multiplier"})


def all_blocks() -> None:
    """Descriptions of EfficientNets are read as they are again."""
    for module, decode in _DECODERS.items():
        module.decode_arch_def = decode
    _DECODERS.clear()


def transformers_names() -> list[tuple[str, str]]:
    """Every model type of transformers with its family, which is the folder that defines it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    return sorted((name, model_type_to_module_name(name)) for name in CONFIG_MAPPING_NAMES)


def transformers_case(model_type: str, levels: int = 5) -> Case:
    """The smallest model of a type whose own forward runs, with random weights and inputs that fit.

    Raises:
        DoesNotRun: none of the sizes does; with the reason of the first.
    """
    from linearize.zoo import example_inputs, tiny_models

    torch.manual_seed(0)
    first = ""
    try:
        for level, model in tiny_models.tiny_models(model_type, levels=range(levels)):
            try:
                args, kwargs = example_inputs(model)
                with torch.no_grad():
                    copy.deepcopy(model)(*args, **kwargs)  # some models keep a cache, of the dtype of their first run
            except Exception as error:  # whatever one of hundreds of models says to a size that it does not take
                first = first or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            return _doubled(model, (args, kwargs), f"{type(model).__name__}, level {level}")
    except LinearizeError as error:
        first = first or error.found
    raise DoesNotRun(model_type, first, "See linearize/zoo/tiny.py.")


def _doubled(model: nn.Module, inputs: Inputs, size: str) -> Case:
    """In float64, unless the model's own code insists on single precision."""
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        with torch.no_grad():
            model.double()(*wide[0], **wide[1])
    except Exception as error:  # a dtype written into its forward
        del error
        return Case(model.float(), inputs, size)
    return Case(model, wide, size)


def signature(model: nn.Module) -> str:
    """What tells two models apart: classes, settings and shapes of all modules, as one short text.

    Names of a zoo often differ in weights or input size only: the same model then, at the size of the sweep.
    """
    found = hashlib.sha256()
    for path, module in model.named_modules():
        found.update(f"\n{path}:{type(module).__module__}.{type(module).__qualname__}".encode())
        tensors = {**module._parameters, **module._buffers}
        found.update(str([(name, tuple(t.shape)) for name, t in tensors.items() if t is not None]).encode())
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in _TAGS}
        found.update(str([(name, _plain(plain[name])) for name in sorted(plain)]).encode())
    return found.hexdigest()[:16]


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return str([_plain(item) for item in value])
    if isinstance(value, dict):
        return str({str(key): _plain(item) for key, item in value.items()})
    if isinstance(value, functools.partial):
        return str((_plain(value.func), _plain(value.args), _plain(value.keywords)))
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    simple = value is None or isinstance(value, (bool, int, float, str, torch.Size, torch.dtype))
    return repr(value) if simple else getattr(value, "__qualname__", type(value).__qualname__)

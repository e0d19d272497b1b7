"""What linearize knows about timm: example inputs, and how to build a model again from its name."""

from __future__ import annotations

import contextlib
import difflib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.zoo.building import affordable
from linearize.zoo.plain import SIMPLE, is_plain, pack, unpack
from linearize.zoo.sealed import sealed
from linearize.zoo.timm_arguments import NEVER, check_arguments


def is_timm(model: nn.Module) -> bool:
    """Whether the model's class, or a class that it derives from, comes from timm."""
    return "timm" in sys.modules and any(cls.__module__.split(".")[0] == "timm" for cls in type(model).__mro__)


def example_inputs(model: nn.Module, *, batch: int, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of random images of the size that the model was built for; device and dtype of ``like``."""
    size = affordable(type(model).__name__, batch, *input_size(model))
    return (torch.randn(size, device=like.device, dtype=like.dtype),), {}


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width: from the model itself where it says, else from its configuration.

    Examples:
        >>> import timm
        >>> input_size(timm.create_model("test_vit", img_size=96, in_chans=1))
        (1, 96, 96)
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, *size = config.get("input_size", (3, 224, 224))
    traits = getattr(model, "_traits", None) or {}
    patches = getattr(model, "patch_embed", None)
    own = getattr(patches, "img_size", None) or traits.get("img_size")
    if own is not None:
        size = list(own) if isinstance(own, (tuple, list)) else [own, own]
    first = getattr(model, "in_chans", None) or _first_channels(model)
    return int(first or channels), int(size[0]), int(size[1])


def _first_channels(model: nn.Module) -> int | None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None


def candidates(model: nn.Module) -> list[dict[str, Any]]:
    """Recipes that may build the model, the most informative first. The caller checks them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else None
    if not name:
        return []
    tagged = f"{name}.{config['tag']}" if config.get("tag") else name
    built = {key: value for key, value in getattr(model, "_model_args", {}).items() if value is not None}
    now = dict(built)
    for key in ("num_classes", "in_chans", "img_size", "global_pool"):
        value = _current(model, key)
        if value is not None:
            now[key] = value
    found = []
    for arguments in (built, now, {key: now[key] for key in ("num_classes",) if key in now}, {}):
        kwargs = {key: value for key, value in arguments.items() if not NEVER.fullmatch(key)}
        recipe = {"library": "timm", "name": tagged, "kwargs": pack(kwargs)}
        if is_plain(kwargs, simple=True) and recipe not in found:
            found.append(recipe)
    return found


def _current(model: nn.Module, key: str) -> Any:
    if key == "img_size":
        return (getattr(model, "_traits", None) or {}).get("img_size")
    if key == "global_pool":
        pool = getattr(model, "global_pool", None)
        return pool if isinstance(pool, str) else None
    value = getattr(model, key, None)
    return value if isinstance(value, int) else None


def build(recipe: dict[str, Any]) -> nn.Module:
    """Build the model of a recipe, without pretrained weights.

    Raises:
        UsageError: the recipe is not one of ours, or asks for a name that timm does not know.
    """
    name = recipe.get("name")
    if not isinstance(name, str) or not SIMPLE.fullmatch(name):
        raise UsageError("recipe", f"found the model name {name!r:.80}", "The recipe was not written by linearize.")
    kwargs = check_arguments(name, unpack(recipe.get("kwargs", {})))
    with contextlib.suppress(ImportError):
        import timm  # noqa: F401 - with all that it imports, before the doors are shut
    with sealed():
        return create(name, pretrained=False, **kwargs)


def create(name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with an error that lists close names.

    Raises:
        UsageError: timm is not installed, does not know the name, or cannot fetch the weights.
    """
    try:
        import timm
    except ImportError as error:
        remedy = 'Install it: pip install "linearize[timm]".'
        raise UsageError(f"timm:{name}", "timm is not installed", remedy) from error
    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
        remedy = f"Close names: {', '.join(close)}." if close else "timm.list_models() lists the names."
        raise UsageError(f"timm:{name}", "timm has no model of this name", remedy)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except UsageError:
        raise
    except Exception as error:  # whatever the constructor of one of a thousand models raises
        remedy = "Check the arguments" + (", and that the model hub can be reached." if pretrained else ".")
        raise UsageError(f"timm:{name}", f"it cannot be built: {error}", remedy) from error
    return model

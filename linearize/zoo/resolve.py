"""Create a model from the text that a user types."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from linearize.errors import UsageError
from linearize.zoo import timm_models, transformers_models
from linearize.zoo.plain import is_plain, pack

_FORMS = "Pass timm:NAME, hf:FOLDER_OR_NAME, package.module:callable, or the path of a .safetensors file."


def create(spec: str, *, pretrained: bool | None = None, **kwargs: Any) -> nn.Module:
    """Create the model that ``spec`` names, in eval mode.

    ``package.module:callable`` imports that module and calls the callable. So it runs code of the user's choice, like
    ``python -m``. For files from strangers, use only `linearize.load`.

    Args:
        spec: ``timm:NAME``, ``hf:FOLDER_OR_NAME`` or ``package.module:callable``.
        pretrained: True gives pretrained weights, False random ones. None gives random weights for timm. For
            transformers it gives the weights of the folder or name, if there are any.
        **kwargs: passed on to ``timm.create_model``, to the configuration, or to the callable. Those for timm
            are remembered, so that a saved file can build the model again.

    Raises:
        UsageError: the spec has another form, or the model that it names cannot be created.

    Examples:
        >>> model = create("timm:test_vit", num_classes=10)
        >>> type(model).__name__, model.num_classes
        ('VisionTransformer', 10)
    """
    library, colon, name = spec.partition(":")
    if colon and library == "timm" and name:
        model = timm_models.create(name, pretrained=bool(pretrained), **kwargs).eval()
        if is_plain(kwargs, simple=True):
            model.__dict__["_linearize_recipe"] = {"library": "timm", "name": name, "kwargs": pack(kwargs)}
        return model
    if colon and library == "hf" and name:
        return transformers_models.create(name, pretrained=pretrained, **kwargs)
    if colon and library and name:
        return _call(spec, library, name, kwargs)
    found = "found a folder" if Path(spec).is_dir() else f"found {spec!r}, which names no model"
    raise UsageError(
        "model",
        found,
        f"Write hf:{spec} for a transformers folder. {_FORMS}" if "folder" in found else _FORMS,
    )


def _call(spec: str, module_name: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The model that a callable of the user's makes: his module is imported and run, by design."""
    if not all(part.isidentifier() for text in (module_name, name) for part in text.split(".")):
        raise UsageError("model", f"found {spec!r:.80}, which names no module and callable", _FORMS)
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
    except Exception as error:  # the module is the user's: anything can happen while it is imported
        found = f"it cannot be imported: {type(error).__name__}: {error!s:.200}"
        raise UsageError(spec, found, _FORMS) from error
    try:
        model = target(**kwargs)
    except Exception as error:  # the callable is the user's: anything can happen in it
        raise UsageError(spec, f"calling it failed: {type(error).__name__}: {error}", "Check the callable.") from error
    if not isinstance(model, nn.Module):
        raise UsageError(spec, f"it returned {type(model).__name__}", "The callable must return a torch.nn.Module.")
    return model.eval()

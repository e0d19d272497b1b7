"""What linearize knows about building transformers models: recipes, and models by folder or name."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from linearize.errors import UsageError
from linearize.zoo.building import NO_LIMIT, Limit
from linearize.zoo.plain import IDENTIFIER, is_plain
from linearize.zoo.sealed import sealed
from linearize.zoo.transformers_recipe import DROPPED, clean, clean_generation

# The library's own code only: others are fetched as kernels from a repository.
_IMPLEMENTATIONS = {
    "attn": {"eager", "sdpa"},
    "experts": {"eager", "batched_mm", "grouped_mm"},
}
_MODELING = re.compile(r"transformers\.models\.[a-z0-9_]+\.(modeling|configuration)_[a-z0-9_]+", re.ASCII)


def is_transformers(model: nn.Module) -> bool:
    """Whether the model's class derives from transformers' ``PreTrainedModel``."""
    if "transformers" not in sys.modules:
        return False
    return any(cls.__name__ == "PreTrainedModel" and _root(cls) == "transformers" for cls in type(model).__mro__)


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress of reading and writing files."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _root(cls: type) -> str:
    return cls.__module__.split(".")[0]


def candidates(model: Any) -> list[dict[str, Any]]:
    """The recipe of a model whose class and configuration are transformers' own; the caller verifies it."""
    names = _public_name(type(model)), _public_name(type(model.config))
    if None in names:
        return []
    recipe = {
        "library": "transformers",
        "class": names[0],
        "config_class": names[1],
        "config": _plain_config(model.config),
        "implementations": _implementations(model.config),
    }
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        recipe["generation"] = generation.to_dict()
    try:
        return [json.loads(json.dumps(recipe))]
    except (TypeError, ValueError):
        return []


def _plain_config(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in DROPPED}


def _public_name(cls: type) -> str | None:
    """The class's name in the transformers namespace, else ``module:name`` if it is theirs, else None."""
    import transformers

    if _root(cls) != "transformers":
        return None
    if getattr(transformers, cls.__name__, None) is cls:
        return str(cls.__name__)
    if _MODELING.fullmatch(cls.__module__) and getattr(sys.modules[cls.__module__], cls.__name__, None) is cls:
        return f"{cls.__module__}:{cls.__name__}"
    return None


def _find(name: object, base_name: str) -> Any:
    """The class that `_public_name` named, only if it is the library's and derives from ``base_name``."""
    import transformers

    base = getattr(transformers, base_name)
    module, _, cls_name = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    if IDENTIFIER.fullmatch(cls_name) and (not module or _MODELING.fullmatch(module)):
        try:
            cls = getattr(importlib.import_module(module) if module else transformers, cls_name, None)
        except (ImportError, RuntimeError):
            cls = None
        if isinstance(cls, type) and issubclass(cls, base) and _root(cls) == "transformers":
            return cls
    remedy = "Install the transformers version that wrote the file, or a newer one."
    raise UsageError("recipe", f"transformers has no {base_name} named {name!r:.80}", remedy)


def _implementations(config: Any, prefix: str = "") -> dict[str, str]:
    """Which attention and experts code each (sub)configuration asks for, by ``path/kind``."""
    found = {}
    for kind, allowed in _IMPLEMENTATIONS.items():
        value = getattr(config, f"_{kind}_implementation", None)
        if value in allowed:
            found[f"{prefix}{kind}"] = value
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if hasattr(part, "to_dict"):
            found.update(_implementations(part, f"{prefix}{key}/"))
    return found


def _set_implementations(config: Any, wanted: dict[str, str]) -> None:
    for where, value in sorted(wanted.items(), key=lambda item: item[0].count("/")):
        *path, kind = where.split("/")
        part = config
        for key in path:
            part = getattr(part, key, None) if IDENTIFIER.fullmatch(key) else None
        if part is not None and value in _IMPLEMENTATIONS.get(kind, ()):
            setattr(part, f"_{kind}_implementation", value)


def build(recipe: dict[str, Any], limit: Limit = NO_LIMIT) -> nn.Module:
    """Build the model of a recipe with weights as the library initialises them.

    Raises:
        UsageError: the recipe names a class that is not transformers' own, or settings that it does not take.
    """
    try:
        import transformers
    except ImportError as error:
        remedy = 'Install it: pip install "linearize[transformers]".'
        raise UsageError("recipe", "transformers is not installed", remedy) from error
    cls = _find(recipe.get("class"), "PreTrainedModel")
    config_cls = _find(recipe.get("config_class"), "PreTrainedConfig")
    settings, wanted = recipe.get("config"), recipe.get("implementations", {})
    if not isinstance(settings, dict) or not isinstance(wanted, dict) or not _are_texts(wanted):
        raise UsageError(cls.__name__, "the recipe has no configuration", "The recipe was not written by linearize.")
    try:
        cleaned = clean(settings, config_cls, limit)
        with sealed():
            config = config_cls.from_dict(cleaned)
            for key in cleaned.keys() - config.to_dict().keys():
                # Settings that the constructor drops as not its own, such as use_cache of an encoder.
                if not hasattr(config, key) and is_plain(cleaned[key], simple=True):
                    setattr(config, key, cleaned[key])
            _set_implementations(config, wanted)
            model: nn.Module = cls(config)
            if recipe.get("generation") is not None and hasattr(model, "generation_config"):
                generation = clean_generation(recipe["generation"], transformers.GenerationConfig)
                model.generation_config = transformers.GenerationConfig.from_dict(generation)
    except UsageError:
        raise
    except Exception as error:  # whatever the constructor of one of hundreds of models raises
        remedy = "Use the transformers version that wrote the recipe."
        raise UsageError(cls.__name__, f"it cannot be built from its configuration: {error}", remedy) from error
    return model


def _are_texts(wanted: dict[str, Any]) -> bool:
    return all(isinstance(text, str) and len(text) < 1000 for item in wanted.items() for text in item)


def create(name: str, *, pretrained: bool | None = None, **kwargs: Any) -> nn.Module:
    """A model from a local folder (``config.json``, with or without weights) or a name on the model hub.

    Args:
        name: the folder or name.
        pretrained: load weights; None loads them unless the folder has none.
        **kwargs: settings that override the configuration's.

    Raises:
        UsageError: transformers is not installed, the folder holds no model, or the hub cannot be reached.
    """
    try:
        import transformers
    except ImportError as error:
        remedy = 'Install it: pip install "linearize[transformers]".'
        raise UsageError(f"hf:{name}", "transformers is not installed", remedy) from error
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"hf:{name}", "the folder holds no config.json", "Pass the folder that save_pretrained wrote.")
    if pretrained is None:
        weights = ("*.safetensors", "*.bin", "*.safetensors.index.json")
        pretrained = not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in weights)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **kwargs)
        cls = _class_for(config)
        auto = {} if cls is not transformers.AutoModel else {"trust_remote_code": False}
        if pretrained:
            model = cls.from_pretrained(source, config=config, **auto)
        else:
            model = cls.from_config(config, **auto) if auto else cls(config)
    except Exception as error:  # missing files, no network, broken weights: one clear line each
        found = f"it cannot be loaded: {_first_line(error)}"
        remedy = "Pass a local folder that save_pretrained wrote, or check the name and the network."
        raise UsageError(f"hf:{name}", found, remedy) from error
    return model.eval()  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _class_for(config: Any) -> Any:
    """The class that the configuration names as the model's architecture, else ``AutoModel``."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.AutoModel


def autos_of(kind: type[nn.Module], config: type) -> list[str]:
    """Transformers' classes by which a model of a class is loaded."""
    import transformers

    found = []
    for name in sorted(dir(transformers)):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and config in mapping:
            made = mapping[config]
            if kind in (made if isinstance(made, tuple) else (made,)):
                found.append(name)
    return found or ["AutoModel"]

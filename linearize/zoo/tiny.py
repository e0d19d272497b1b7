"""Tiny transformers models of any type. Their configurations come from the library's own, with every number made small.

The meaning of a number in a configuration is read from its name: a width, a number of layers, of heads, of experts, a
vocabulary, an image's side. Equal roles get equal sizes. So numbers that must match still match, also between the parts
of a composed model. If that fails, gentler levels shrink less.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from linearize.errors import UsageError
from linearize.zoo.tiny_roles import (
    EXPERTS,
    FIRST_TOKEN,
    HEAD_DIM,
    LAYERS,
    LEVEL_ROLES,
    NAMES_DERIVED,
    PATCHES,
    POSITIONS,
    RANK,
    REQUIRED,
    ROLES,
    SIZES,
    TOKEN,
    VOCABULARY,
)

LEVELS = 5
"""0 shrinks all roles; 1, 2 keep images, positions, lists, heads' widths; 3 shrinks depth and experts; 4 nothing."""


"""Settings that some types leave unset, and need."""


def tiny_config(model_type: str, level: int = 0) -> Any:
    """A small configuration of a transformers model type.

    Args:
        model_type: a key of transformers' ``CONFIG_MAPPING``.
        level: how gentle to be, 0 to ``LEVELS - 1``.

    Raises:
        UsageError: there is no such type, or its configuration cannot be made from defaults, or not that small.

    Examples:
        >>> config = tiny_config("bert")
        >>> config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size
        (64, 2, 4, 256)
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UsageError(model_type, "transformers has no such model type", "See transformers' CONFIG_MAPPING.")
    cls = CONFIG_MAPPING[model_type]
    try:
        return cls(**_Shrinker(level).overrides(cls()))
    except Exception as error:  # hundreds of classes, each with checks of its own
        found = f"no configuration of size level {level}: {type(error).__name__}: {error}"
        raise UsageError(model_type, found, "Try a gentler level.") from error


class _Shrinker:
    """Shrinks one configuration and its parts; token ids get the same new value wherever they stand."""

    def __init__(self, level: int) -> None:
        self.roles = LEVEL_ROLES[level]
        self.width, self.inner, self.heads = SIZES[level]
        self.tokens: dict[int, int] = {}

    def overrides(self, config: Any, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """The arguments that make a small configuration of the class of ``config``.

        Only what changes is passed: whatever the constructor derives from it, it shall derive again.
        """
        found = dict(given or {})
        specs = getattr(config, "sub_configs_defaults", None) or {}
        listed = any(isinstance(getattr(config, name, None), (list, tuple)) for name in ("num_heads", "depths"))
        for name, default in {**dict.fromkeys(found), **_fields(config)}.items():
            value = found[name] if name in found else _value(config, name)
            if hasattr(value, "to_dict"):
                spec = specs.get(name)
                same = getattr(spec, "model_type", None) == getattr(value, "model_type", "")
                own = (getattr(spec, "init_kwargs", None) or {}) if same else {}
                kwargs = {**_changed(value), **{key: item for key, item in own.items() if item is not None}}
                part = {"model_type": value.model_type} if getattr(value, "model_type", None) else {}
                found[name] = {**self.overrides(value, kwargs), **part}
                continue
            if value is None and name in REQUIRED and self.roles:
                found[name] = REQUIRED[name]
            if value is None and name == "layer_types" and "layers" in self.roles:
                found[name] = ["full_attention"] * LAYERS
            if isinstance(value, dict) and "mrope_section" in value and "head_dim" in self.roles:
                found[name] = {**value, "mrope_section": _sections(value["mrope_section"])}
            derived = default is None and name not in found and name != "attention_types"
            if value is None or isinstance(value, (bool, str, dict)) or derived:
                continue
            new = self._shrink(name, value, config, listed=listed)
            if new != value:
                found[name] = new
        return found

    def _shrink(self, name: str, value: Any, config: Any, *, listed: bool) -> Any:
        if TOKEN.fullmatch(name) and "vocabulary" in self.roles:
            return self._token(value)
        role = next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)), "keep")
        if role not in self.roles:
            return value
        if role == "scale" and isinstance(value, float):
            return min(value, 1.0)
        if role == "indices" and isinstance(value, (list, tuple)) and _depth(config):
            return type(value)(i if i < 0 else i * _layers(config) // _depth(config) for i in value)
        if isinstance(value, (list, tuple)):
            return _shrink_list(role, value, widths=self.width == SIZES[0][0])
        if type(value) is not int or value <= 0:
            return value
        if role == "image":
            return _image_side(value, config)
        if listed and role in ("width", "inner"):
            return max(value // 8, 8) if value % 8 == 0 and self.width == SIZES[0][0] else value
        return self._shrink_number(role, value, config)

    def _shrink_number(self, role: str, value: int, config: Any) -> int:
        if role == "kv_heads":
            heads = next(
                (getattr(config, n) for n in ("num_attention_heads", "n_head") if getattr(config, n, 0)), value
            )
            return 1 if value == 1 else self.heads // 2 if isinstance(heads, int) and value < heads else self.heads
        targets = {
            "layers": _layers(config),
            "few_layers": 1,
            "no_layers": 0,
            "mamba_heads": self._mamba_heads(config),
            "heads": self._mamba_heads(config) if hasattr(config, "expand") else self.heads,
            "rope_dim": HEAD_DIM // 2,
            "qk_dim": HEAD_DIM + HEAD_DIM // 2,
            "head_dim": HEAD_DIM,
            "rank": RANK,
            "active_experts": 2,
            "expert_groups": 2,
            "active_groups": 1,
            "experts": EXPERTS,
            "vocabulary": VOCABULARY,
            "positions": POSITIONS,
            "frames": 32,
            "inner": self.inner,
            "width": self.width,
            "upsampling": self.width,
        }
        return min(value, targets.get(role, value))

    def _mamba_heads(self, config: Any) -> int:
        """Heads of a state space layer: they fill the expanded width."""
        size = HEAD_DIM
        if "head_dim" not in self.roles:
            names = ("mamba_d_head", "mamba_head_dim", "head_dim")
            size = next((value for name in names if isinstance(value := _value(config, name), int)), HEAD_DIM)
        expand = _value(config, "mamba_expand") or _value(config, "expand") or 2
        return max(int(expand * self.width) // size, 1)

    def _token(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._token(item) for item in value)
        if type(value) is not int or value < FIRST_TOKEN:
            return value
        return self.tokens.setdefault(value, FIRST_TOKEN + len(self.tokens))


def _fields(config: Any) -> dict[str, Any]:
    """Names and defaults of what the configuration's class declares."""
    if not dataclasses.is_dataclass(config):
        return {name: getattr(config, name) for name in config.to_dict()}
    return {field.name: field.default for field in dataclasses.fields(config) if not field.name.startswith("_")}


def _value(config: Any, name: str) -> Any:
    """A setting; None also where it differs from layer to layer and cannot be read as one."""
    try:
        return getattr(config, name, None)
    except Exception:  # configurations of some types refuse
        return None


def _sections(sections: Any) -> list[int]:
    """Parts of half a head for the axes of multimodal rotary embeddings, in the given proportions."""
    total = sum(sections)
    scaled = [max(1, HEAD_DIM // 2 * part // total) for part in sections]
    scaled[0] += HEAD_DIM // 2 - sum(scaled)
    return scaled


def _changed(config: Any) -> dict[str, Any]:
    """What a part of a composed configuration has other than its own class by default."""
    found = {}
    for name, default in _fields(config).items():
        value = _value(config, name)
        missing = isinstance(default, dataclasses._MISSING_TYPE)
        named = isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        if default is None or missing:
            # A derived value is left to the constructor; a name cannot be derived.
            if named and value and name not in NAMES_DERIVED:
                found[name] = value
        elif value != default and (
            isinstance(value, (bool, int, float, str))
            or (isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)))
        ):
            found[name] = value
    return found


def _shrink_list(role: str, value: Any, *, widths: bool) -> Any:
    numbers = all(type(item) is int for item in value)
    if role == "layer_kinds":  # [[[kind, ...], how often], ...]
        return [[kinds, 1] for kinds, _ in value]
    if role == "depths" and numbers:
        return type(value)(min(item, 2) for item in value)
    if role == "width" and widths and numbers and all(item % 8 == 0 and item >= 64 for item in value):
        return type(value)(item // 8 for item in value)
    if role == "image" and numbers:
        return type(value)(min(item, 64) for item in value)
    return value


def _image_side(value: int, config: Any) -> int:
    patch = getattr(config, "patch_size", None)
    patch = patch[-1] if isinstance(patch, (list, tuple)) and patch else patch
    if type(patch) is int and patch > 8:
        return min(value, PATCHES * patch)
    return min(value, 64)


def _depth(config: Any) -> int:
    """How many layers the configuration has; 0 if it does not say with one number."""
    found = _value(config, "num_hidden_layers") or _value(config, "depth")
    return found if isinstance(found, int) else 0


def _layers(config: Any) -> int:
    """As many layers as it takes to have one of each kind, where kinds alternate, or one per index that is used."""
    for name in ("out_indices", *_fields(config)):
        value = _value(config, name)
        if re.fullmatch(ROLES["indices"], name) and isinstance(value, (list, tuple)) and _depth(config):
            return max(LAYERS, len(value))
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if isinstance(kinds, (list, tuple)) and len(set(map(str, kinds))) > 1:
        last = max(list(kinds).index(kind) for kind in set(kinds))
        return max(LAYERS, min(last + 1, 8))
    return LAYERS

"""What a configuration from a file may say: an allow-list by place and type, checked before the library sees it.

Names are resolved as the library would resolve them (`attribute_map` of its own classes; a file may not bring one).
Everything that could make the library open, fetch, run or ask for something is refused or left out, at any depth.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

from linearize.errors import UsageError
from linearize.zoo.building import NO_LIMIT, Limit
from linearize.zoo.timm_arguments import check_arguments
from linearize.zoo.transformers_settings import class_of, defaults_of, fits_default, is_numbers, settings_of

__all__ = ["DROPPED", "clean", "clean_generation"]

DROPPED = {
    "_commit_hash", "_name_or_path", "auto_map", "code_revision", "custom_code", "kernel_config", "name_or_path",
    "quantization_config", "revision", "trust_remote_code", "use_kernels",
}  # fmt: skip
"""Settings that say where a model came from, or how to fetch more: a file needs none of them, a model neither."""

# What stands for a file, a folder, an address or a repository, or says that something is to be fetched.
_REACHING = re.compile(
    r"(.*_)?(path|paths|file|files|filename|dir|directory|folder|url|urls|uri|repo|repo_id|hub|hub_id|weights|"
    r"checkpoint|backbone|state_dict|proxies|subfolder|assistant_model)|.*pretrained.*|.*checkpoint_.*"
)
_ATTENTION = re.compile(r"_?(attn|experts)_implementation.*")
_FORBIDDEN = {"attribute_map", "sub_configs", "sub_configs_defaults"}
_LABELS = {"id2label", "label2id", "label_names", "lang_to_id", "prefix", "stop_strings", "task_to_id"}
_DTYPES = {
    "float16", "float32", "float64", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool", "complex64",
    "float8_e4m3fn", "float8_e5m2", "auto", "half", "float", "double",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
_WORD = re.compile(r"(?!\.)[\w.+\-]{0,100}", re.ASCII)
_KEY = re.compile(r"[\w .+\-]{1,100}", re.ASCII)
# Numbers of things that a constructor makes one after the other.
_COUNTS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks|stages|groups|heads|experts|repeats)|(\w+_)?(layers|depths?)")
_CLASSES = {"num_labels", "num_classes"}
_UNBOUNDED = re.compile(r".*(theta|base|seed|_ids?|_index|max_length|length|offset).*")
_SHAPES = 2**25
_MOST = 10_000
_MOST_EXPERTS = 2**15  # Doge has 16 384 of them by default
_DEPTH = 12


def clean(settings: Any, cls: Any, limit: Limit = NO_LIMIT) -> dict[str, Any]:
    """Settings of a configuration class, without those that say where to fetch something.

    Args:
        settings: from a file.
        cls: the class, transformers' own.
        limit: of the model that is to be built.

    Raises:
        UsageError: a setting is not one of the class, not of its type, or reaches outside.
    """
    return _Cleaner(limit).config(settings, cls, 0)


def clean_generation(settings: Any, cls: Any) -> dict[str, Any]:
    """Settings of a generation configuration, held to the same rules.

    Raises:
        UsageError: a setting is not plain, or reaches outside.
    """
    cleaner = _Cleaner(NO_LIMIT)
    known = {*vars(cls())}
    found = {}
    for key, value in cleaner.mapping(settings, "generation").items():
        if key in DROPPED:
            continue
        if key not in known and (key.startswith("_") or not _NAME.fullmatch(key) or hasattr(cls, key)):
            raise _refused(key, value, "a generation setting")
        found[key] = cleaner.value(value, key, 0)
    return found


class _Cleaner:
    """Walks through the settings of one recipe, and counts them."""

    def __init__(self, limit: Limit) -> None:
        self.limit, self.left = limit, 500_000

    def config(self, settings: Any, cls: Any, depth: int) -> dict[str, Any]:
        """Settings of a class, parts of it included."""
        given = self.mapping(settings, cls.__name__)
        own: dict[str, str] = getattr(cls, "attribute_map", {})
        parts: dict[str, Any] = getattr(cls, "sub_configs", {}) or {}
        found: dict[str, Any] = {}
        for key, value in given.items():
            name = own.get(key, key)
            if key in DROPPED or name in DROPPED or any(map(_ATTENTION.fullmatch, (key, name))):
                continue
            if key == "model_type":
                if getattr(cls, "model_type", "") and value != cls.model_type:
                    raise _refused(key, value, f"{cls.model_type!r}, as {cls.__name__} has it")
                found[key] = self.value(value, key, depth)
                continue
            self._place(key, name, cls)
            if not fits_default(value, defaults_of(cls).get(name)):
                raise _refused(key, value, f"of the kind of {defaults_of(cls)[name]!r}, which {cls.__name__} has")
            if name == "model_args" and isinstance(value, dict):
                architecture = given.get("architecture", getattr(cls, "architecture", ""))
                found[key] = check_arguments(str(architecture)[:100], value)
            elif name == "backbone" and isinstance(value, str) and _timm_backbone(cls, given) and _in_timm(value):
                found[key] = value
            elif isinstance(value, dict) and (inner := class_of(parts.get(name), value)) is not None:
                found[key] = self.config(value, inner, depth + 1)
            elif (reaching := _reach(key, value) or _reach(name, value)) is not None:
                found.update(reaching)
            else:
                found[key] = self.value(value, name, depth + 1)
        return found

    def _place(self, key: str, name: str, cls: Any) -> None:
        """Refuse what is no setting of the class, nor could be one that a user has added."""
        if not _NAME.fullmatch(key) or key in _FORBIDDEN or name in _FORBIDDEN:
            raise _refused(key, "a setting", f"one that a file may give {cls.__name__}")
        if key not in settings_of(cls) and key not in defaults_of(cls):
            taken = inspect.getattr_static(cls, key, None)
            free = taken is None or (isinstance(taken, property) and taken.fset is not None)
            if key.startswith("_") or not free:
                raise _refused(key, "a setting", f"one of {cls.__name__}")

    def mapping(self, value: Any, where: str) -> dict[str, Any]:
        """A dict with texts as keys, of bounded length."""
        if not isinstance(value, dict):
            raise _refused(where, value, "names with values")
        return {self._text(key, where): item for key, item in value.items()}

    def value(self, value: Any, place: str, depth: int) -> Any:
        """A plain value at a place, by its type."""
        self.left -= 1
        if depth > _DEPTH or self.left < 0:
            raise _refused(place, "a nest", "of bounded size; the configuration is nested too deeply, or too long")
        if value is None or type(value) is bool:
            return value
        if type(value) is int:
            self._count(value, place)
            return value
        if type(value) is float:
            if math.isnan(value):
                raise _refused(place, value, "a number")
            return value
        if isinstance(value, str):
            return self._string(value, place)
        if isinstance(value, (list, tuple)):
            return [self.value(item, place, depth + 1) for item in value]
        if isinstance(value, dict):
            return self._nested(value, place, depth)
        raise _refused(place, value, "plain data")

    def _nested(self, value: dict[Any, Any], place: str, depth: int) -> dict[str, Any]:
        if (cls := class_of(None, value)) is not None:
            return self.config(value, cls, depth + 1)
        if place == "model_args":
            raise _refused(place, value, "beside an architecture")
        found: dict[str, Any] = {}
        for key, item in self.mapping(value, place).items():
            if place in _LABELS:
                found[key] = self.value(item, place, depth + 1)
            elif key not in DROPPED and not _ATTENTION.fullmatch(key):
                if key in _FORBIDDEN or key.startswith("_") or not _KEY.fullmatch(key):
                    raise _refused(f"{place}.{key}", "a setting", "one that a file may give")
                reaching = _reach(key, item)
                found.update({key: self.value(item, key, depth + 1)} if reaching is None else reaching)
        return found

    def _count(self, value: int, place: str) -> None:
        most: float = 2**53
        if _COUNTS.fullmatch(place):
            most = _MOST_EXPERTS if place.endswith("experts") else _MOST
        elif place in _CLASSES:
            most = _MOST + self.limit.elements / 1000
        elif not _UNBOUNDED.fullmatch(place):
            most = max(_SHAPES, self.limit.elements)
        if abs(value) > most:
            raise _refused(place, value, f"at most {most:.0f}")

    def _string(self, value: str, place: str) -> str:
        if place in _LABELS:
            return self._text(value, place)
        if place.endswith("dtype"):
            if value not in _DTYPES:
                raise _refused(place, value, "the name of a dtype")
        elif place == "architecture":
            if not _in_timm(value):
                raise _refused(place, value, "an architecture of timm")
        elif not _WORD.fullmatch(value) and value not in _TEXTS:
            raise _refused(place, value, "a plain word; it may point elsewhere")
        return value

    def _text(self, value: Any, place: str) -> str:
        self.left -= 1
        if not isinstance(value, str) or len(value) > 2000 or not value.isprintable() or self.left < 0:
            raise _refused(place, value, "a printable text")
        return value


_TEXTS = {" // ", " / "}
"""Defaults of the library that are no words: separators that a retriever puts between texts."""


def _reach(key: str, value: Any) -> dict[str, Any] | None:
    """What stands in the place of a setting that may reach outside; None if this one does not.

    Numbers do not reach anywhere; a text does, and so does the wish to fetch something.
    """
    if not _REACHING.fullmatch(key):
        return None
    if value is None or value is False or value in ("", [], {}):
        return {key: value}
    if "pretrained" in key and not (isinstance(value, list) and all(type(item) is int for item in value)):
        return {key: False} if key.startswith("use_pretrained") else {}
    if isinstance(value, bool):
        return {key: value}
    return None if is_numbers(value) else _raise(_refused(key, value, "a setting that a file may give"))


def _raise(error: Exception) -> Any:
    raise error


def _timm_backbone(cls: Any, given: dict[str, Any]) -> bool:
    return getattr(cls, "model_type", "") == "timm_backbone" or given.get("use_timm_backbone") is True


def _in_timm(name: str) -> bool:
    """True for an architecture that timm has, with or without a tag; never a prefix or an address."""
    if not _WORD.fullmatch(name):
        return False
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(name.partition(".")[0]))


def _refused(place: str, value: Any, wanted: str) -> UsageError:
    shown = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    remedy = "It was not written by linearize, or by another version of the library."
    return UsageError("recipe", f"the configuration has {place!r:.60} as {shown[:80]}, not {wanted}", remedy)

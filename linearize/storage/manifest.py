"""The description in a saved file: plain data with a version, checked field by field."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from linearize import schema
from linearize._version import __version__
from linearize.errors import CheckpointError
from linearize.schema import Unfit, array, mapping, optional, path, plain_data, text
from linearize.sites.record import Record, Step
from linearize.sites.schema import EXTRA, SITE, STEP
from linearize.sites.site import Site
from linearize.storage import tensorfile
from linearize.surgery.specs import IN_PLACE
from linearize.zoo.plain import is_plain, pack, unpack

FORMAT, VERSION = "linearize", 2
"""Name of the format, and the newest version that this code reads and the one that it writes."""

_TENSOR = "__tensor__"


@dataclass
class Manifest:
    """The metadata of a file.

    Attributes:
        recipe: how to build the base model; None if only the user can.
        no_recipe: why there is none, for the error of the one who loads.
        steps: changes of the module tree from base model to saved model, gates included and last.
        aliases: further names of tensors that the model shares: name -> name under which it is stored.
        frozen: parameters that take no gradient.
        extras: tensors outside the state dict: (key in the file, module path, path in the module).
        attributes: plain attributes that differ from the rebuilt model's: (module path, name, value).
        sites: the sites of the model's record.
        inputs: its example inputs, with tensors on the meta device.
        version: of the format in which it was read.
    """

    recipe: dict[str, Any] | None = None
    no_recipe: str = "it comes from neither timm nor transformers"
    steps: list[Step] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    extras: list[tuple[str, str, tuple[Any, ...]]] = field(default_factory=list)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    inputs: Any = None
    version: int = VERSION

    def to_texts(self) -> dict[str, str]:
        """The metadata as a .safetensors file holds it: texts by name, JSON where there is structure."""
        versions = {"linearize": __version__, "torch": torch.__version__, "python": platform.python_version()}
        content = {
            "recipe": self.recipe,
            "no_recipe": self.no_recipe,
            "steps": self.steps,
            "aliases": self.aliases,
            "frozen": self.frozen,
            "extras": [[key, path, list(where)] for key, path, where in self.extras],
            "attributes": [[path, name, pack(value)] for path, name, value in self.attributes],
            "sites": self.sites,
            "inputs": _inputs_to_json(self.inputs),
            "versions": versions,
        }
        texts = {name: json.dumps(value, separators=(",", ":")) for name, value in content.items()}
        return {"format": FORMAT, "version": str(VERSION), **texts}

    @classmethod
    def from_texts(cls, source: Path, texts: dict[str, str]) -> Manifest:
        """Read the metadata of the file ``source``, all of it checked before any of it is used.

        Raises:
            CheckpointError: it is not ours, of a newer version, or not of the form that `to_texts` writes.
        """
        _check_version(source, texts)
        try:
            data = {name: schema.parse(texts[name]) for name in _FORM}
            for name, check in _FORM.items():
                check(data[name], name)
            found = cls(
                recipe=data["recipe"],
                no_recipe=data["no_recipe"],
                steps=data["steps"],
                aliases=data["aliases"],
                frozen=data["frozen"],
                extras=[(key, where, tuple(inner)) for key, where, inner in data["extras"]],
                attributes=[(where, name, unpack(value)) for where, name, value in data["attributes"]],
                sites=[Site.from_dict(site).to_dict() for site in data["sites"]],
                inputs=_inputs_from_json(data["inputs"]),
                version=int(texts["version"]),
            )
            if not all(may_hold(value) for _, _, value in found.attributes):
                raise ValueError("an attribute is not plain")
            if len({(where, name) for where, name, _ in found.attributes}) < len(found.attributes):
                raise ValueError("an attribute is there twice")
            # What changes a model in place may change the whole of it.
            if not all(step["path"] or step["module"]["type"] in IN_PLACE for step in found.steps):
                raise ValueError("a step replaces the whole model")
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            what = f"its metadata is damaged ({type(error).__name__}: {str(error)[:120]})"
            raise CheckpointError(str(source), what, "Copy or save the file again.") from error
        return found

    def record(self) -> Record:
        """The record that the loaded model carries."""
        steps = [step for step in self.steps if step["module"].get("type") != "ChannelGate"]
        return Record(tuple(Site.from_dict(site) for site in self.sites), steps, self.inputs)


def may_hold(value: Any) -> bool:
    """True if a file may set an attribute to this value: plain data whose strings are simple names.

    Examples:
        >>> may_hold((1, "avg")), may_hold("https://elsewhere")
        (True, False)
    """
    return is_plain(value, simple=True)


def _any_scalar(value: Any, where: str) -> None:
    """As JSON has them: settings may be infinite, and numbers are held to their range where they are used."""
    if isinstance(value, str):
        text()(value, where)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise Unfit(where, "a number", "one of 64 bits")


def _check_version(path: Path, texts: dict[str, str]) -> None:
    if texts.get("format") != FORMAT:
        found = "it is a safetensors file that linearize did not write"
        remedy = "Load it into a model with safetensors.torch, then convert that model."
        raise CheckpointError(str(path), found, remedy)
    version = texts.get("version", "")
    if not version.isdecimal() or not 1 <= len(version) <= 6 or int(version) < 1:
        raise CheckpointError(str(path), f"its format version is {version!r:.20}", "Copy or save the file again.")
    if int(version) > VERSION:
        found = f"it has format version {int(version)}, this linearize ({__version__}) reads up to {VERSION}"
        raise CheckpointError(str(path), found, "Upgrade: pip install --upgrade linearize.")


def _inputs_to_json(value: Any) -> Any:
    """Example inputs as JSON, tensors as shape and dtype; None if something else is in them."""
    try:
        return pack(_without_tensors(value))
    except TypeError:
        return None


def _without_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {_TENSOR: [list(value.shape), str(value.dtype).removeprefix("torch.")]}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(item) for item in value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _without_tensors(item) for key, item in value.items()}
    if not is_plain(value):
        raise TypeError(type(value).__name__)
    return value


def _inputs_from_json(value: Any) -> Any:
    return _with_tensors(unpack(value))


def _with_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            _STORED_TENSOR(value[_TENSOR], "an input")
            shape, name = value[_TENSOR]
            if math.prod(shape) >= 2**60:
                raise Unfit("an input", shape, "a shape")
            return torch.empty(shape, dtype=getattr(torch, name), device="meta")
        return {key: _with_tensors(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(item) for item in value)
    return value


_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in tensorfile.DTYPE_NAMES)
_STORED_TENSOR = schema.each(array(schema.integer(0, 2**40), 16), schema.one_of(*_DTYPES))
_FORM: dict[str, schema.Check] = {
    "recipe": optional(mapping(text(100), plain_data(_any_scalar, entries=500_000), 20)),
    "no_recipe": text(),
    "steps": array(STEP, 100_000),
    "aliases": mapping(text(), text()),
    "frozen": array(text()),
    "extras": array(EXTRA),
    "attributes": array(schema.each(path, schema.identifier, plain_data(_any_scalar))),
    "sites": array(SITE, 100_000),
    "inputs": plain_data(_any_scalar, entries=10_000),
}
"""What each text of the metadata must hold."""

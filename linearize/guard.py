"""Guard the `save_pretrained` of a changed model, so that `from_pretrained` never reads the folder as another function.

A library saves the weights, and a configuration that does not describe gates and merged maps. When it reads them, it
drops unknown weights, makes up missing ones, and reports this at most in a table. So `save_pretrained` of a model that
linearize has changed does the following: it writes what the library writes, without the weights; it marks the
configuration so that only `linearize.load` accepts it; and it adds our own file, and a card for model hubs.
The class of the model and its configuration in memory do not change.

Likewise a model of which layers went refuses a cache that was made while they were there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.checkpoint import FILE, save
from linearize.errors import CheckpointError, UsageError
from linearize.sites.record import Record, when_recorded
from linearize.surgery.skipped import SHORTENED
from linearize.zoo.caches import INDEX, is_cache, keepers, left_over
from linearize.zoo.hub import front_matter

__all__ = ["guard_caches", "guard_saving"]

_METHOD = "save_pretrained"
_NOTE = "changed by linearize, to be loaded with linearize.load(folder)"
# Each of them stops transformers with an error that quotes the text, whatever else a call overrides.
_MARKS: dict[str, Any] = {
    "model_type": _NOTE,
    "dtype": _NOTE,
    "attn_implementation": _NOTE,
    "quantization_config": {"quant_method": "gptq", "bits": _NOTE},
}
_CARD = "README.md"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")


def guard_saving(model: nn.Module, record: Record) -> None:
    """Put a guard on every module inside that has a `save_pretrained`; it acts only if the module is changed."""
    for path, module in model.named_modules():
        if callable(getattr(type(module), _METHOD, None)):
            prefix = f"{path}." if path else ""
            steps = [step for step in record.steps if f"{step['path']}.".startswith(prefix)]
            module.__dict__[_METHOD] = _Guard(module, steps=any(map(_changes, steps)), whole=not path)


def _changes(step: dict[str, Any]) -> bool:
    """A forward that was rewritten is the same function of the same weights."""
    return bool(step["module"].get("type") != "Rewrite")


class _Guard:
    """Stands on a module in the place of its method; copied and pickled with the module.

    Attributes:
        module: whose method it is.
        steps: a layer of the module was replaced.
        whole: the module is the model that was converted, so that our file can hold it.
    """

    def __init__(self, module: nn.Module, *, steps: bool, whole: bool) -> None:
        self.module, self.steps, self.whole = module, steps, whole

    def __call__(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """Save like the method of the module's class, if that is correct.

        Raises:
            CheckpointError: it is to be uploaded at once.

        Warns:
            UserWarning: the folder is one for `linearize.load`.
        """
        if not self.changed:
            return getattr(type(self.module), _METHOD)(self.module, save_directory, *args, **options)
        if options.get("push_to_hub"):
            found = "was changed by linearize, and would be uploaded as another function"
            remedy = "Call save_pretrained(folder) without push_to_hub, and upload that folder."
            raise CheckpointError(type(self.module).__name__, found, remedy)
        folder = Path(save_directory)
        given = "state_dict" in options or len(args) > 1  # None, too: a trainer says so in some versions
        if given or not self.whole:
            # A trainer's checkpoint, which goes on from these very weights; or a part of our model.
            result = getattr(type(self.module), _METHOD)(self.module, folder, *args, **options)
            _mark(folder, without="dtype")  # which a trainer reads back
            how = "its weights are for load_state_dict of this model; save the whole with linearize.save"
        else:
            result = self._save_for_us(folder, *args, **options)
            how = "linearize.load(folder) makes the model again, from_pretrained refuses to"
        text = f"{folder} holds a {type(self.module).__name__} that linearize has changed: {how}."
        warnings.warn(text, stacklevel=2)
        return result

    @property
    def changed(self) -> bool:
        """True if a model of this class and configuration would be another function, or need other weights."""
        ours = (type(m).__module__.startswith("linearize.") for m in self.module.modules())
        return self.steps or any(ours)

    def _save_for_us(self, folder: Path, *args: Any, **options: Any) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            result = getattr(type(self.module), _METHOD)(self.module, place, *args, **options)
            written = [file for file in Path(place).iterdir() if not file.name.endswith(_WEIGHTS)]
            if not any(Path(place).iterdir()):  # another process writes
                return result
            _mark(Path(place))
            written = [*(file for file in written if file.name != _CARD), *_carded(Path(place), folder, self.module)]
            save(self.module, Path(place) / FILE)
            for file in folder.iterdir():  # of a model that was here before
                if file.name.endswith(_WEIGHTS) and file.name.startswith(("model", "pytorch_model")):
                    file.unlink()
            for file in (*written, Path(place) / FILE):
                shutil.move(file, folder / file.name)
        return result


def _carded(place: Path, folder: Path, model: nn.Module) -> list[Path]:
    """A card, by which a hub knows what loads the folder; none where the user has one."""
    if (folder / _CARD).exists():
        return []
    name, code = type(model).__name__, "import linearize\n\nmodel = linearize.load('FOLDER')"
    how = (
        "" if hasattr(model, "config") or hasattr(model, "pretrained_cfg") else " Pass model= for a class of your own."
    )
    text = f"A {name} that linearize has changed.{how}"
    card = place / _CARD
    card.write_text(f"{front_matter(model, 'linearize')}\n\n{text}\n\n```python\n{code}\n```\n", encoding="utf-8")
    return [card]


def _mark(folder: Path, without: str = "") -> None:
    """Change the configuration so that libraries refuse it, and say what reads it."""
    path = folder / "config.json"
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            told = {name: value for name, value in content.items() if name in _MARKS}
            marks = {name: value for name, value in _MARKS.items() if name != without}
            content = {**content, **marks, "linearize": {"before": told}}
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def guard_caches(model: nn.Module, record: Record) -> None:
    """Let a model of which layers or attentions went refuse the cache of the model that still had them.

    The numbers of its layers have moved up: with such a cache it would go on from keys and values of other layers.
    """
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _CacheGuard):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    if any(step["module"].get("type") == SHORTENED or _moves(step) for step in record.steps):
        model.register_forward_pre_hook(_CacheGuard(max(keepers(model).values(), default=-1) + 1), with_kwargs=True)


def _moves(step: dict[str, Any]) -> bool:
    return INDEX in step["module"].get("values", {})


class _CacheGuard:
    """Looks at the caches among the inputs of a model; copied and pickled with it.

    Attributes:
        layers: that keep keys and values.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a cache with more layers.

        Raises:
            UsageError: there is one.
        """
        if torch.compiler.is_compiling():
            return
        for value in (*args, *kwargs.values()):
            more = left_over(value, self.layers) if is_cache(value) else 0
            if more:
                found = f"found a cache with {more} more layers than the {self.layers} that keep keys and values"
                remedy = "It is of the model before layers went: start with a new cache."
                raise UsageError(type(model).__name__, found, remedy)


when_recorded(guard_saving)
when_recorded(guard_caches)

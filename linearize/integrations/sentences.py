"""sentence-transformers: its Transformer module around a changed model, and back from the folder that it saves.

    encoder[0] = sentence_module(encoder[0], small)
    encoder.save(folder)
    SentenceTransformer(folder, trust_remote_code=True)  # where linearize is installed

The library writes the class of each module into `modules.json`, and imports it from there: that is what the flag is
for. The folder holds our file, the library's configuration and the tokenizer, and no weights under a name that
transformers reads: `AutoModel` finds nothing there, instead of another function.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from linearize import checks
from linearize.checkpoint import FILE, load, save
from linearize.errors import CheckpointError, UsageError

__all__ = ["sentence_module"]


def _base() -> Any:
    try:
        return importlib.import_module("sentence_transformers.base.modules.transformer").Transformer
    except ImportError:
        return object


_BASE: Any = _base()


class LinearizedTransformer(_BASE):  # type: ignore[misc] # of a package that may not be there
    """The library's Transformer module, with a model that linearize has changed. It is made by `sentence_module`."""

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Write the model into our file, and beside it what the library reads but for the weights."""
        folder = Path(output_path)
        save(self.model, folder / FILE)
        self.model.config.save_pretrained(folder)
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)

    def _load_config(self, path: str, backend: str, options: Any) -> tuple[Any, bool]:
        """The library asks for the configuration first: it is that of the model in our file."""
        util = importlib.import_module("sentence_transformers.util")
        named = ("token", "cache_folder", "revision", "local_files_only", "subfolder")
        given = {name: options.get("cache_dir" if name == "cache_folder" else name) for name in named}
        given = {name: value for name, value in given.items() if value is not None}
        file = util.load_file_path(path, FILE, **given)
        if backend != "torch" or file is None:
            found = f"found no {FILE} in it" if file is None else f"found backend={backend!r}"
            raise CheckpointError(str(path), found, "Load a folder that was saved with torch's backend, by it.")
        object.__setattr__(self, "_loaded", load(file))
        return self.__dict__["_loaded"].config, False

    def _load_model(self, *args: Any, **options: Any) -> nn.Module:
        """The model in our file."""
        model: nn.Module = self.__dict__.pop("_loaded")
        dtype = options.get("dtype", options.get("torch_dtype"))
        return model if dtype is None or isinstance(dtype, str) else model.to(dtype)


def sentence_module(transformer: Any, model: nn.Module) -> Any:
    """The first module of a SentenceTransformer with another model in it, for saving and loading.

    Args:
        transformer: `encoder[0]`, the library's Transformer module; it is left as it is.
        model: what became of its `model`: collapsed or compressed.

    Returns:
        A module of the same kind, to be put in its place.

    Raises:
        UsageError: it is another module, or sentence-transformers 6 or newer is not installed.
    """
    if _BASE is object:
        remedy = "Run: pip install 'sentence-transformers>=6'"
        raise UsageError("sentence_module", "found no sentence-transformers, or an old one", remedy)
    if not isinstance(transformer, _BASE):
        checks.refuse("transformer", transformer, "the Transformer module of a SentenceTransformer, encoder[0]")
    checks.module("model", model)
    made = LinearizedTransformer.__new__(LinearizedTransformer)
    kept = dict(transformer.__dict__)
    for name in ("_modules", "_parameters", "_buffers"):
        kept[name] = dict(kept[name])
    made.__dict__.update(kept)
    made.model = model
    return made

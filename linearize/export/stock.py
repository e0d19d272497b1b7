"""A folder that transformers or timm loads as one of its own models: the config, or the arguments, tell all widths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.errors import CheckpointError
from linearize.export.compare import distance, expected
from linearize.export.face import RUNTIME_TOLERANCES, Means, Proof, Refusal, Subject
from linearize.running.models import device_of
from linearize.zoo.stock import check_stock, check_timm, library_class, stock_copy
from linearize.zoo.timm_models import is_timm
from linearize.zoo.transformers_models import autos_of, without_bars

__all__ = ["Stock"]


class Stock:
    """A folder for `from_pretrained`, or for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

    name = "stock"
    suffix = ""
    writes: Mapping[str, str] = {}
    runs: Mapping[str, str] = {}
    means = Means(own_layers=False, uniform=True, modules=False)
    tolerances: Mapping[torch.dtype, float] = RUNTIME_TOLERANCES
    options: tuple[str, ...] = ()
    library = "transformers"
    near: tuple[str, ...] = ("gguf", "decilm", "remote", "onnx", "pt2")
    fixed = False

    def can(self, model: nn.Module) -> Refusal | None:
        """Ordinary layers, of widths that a config has numbers for."""
        try:
            check_timm(model) if is_timm(model) else check_stock(model)
        except CheckpointError as error:
            return Refusal(error.where, error.found)
        return None

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """As the library itself writes it."""
        made: Any = stock_copy(subject.model, subject.batches[0][1] or subject.batches[0][0])
        if is_timm(subject.model):
            from timm.models import save_for_hf

            name, arguments = check_timm(subject.model)
            save_for_hf(made, str(path), model_args=arguments, safe_serialization=True)
            return {"architecture": name, "arguments": arguments, "load by": "timm.create_model"}
        with without_bars():
            made.save_pretrained(path)
        changed = _changed(subject.model, made)
        autos = ", ".join(autos_of(type(made), type(made.config)))
        return {"class": type(made).__name__, "load by": autos, **({"config": changed} if changed else {})}

    def check(self, subject: Subject, path: Path) -> Proof:
        """Load the folder with transformers or timm, and compare outputs."""
        if is_timm(subject.model):
            import timm

            made = timm.create_model(f"local-dir:{path}", pretrained=True)
            runtime = f"timm {timm.__version__}"
        else:
            import transformers

            kind: Any = library_class(type(subject.model))
            with without_bars():
                made = kind.from_pretrained(path, dtype="auto", local_files_only=True)
            runtime = f"transformers {transformers.__version__}"
        twin = Subject(made.eval().to(device_of(subject.model)), subject.batches)
        return Proof(runtime, distance(expected(subject), expected(twin)), len(subject.batches))

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file."""
        if is_timm(model):
            return "import timm\n\nmodel = timm.create_model('local-dir:NAME', pretrained=True)"
        whole: Any = model
        auto = autos_of(library_class(type(whole)), type(whole.config))[0]
        return f"import transformers\n\nmodel = transformers.{auto}.from_pretrained('NAME')"


def _changed(model: Any, made: Any) -> str:
    """Entries of the config that are not as they were."""
    before, after = model.config.to_dict(), made.config.to_dict()
    return ", ".join(f"{name} {before.get(name)!r:.40} -> {value!r:.40}" for name, value in after.items()
                     if before.get(name) != value and not name.startswith("_") and name != "architectures")  # fmt: skip

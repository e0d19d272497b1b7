"""A transformers folder with one generated modelling file, for models that no configuration describes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize._version import __version__
from linearize.export import remote_file
from linearize.export.compare import distance, expected
from linearize.export.face import RUNTIME_TOLERANCES, Means, Proof, Refusal, Subject
from linearize.export.process import outputs_elsewhere
from linearize.export.remote_plan import Plan, plan_of
from linearize.storage.folders import write_text
from linearize.zoo.stock import library_class
from linearize.zoo.transformers_models import autos_of, without_bars
from linearize.zoo.unlike import Unlike

__all__ = ["Remote"]

MODULE = "modeling_linearize"
_LOAD = """
import transformers
auto = getattr(transformers, "{auto}")
model = auto.from_pretrained(folder, trust_remote_code=True, local_files_only=True, dtype="auto").eval()

def run(args, kwargs):
    return model(*args, **kwargs)
"""


class Remote:
    """A folder for `from_pretrained(..., trust_remote_code=True)`."""

    name = "remote"
    suffix = ""
    writes: Mapping[str, str] = {"transformers": "transformers"}
    runs: Mapping[str, str] = {"transformers": "transformers"}
    means = Means()
    tolerances: Mapping[torch.dtype, float] = RUNTIME_TOLERANCES
    options: tuple[str, ...] = ()
    library = "transformers"
    near: tuple[str, ...] = ("onnx", "pt2", "openvino")
    fixed = False

    def can(self, model: nn.Module) -> Refusal | None:
        """Models of transformers with the few layers that the file holds."""
        try:
            plan_of(model)
        except Unlike as error:
            return Refusal(error.where, error.why)
        return None

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        """The file first; then a model of its class writes weights and configuration."""
        model: Any = subject.model
        plan, names = plan_of(model), _Names(model)
        path.mkdir()
        write_text(path / f"{MODULE}.py", source_of(plan, names))
        made = _filled(_imported(path / f"{MODULE}.py", names.model), model, plan)
        with without_bars():
            made.save_pretrained(path)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        autos = dict.fromkeys(names.autos, f"{MODULE}.{names.model}")
        config["auto_map"] = {"AutoConfig": f"{MODULE}.{names.config}", **autos}
        write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
        return {"class": names.model, "load by": ", ".join(names.autos), "layers put in": len(plan["layers"])}

    def check(self, subject: Subject, path: Path) -> Proof:
        """Loaded by transformers in a process without linearize."""
        import transformers

        auto = _Names(subject.model).autos[0]
        found = outputs_elsewhere(subject, path, _LOAD.format(auto=auto))
        runtime = f"transformers {transformers.__version__} without linearize"
        return Proof(runtime, distance(expected(subject), found), len(found))

    def usage(self, model: nn.Module) -> str:
        """A program that loads the file."""
        auto = _Names(model).autos[0]
        return f"import transformers\n\nmodel = transformers.{auto}.from_pretrained('NAME', trust_remote_code=True)"


class _Names:
    """What classes are called.

    Attributes:
        base, config_base: of transformers.
        model, config: of the file.
        autos: names of transformers' classes that load such a model.
    """

    def __init__(self, model: Any) -> None:
        self.kind, self.config_kind = library_class(type(model)), type(model.config)
        self.base, self.config_base = self.kind.__name__, self.config_kind.__name__
        self.model, self.config = f"Linearize{self.base}", f"Linearize{self.config_base}"
        self.type = f"linearize-{model.config.model_type}"
        self.autos = autos_of(self.kind, self.config_kind)


def source_of(plan: Plan, names: Any) -> str:
    """The text of the modelling file: what the plan needs, and no more."""
    used = {entry["layer"] for entry in plan["layers"]}
    known = {name: layer for name, layer in remote_file.LAYERS.items() if name in used}
    ours = [layer for layer in known.values() if layer.__module__ == remote_file.__name__]
    around = any(isinstance(layer, type) and issubclass(layer, remote_file.Around) for layer in ours)
    parts = [inspect.getsource(layer) for layer in (*[remote_file.Around] * around, *ours)]
    parts += [inspect.getsource(remote_file.build), inspect.getsource(remote_file.rebuild)]
    rows = "".join(
        f'    "{name}": {layer.__name__ if layer in ours else f"nn.{name}"},\n' for name, layer in known.items()
    )
    wrapping = "".join(f'"{name}", ' for name in remote_file.WRAPPING if name in used).strip()
    parts += [f"LAYERS: dict[str, Any] = {{\n{rows}}}\nWRAPPING: tuple[str, ...] = ({wrapping})", _classes(names)]
    text = "\n\n\n".join(part.strip() for part in parts) + "\n"
    head = _HEAD.format(
        base=names.base,
        version=__version__,
        auto=names.autos[0],
        torch="import torch\n" if "torch." in text else "",
        tensor="Tensor, nn" if "Tensor" in text else "nn",
        functional="from torch.nn import functional\n" if "functional." in text else "",
        bases=_imports(names),
    )
    return f"{head}\n\n{text}"


_HEAD = '''"""A {base} some of whose layers are smaller, or merged: `config.linearize` says which, as plain data.

Written by linearize {version}, which is not needed to use it. Load it with

    transformers.{auto}.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

from typing import Any

{torch}from torch import {tensor}
{functional}{bases}'''


def _imports(names: Any) -> str:
    import transformers

    lines: dict[str, list[str]] = {}
    for kind in (names.config_kind, names.kind):
        public = getattr(transformers, kind.__name__, None) is kind
        lines.setdefault("transformers" if public else kind.__module__, []).append(kind.__name__)
    return "".join(f"from {module} import {', '.join(found)}\n" for module, found in lines.items())


def _classes(names: Any) -> str:
    return f'''class {names.config}({names.config_base}):
    """The configuration of a {names.base}, with a plan of what differs in `linearize`."""

    model_type = "{names.type}"


class {names.model}({names.base}):
    """A {names.base} with other layers in some places."""

    config_class = {names.config}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        rebuild(self, config.linearize)
'''


def _imported(path: Path, name: str) -> Any:
    """The class of the file that was just written."""
    spec = importlib.util.spec_from_file_location(f"_linearize_{MODULE}_{abs(hash(path))}", path)
    if spec is None or spec.loader is None:  # of a file that is there, it never is
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes look for themselves there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return getattr(module, name)


def _filled(kind: Any, model: Any, plan: Plan) -> Any:
    """A model of the file's class with the weights of the model."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _OWN}
    config = kind.config_class(**settings, linearize=plan)
    with torch.device("meta"):
        made = kind(config)
    own = made.state_dict()
    state = {key: value.detach().clone() for key, value in model.state_dict().items() if key in own}
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = model.generation_config
    return made


_OWN = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "dtype")

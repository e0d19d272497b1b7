"""Small collapsed models, and a process that does not have linearize, for the tests of exports."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from tests.chain import randomize

IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def collapsed(model: nn.Module, inputs: Any = None, share: float = 0.5) -> nn.Module:
    """The model with random linear channels folded away: merged terms and partial activations stand in it."""
    gated = linearize.convert(model.eval(), inputs)
    randomize(gated, share)
    return linearize.collapse(gated, when="always")


def transformer(kind: str, config: str, **more: Any) -> Any:
    """A tiny transformers model, with weights large enough that its outputs depend on its inputs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {**SIZES, "max_position_embeddings": 64, "initializer_range": 0.1, **more}
    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()


def llama(**more: Any) -> Any:
    return transformer("LlamaForCausalLM", "LlamaConfig", **{"num_key_value_heads": 2, **more})


def bert(**more: Any) -> Any:
    return transformer("BertModel", "BertConfig", **more)


def vit(**more: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("test_vit", **{"img_size": 32, "patch_size": 8, "num_classes": 5, **more})
    return made.eval()


def convnext() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("test_convnext", num_classes=5)
    for name, parameter in made.named_parameters():
        if name.endswith("gamma"):  # 1e-6 to begin with, as if there were no blocks
            nn.init.ones_(parameter)
    return made.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 8)).eval()


MODELS = {"llama": llama, "bert": bert, "vit": vit, "convnext": convnext}


@functools.cache
def small(name: str) -> tuple[nn.Module, nn.Module]:
    """The original and the collapsed model, made once; nobody changes them."""
    model = MODELS[name]()
    return model, collapsed(model)


def elsewhere(code: str, **given: Any) -> dict[str, Tensor]:
    """The tensors that code puts into `found`, in a new process in which linearize cannot be imported.

    `given` are texts and tensors that the code finds under their names.
    """
    from safetensors.torch import load_file, save_file

    start = """
        import json, os, sys
        sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p or ".", "linearize"))]
        sys.modules["linearize"] = None
        try:
            import linearize
        except ImportError:
            pass
        else:
            raise SystemExit("linearize is here")
        import torch
        from safetensors.torch import load_file, save_file
        torch.set_num_threads(1)
        globals().update(json.loads(sys.argv[1]), **load_file(sys.argv[2]))
        found = {}
    """
    with tempfile.TemporaryDirectory() as place:
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        texts = {name: str(value) for name, value in given.items() if name not in tensors}
        save_file(tensors or {"nothing": torch.zeros(1)}, f"{place}/in.safetensors")
        program = textwrap.dedent(start) + textwrap.dedent(code)
        program += "\nsave_file({k: v.detach().contiguous() for k, v in found.items()}, sys.argv[3])\n"
        arguments = [json.dumps(texts), f"{place}/in.safetensors", f"{place}/out.safetensors"]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=place, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        tensors = load_file(Path(place) / "out.safetensors")
    assert tensors
    return tensors


def off(a: Tensor, b: Tensor) -> float:
    """Relative error."""
    return float(((a - b).abs().max() / a.abs().max()).detach())

"""ONNX: collapsed models in ONNX Runtime itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.errors import ExportError
from linearize.surgery.only import OnlyLinear
from tests.exported import IDS, MODELS, bert, llama, mlp, off, small, transformer

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def session(path: Path) -> Any:
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("bert", "convnext") else []) for name in MODELS]
)
def test_in_the_runtime(name: str, folder: Path) -> None:
    original, model = small(name)
    example = torch.randn(2, 3, 64, 64) if name == "convnext" else None
    made = linearize.export(model, folder / f"{name}.onnx", format="onnx", example_inputs=example)
    assert made.proof is not None
    assert made.proof.shapes == 3
    assert made.proof.error <= 1e-5
    # Our own look at it, at a shape of its own, with a negative control.
    if name in ("llama", "bert"):
        inputs: dict[str, Tensor] = {"input_ids": torch.cat((IDS, IDS.flip(1)))[:3, :7]}
        expected, before = (m(**inputs)[0].detach() for m in (model, original))
    else:
        inputs = {"x": torch.randn(5, 3, 32, 32) if name == "vit" else torch.randn(5, 3, 64, 64)}
        expected, before = (m(inputs["x"]).detach() for m in (model, original))
    found = torch.from_numpy(session(made.path).run(None, {k: v.numpy() for k, v in inputs.items()})[0])
    assert off(expected, found) <= 1e-5
    assert off(before, found) > 1e-2
    assert off(expected[:1], expected[1:2]) > 1e-3, "outputs depend on inputs"


def kinds(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.mark.slow
def test_merged_layers_add_slices_and_joins_and_nothing_else(folder: Path) -> None:
    """Beside the file that the test above has left."""
    linearize.export(small("vit")[0], folder / "before.onnx", format="onnx", check=False)
    if not (folder / "vit.onnx").exists():
        linearize.export(small("vit")[1], folder / "vit.onnx", format="onnx", check=False)
    added = kinds(folder / "vit.onnx") - kinds(folder / "before.onnx")
    assert added <= {"Slice", "Split", "Concat", "Pad", "Expand"}, added


def test_opset_and_weights_beside(tmp_path: Path) -> None:
    model = mlp()
    options: dict[str, Any] = {"opset": 19, "external_data": True, "example_inputs": torch.randn(2, 64)}
    made = linearize.export(model, tmp_path / "mlp.onnx", format="onnx", **options)
    assert made.files == ("mlp.onnx", "mlp.onnx.data")
    assert (tmp_path / "mlp.onnx").stat().st_size < (tmp_path / "mlp.onnx.data").stat().st_size
    read = onnx.load(tmp_path / "mlp.onnx")
    assert made.facts["opset"] == read.opset_import[0].version == 19
    batch = read.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert batch == "batch"
    onnx.checker.check_model(tmp_path / "mlp.onnx")


def test_bfloat16_is_refused_with_the_parameter(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"embeddings.*weight: is of torch.bfloat16.*model.float\(\)"):
        linearize.export(bert().to(torch.bfloat16), tmp_path / "a.onnx", format="onnx")


class Drawing(nn.Module):
    """Another function in each run: no file can be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.layer(x) * self.calls
        return out


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ONNX Runtime .* it is"):
        linearize.export(Drawing(), tmp_path / "a.onnx", format="onnx", example_inputs=torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


# With keys and values


def generated(run: Any, prompt: list[int], new: int, past: int | None = None) -> list[int]:
    """Greedy tokens by a loop of our own, which sees nothing but the file; `past` forgets what was before."""
    names = {entry.name: entry.shape for entry in run.get_inputs()}
    held = {n: torch.zeros(1, s[1], 0, s[3]).numpy() for n, s in names.items() if n.startswith("past")}
    ids, tokens = torch.tensor([prompt]), list(prompt)
    for _ in range(new):
        before = next(iter(held.values())).shape[2]
        feed = {"input_ids": ids, "attention_mask": torch.ones(1, before + ids.shape[1], dtype=torch.long)}
        feed["position_ids"] = torch.arange(before, before + ids.shape[1])[None]
        given = {n: t.numpy() for n, t in feed.items() if n in names}
        logits, *present = run.run(None, {**given, **held})
        held = dict(zip(held, present, strict=True))
        if past is not None:
            held = {n: value * 0 for n, value in held.items()}
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens


GENERATING: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "collapsed": lambda: small("llama")[1],
    "gpt2": lambda: transformer("GPT2LMHeadModel", "GPT2Config", n_head=4, n_embd=32, n_layer=2, n_positions=64),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "gpt2" else []) for n in GENERATING])
def test_step_by_step_the_tokens_are_those_of_generate(name: str, tmp_path: Path) -> None:
    model = GENERATING[name]()
    options: dict[str, Any] = {"opset": 20, "external_data": True} if name == "llama" else {}
    made = linearize.export(model, tmp_path / "a.onnx", format="onnx", cache=True, **options)
    assert made.proof is not None
    assert made.proof.error <= 1e-5
    assert "8 tokens generated step by step" in made.proof.told
    if name == "llama":
        assert made.files == ("a.onnx", "a.onnx.data")
        assert made.facts["opset"] == 20
    prompt = [5, 9, 30, 7]
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    assert generated(session(made.path), prompt, 12) == wanted
    assert generated(session(made.path), prompt, 12, past=0) != wanted, "the control: without what was before"
    outputs = {entry.name: entry.shape for entry in session(made.path).get_outputs()}
    assert outputs["present.1.value"][2] in ("past + length", "length + past")


@pytest.mark.slow
def test_a_layer_without_attention_has_no_entry(tmp_path: Path) -> None:
    """As planning leaves it: the layers behind it are numbered anew."""
    model = llama()
    model.model.layers[0].self_attn = OnlyLinear(32, 32, keyword="hidden_states", nones=1, caches=True)
    model.model.layers[1].self_attn.layer_idx = 0
    made = linearize.export(model, tmp_path / "a.onnx", format="onnx", cache=True)
    assert [n for n in str(made.facts["inputs"]).split(", ") if n.endswith("key")] == ["past_key_values.0.key"]


def test_what_has_no_step(tmp_path: Path) -> None:
    def refuse(model: nn.Module, match: str, **options: Any) -> None:
        with pytest.raises(ExportError, match=match):
            linearize.export(model, tmp_path / "a.onnx", format="onnx", cache=True, **options)
        assert list(tmp_path.iterdir()) == []

    refuse(bert(), "BertModel: is no decoder that generates")
    refuse(llama(), "fewer than 4 tokens", example_inputs={"input_ids": IDS[:, :3]})
    window = transformer("MistralForCausalLM", "MistralConfig", num_key_value_heads=2, sliding_window=8)
    refuse(window, r"MistralForCausalLM: keeps a Dynamic\w*, where|MistralForCausalLM: keeps a .* from step to step")

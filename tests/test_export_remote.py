"""Folders with a generated modelling file: loaded, run and trained by transformers in a process without linearize."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.errors import ExportError
from linearize.export import remote_file
from linearize.export.remote import MODULE, _imported
from linearize.surgery import specs
from linearize.surgery.specs import spec_of
from tests.exported import IDS, bert, collapsed, elsewhere, off, small, transformer

pytest.importorskip("transformers")


@pytest.mark.slow
def test_everything_that_transformers_does_without_linearize(tmp_path: Path) -> None:
    """Logits, generate, a training step of the Trainer, and a folder written again."""
    original, model = small("llama")
    made = linearize.export(model, tmp_path / "folder", format="remote")
    assert made.proof is not None
    assert made.proof.error <= 1e-6
    assert made.facts["load by"] == "AutoModelForCausalLM"
    found = elsewhere(
        """
        import transformers, warnings
        warnings.simplefilter("ignore")
        load = transformers.AutoModelForCausalLM.from_pretrained
        try:
            load(folder)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise SystemExit("loaded without its code")
        model = load(folder, trust_remote_code=True).eval()
        found["logits"] = model(input_ids=ids).logits
        found["said"] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        rows = [{"input_ids": row, "labels": row} for row in ids]
        arguments = transformers.TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
        transformers.Trainer(model, arguments, train_dataset=rows).train()
        found["trained"] = model.eval()(input_ids=ids).logits
        model.save_pretrained("again")
        found["again"] = load("again", trust_remote_code=True).eval()(input_ids=ids).logits
        """,
        folder=tmp_path / "folder",
        ids=IDS,
    )
    whole: Any = model
    expected = whole(input_ids=IDS).logits
    assert off(expected, found["logits"]) <= 1e-6
    assert off(original(input_ids=IDS).logits, found["logits"]) > 1e-2, "negative control"
    mask = torch.ones_like(IDS)
    said = whole.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(said, found["said"])
    assert off(expected, found["trained"]) > 1e-6, "it has learned something"
    assert torch.equal(found["again"], found["trained"])


def test_the_file_is_readable_and_runs_nothing_from_the_plan(tmp_path: Path) -> None:
    made = linearize.export(small("bert")[1], tmp_path / "folder", format="remote", check=False)
    text = (tmp_path / "folder" / "modeling_linearize.py").read_text()
    tree = ast.parse(text)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"exec", "eval", "compile", "__import__", "open", "getattr"}
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"__future__", "typing", "torch", "transformers"}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert all(f.returns is not None and all(a.annotation or a.arg == "self" for a in f.args.args) for f in functions)
    assert max(map(len, text.splitlines())) <= 120
    assert "OnlyLinear" not in text, "what the plan does not name is not there"
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "modeling_linearize.LinearizeBertConfig"
    assert len(config["linearize"]["layers"]) == made.facts["layers put in"] > 0


@pytest.mark.parametrize("name", sorted(set(remote_file.LAYERS) - {"Linear", "Conv1d", "Conv2d", "Conv3d"}))
def test_layers_of_the_file_are_ours(name: str) -> None:
    """The same values, and the same names of tensors, as the layers that a collapsed model holds."""
    every: dict[str, dict[str, Any]] = {
        "CarryLinear": {"in_features": 3, "out_features": 2, "bias": True, "start": 1, "whole": False},
        "OnesLinear": {"in_features": 6, "out_features": 3, "bias": True, "at": 2, "ones": 2},
        "OnlyLinear": {"in_features": 6, "out_features": 3, "bias": False, "keyword": "x", "nones": 1},
        "Ones": {"width": 4},
        "PartialActivation": {"keep": 2, "axis": -1, "inplace": False},
        "MaskedActivation": {"channels": 6, "axis": -1},
        "Identity": {},
    }
    ours = specs.build({"type": name, **every[name]}, nn.GELU())
    for tensor in (*ours.parameters(), *(b for b in ours.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.1, 0.9)
    if name == "MaskedActivation":
        ours.get_buffer("linear")[::2] = True
    entry = {key: value for key, value in spec_of(ours).items() if key not in ("type", "whole", "inplace")}
    theirs = remote_file.build({"path": "", "layer": name, **entry}, nn.GELU())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 6)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


def test_a_matrix_for_attention_takes_no_cache() -> None:
    """It would stay empty, and tell no positions."""
    made = remote_file.OnlyLinear(4, 4, bias=False, keyword="x", nones=1)
    assert made(x=torch.ones(1, 4), mask=None)[1] is None
    with pytest.raises(ValueError, match="pass use_cache=False"):
        made(x=torch.ones(1, 4), cache=object())


def test_refusals(tmp_path: Path) -> None:
    def refuse(model: nn.Module, match: str, **more: Any) -> None:
        with pytest.raises(ExportError, match=match):
            linearize.export(model, tmp_path / "folder", format="remote", **more)

    refuse(small("vit")[1], 'VisionTransformer: is no model of transformers.*nearest.*"onnx"')
    head = transformer("RobertaForSequenceClassification", "RobertaConfig", num_labels=3)
    refuse(collapsed(head), r"classifier.tanh_0: has a rewritten forward that calls a PartialActivation")
    odd: Any = bert()
    odd.encoder.layer[0].intermediate.dense = nn.Sequential(nn.Linear(32, 96))
    refuse(odd, "encoder.layer.0.intermediate.dense: is a Sequential, which a generated file does not hold")


def test_a_forward_that_is_rewritten_and_the_same(tmp_path: Path) -> None:
    """The head's tanh became a child, and nothing of it is linear."""
    head = transformer("RobertaForSequenceClassification", "RobertaConfig", num_labels=3)
    gated = linearize.convert(head, exclude="classifier*")
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.arange(gate.channels) % 2 == 0)
    model = linearize.collapse(gated, when="always")
    linearize.export(model, tmp_path / "folder", format="remote", check=False)
    kind = _imported(tmp_path / "folder" / f"{MODULE}.py", "LinearizeRobertaForSequenceClassification")
    again = kind.from_pretrained(tmp_path / "folder").eval()
    whole: Any = model
    assert off(whole(input_ids=IDS).logits, again(input_ids=IDS).logits) <= 1e-6
    assert off(head(input_ids=IDS).logits, again(input_ids=IDS).logits) > 1e-3, "negative control"

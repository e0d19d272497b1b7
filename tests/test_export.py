"""Exports in general: what is refused, what is checked, what is left behind; and the command."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.cli import run
from linearize.compress import compress
from linearize.errors import CaptureError, ExportError, UsageError
from linearize.export.batches import batches_for
from linearize.export.compare import distance
from linearize.export.face import RUNTIME_TOLERANCES, Means, Proof, Refusal, Subject
from linearize.export.registry import FORMATS
from tests.exported import IDS, llama, vit
from tests.toys import QUIET


class Fake:
    """A format whose runtime computes what it is told to."""

    name, suffix, tolerances = "fake", ".fake", RUNTIME_TOLERANCES
    writes: Mapping[str, str] = {}
    runs: Mapping[str, str] = {"no_such_runtime": "fake"}
    means, options, near = Means(own_layers=False), ("opset",), ("stock", "onnx")
    library, fixed = "fakery", False
    error = 0.0
    refusal: Refusal | None = None
    seen: list[int]

    def can(self, model: nn.Module) -> Refusal | None:
        return self.refusal

    def write(self, subject: Subject, path: Path) -> Mapping[str, Any]:
        path.write_text("weights")
        path.with_name(path.name + ".data").write_text("more")
        return {"fact": 1}

    def check(self, subject: Subject, path: Path) -> Proof:
        self.seen = [len(batch[0][0]) for batch in subject.batches]
        return Proof("a runtime", self.error, 3)

    def usage(self, model: nn.Module) -> str:
        return "fake.load('NAME')"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setitem(FORMATS, "fake", made)
    monkeypatch.setattr(Fake, "runs", {})
    return made


NET = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
X = torch.randn(2, 4)


def test_what_is_proven_is_moved_into_its_place(fake: Fake, tmp_path: Path) -> None:
    NET.train()
    made = linearize.export(NET, tmp_path / "a.fake", format="fake", example_inputs=X)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fake", "a.fake.data"]
    assert (made.files, made.size, made.facts["fact"]) == (("a.fake", "a.fake.data"), 11, 1)
    assert fake.seen == [2, 3, 1]
    assert all(module.training for module in NET.modules())
    assert json.dumps(made.to_dict())
    assert "a runtime" in str(made)


def test_what_differs_is_not_written(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "a.fake").write_text("before")
    for fake.error in (1e-3, float("nan"), float("inf")):
        with pytest.raises(ExportError, match="a runtime it is"):
            linearize.export(NET, tmp_path / "a.fake", format="fake", example_inputs=X, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.fake"]
    assert (tmp_path / "a.fake").read_text() == "before"
    fake.error = 1e-3
    linearize.export(NET, tmp_path / "b.fake", format="fake", example_inputs=X, tolerance=1e-2)
    linearize.export(NET, tmp_path / "a.fake", format="fake", example_inputs=X, overwrite=True, check=False)
    assert (tmp_path / "a.fake").read_text() == "weights"


def test_a_refusal_names_the_layer_and_the_nearest_format(fake: Fake, tmp_path: Path) -> None:
    fake.refusal = Refusal("1.act", "is a frob")
    with pytest.raises(ExportError, match=r"1.act: is a frob: fake cannot .* nearest .* \"onnx\".* target=\"fake\""):
        linearize.export(NET, tmp_path / "a.fake", format="fake", example_inputs=X)
    gated = linearize.convert(NET, X)
    with pytest.raises(ExportError, match=r"1: is still a gate. Call linearize.collapse"):
        linearize.export(gated, tmp_path / "a.fake", format="fake", example_inputs=X)


def test_bad_input(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(match: str, path: Any = tmp_path / "a.fake", error: type[Exception] = UsageError, **more: Any) -> None:
        with pytest.raises(error, match=match):
            linearize.export(NET, path, **{"format": "fake", "example_inputs": X, **more})

    refuse("format: found 'tflite'. Pass one of \"onnx\"", format="tflite")
    refuse("path: found .*a.onnx.*ends in .fake", tmp_path / "a.onnx")
    refuse("path: cannot write beside", tmp_path / "nowhere" / "a.fake")
    refuse("path: found", 3)
    refuse("check: found 1", check=1)
    refuse("tolerance: found -1", tolerance=-1)
    refuse("opset: found 3", opset=3)
    refuse("card: found 'yes'", card="yes")
    refuse('external_data: found True, which "fake" does not take. It is for "onnx"', external_data=True)
    refuse("does not run on the example inputs", error=CaptureError, example_inputs=torch.randn(2, 5))
    refuse("found no tensor", error=CaptureError, example_inputs={})
    refuse("inputs are not known", error=CaptureError, example_inputs=None)
    (tmp_path / "a.fake").write_text("before")
    refuse("exists already. Pass overwrite=True")
    (tmp_path / "b.fake").mkdir()
    refuse("found the folder", tmp_path / "b.fake")
    monkeypatch.setattr(Fake, "runs", {"no_such_runtime": "fake"})
    refuse(r'no_such_runtime is not installed. .*pip install "linearize\[fake\]".*check=False', tmp_path / "c.fake")
    assert linearize.export(NET, tmp_path / "c.fake", format="fake", example_inputs=X, check=False).proof is None


def test_card(fake: Fake, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    result = compress(net, [torch.randn(64, 8)] * 8, flops=0.5, **QUIET)
    made = linearize.export(
        result.model, tmp_path / "a.fake", format="fake", example_inputs=torch.randn(2, 8), card=result.report
    )
    assert made.files == ("a.fake", "a.fake.md", "a.fake.data")
    text = (tmp_path / "a.fake.md").read_text()
    assert text.startswith("---\nlibrary_name: fakery\n")
    told = (
        "fake.load('a.fake')",
        "| fact | 1 |",
        "In a runtime, on 3 batches",
        "| FLOPs per batch",
        result.plan.sha256,
    )
    for part in (*told, result.plan.sha256, "| 2 | CarryLinear", f"torch {torch.__version__}"):
        assert part.replace(" ", "") in text.replace(" ", ""), part
    linearize.export(NET, tmp_path / "b.fake", format="fake", example_inputs=X, card=True, check=False)
    plain = (tmp_path / "b.fake.md").read_text()
    assert "was not run" in plain
    assert "FLOPs" not in plain


def test_batches_of_three_shapes() -> None:
    model = llama()
    shapes = [kwargs["input_ids"].shape for _, kwargs in batches_for(model, {"input_ids": IDS})]
    assert shapes == [(2, 10), (3, 10), (2, 5)]
    assert batches_for(model, {"input_ids": IDS})[0][1]["use_cache"] is False
    images = [args[0].shape[0] for args, _ in batches_for(vit(), None)]
    assert images == [2, 3, 1]

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, 3) * 2

    found = [args[0] for args, _ in batches_for(Fixed(), torch.arange(6.0).view(2, 3))]
    assert [tuple(x.shape) for x in found] == [(2, 3)] * 3
    assert not torch.equal(found[0], found[1])


def test_distances() -> None:
    a = torch.tensor([1.0, -4.0])
    assert distance([[a]], [[a + torch.tensor([0.0, 1.0])]]) == 0.25
    assert distance([[a]], [[a[:1]]]) == float("inf")
    assert distance([[a]], [[a, a]]) == float("inf")
    assert distance([[a]], [[a * float("nan")]]) != distance([[a]], [[a]]) == 0
    assert distance([[torch.tensor([1, 2])]], [[torch.tensor([1, 3])]]) == float("inf")
    masked = torch.tensor([1.0, -float("inf")])
    assert distance([[masked]], [[masked]]) == 0
    assert distance([[masked]], [[a]]) == float("inf")


def test_formats_are_told_apart_and_near_ones_exist() -> None:
    for name, made in FORMATS.items():
        assert made.name == name
        assert name not in made.near
        assert set({**made.writes, **made.runs}.values()) <= {"onnx", "openvino", "gguf", "transformers", "executorch"}


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("needs the extra onnx")
    monkeypatch.chdir(tmp_path)
    arguments = ["export", "tests.exported:mlp", "--shape", "64", "--format"]
    assert run([*arguments, "onnx"]) == 0
    assert "run in ONNX Runtime" in capsys.readouterr().out
    assert (tmp_path / "mlp.onnx").is_file()
    assert run([*arguments, "onnx"]) == 2
    assert "exists already. Pass --overwrite" in capsys.readouterr().err
    assert run([*arguments, "tflite"]) == 2
    assert "--format: found 'tflite'. Known are onnx" in capsys.readouterr().err
    assert run([*arguments, "onnx", "--out", "new/a.onnx", "--no-check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proof"] is None

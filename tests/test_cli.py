"""The command line: what it prints, what it writes, and what it says of bad usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import linearize
from linearize import zoo
from linearize.cli import app, common, run
from tests.pages import Page, check_alone

TINY = ["-a", "img_size=16", "-a", "patch_size=8", "-a", "in_chans=1"]


class Toy(nn.Module):
    """A model that no library knows; made by `make_toy` below."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


def fail_to_make() -> nn.Module:
    raise RuntimeError("out of\nsteam")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A gated and the collapsed model, saved."""
    gated = linearize.convert(zoo.create("timm:test_vit", img_size=16, patch_size=8, in_chans=1, num_classes=5))
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.arange(gate.channels) % 3 > 0)
    paths = str(tmp_path / "gated.safetensors"), str(tmp_path / "small.safetensors")
    linearize.save(gated, paths[0])
    linearize.save(linearize.collapse(gated), paths[1])
    return paths


def good(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Standard output of a command that works."""
    assert run(arguments) == code
    return capsys.readouterr().out


@pytest.mark.slow
def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    out = good(capsys, "inspect", "timm:test_vit", *TINY)
    assert "blocks.0.mlp.act" in out
    assert "FLOPs" in out
    data = json.loads(good(capsys, "inspect", "timm:test_vit", *TINY, "--json"))
    assert data["sites"][0]["channels"] == 192
    assert data["cost"]["parameters"] > 0


@pytest.mark.slow
def test_inspect_a_file_and_a_callable(capsys: pytest.CaptureFixture[str], files: tuple[str, str]) -> None:
    assert "gelu" in good(capsys, "inspect", files[1])
    assert "relu" in good(capsys, "inspect", f"{__name__}:Toy", "-a", "width=8", "--shape", "4")


def test_verify_tells_by_its_exit_code(capsys: pytest.CaptureFixture[str], files: tuple[str, str]) -> None:
    assert "the same function" in good(capsys, "verify", *files)
    assert json.loads(good(capsys, "verify", *files, "--data", "digits", "--json"))["passed"] is True
    assert "NOT" in good(capsys, "verify", files[0], "timm:test_vit", *TINY, "-a", "num_classes=5", code=1)
    assert good(capsys, "verify", files[0], "timm:test_vit", *TINY, "-a", "num_classes=5", "--tolerance", "10")


def test_bench(capsys: pytest.CaptureFixture[str], files: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", *files, "--batch-sizes", "1,2", "--rounds", "2", "--threads", "1", "--dtype", "bfloat16"]
    assert "median s" in good(capsys, *arguments, "--out", str(out))
    stored = json.loads(out.read_text())
    assert [t["batch_size"] for t in stored["timings"]] == [1, 1, 2, 2]
    assert stored["environment"]["dtype"] == "bfloat16"
    assert json.loads(good(capsys, *arguments, "--json"))["unit"] == "seconds"


@pytest.fixture
def idx(tmp_path: Path) -> str:
    """A data set small enough to be trained on in a second."""
    from tests.test_data import write_idx

    folder = tmp_path / "data"
    folder.mkdir()
    for prefix, count in (("train", 24), ("t10k", 8)):
        labels = torch.arange(count, dtype=torch.uint8) % 2
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", labels[:, None, None].expand(-1, 8, 8) * 200)
    return str(folder)


@pytest.mark.slow
def test_compress_then_use_the_files(capsys: pytest.CaptureFixture[str], idx: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compress", "timm:test_vit", *TINY, "--data", idx, "--linear", "0.5", "--batch", "8"]
    shown = good(capsys, *arguments, "--epochs", "2", "--train", "1", "--out", str(out))
    assert "linear channels" in shown
    assert sorted(p.name for p in out.iterdir()) == [
        "compressed.safetensors", "original.safetensors", "plan.json", "report.html", "report.json",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["share"] == 0.5
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    check_alone(page)
    assert page.saved("plan.json") == (out / "plan.json").read_text().rstrip("\n")
    assert report["verification"]["passed"]
    small = linearize.load(out / "compressed.safetensors")
    assert small(torch.zeros(1, 1, 16, 16)).shape == (1, 2)
    assert "site" in good(capsys, "inspect", str(out / "compressed.safetensors"))
    arguments[1] = str(out / "original.safetensors")
    again = [arg for arg in arguments if arg not in TINY]
    shown = good(capsys, *again, "--epochs", "0", "--out", str(tmp_path / "again"), "--json")
    assert json.loads(shown)["share"] == 0.5


@pytest.mark.slow
def test_compress_to_a_budget_and_a_dry_run(capsys: pytest.CaptureFixture[str], idx: str, tmp_path: Path) -> None:
    arguments = ["compress", "timm:test_vit", *TINY, "--data", idx, "--batch", "8", "--train", "1", "--epochs", "0"]
    shown = good(capsys, *arguments, "--flops", "0.7", "--dry-run")
    assert "predicted" in shown
    assert "keep 192" in shown
    out = tmp_path / "out"
    data = json.loads(good(capsys, *arguments, "--flops", "0.7", "--uniform", "--json", "--out", str(out)))
    assert data["budget"]["met"] is True
    assert data["cost"]["after"]["flops"] <= 0.7 * data["cost"]["before"]["flops"]
    assert len({len(site["linear"]) for site in json.loads((out / "plan.json").read_text())["sites"]}) == 1
    assert run([*arguments, "--flops", "0.7"]) == 2
    assert "--out" in capsys.readouterr().err
    assert run([*arguments, "--latency", "0.7", "--speedup", "1.5", "--dry-run"]) == 2
    assert "2 budgets" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value", "why"), [("--decode", "1.5", "generate"), ("--target", "gguf", "gguf")])
def test_what_a_model_cannot_become_is_said_before_it_is_trained(
    capsys: pytest.CaptureFixture[str], idx: str, tmp_path: Path, option: str, value: str, why: str
) -> None:
    arguments = ["compress", "timm:test_vit", *TINY, "--data", idx, "--batch", "8", "--train", "1"]
    budget = [] if option == "--decode" else ["--flops", "0.8"]
    assert run([*arguments, *budget, option, value, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert why in told.err.splitlines()[-1]
    assert "epoch" not in told.out + told.err


@pytest.mark.slow
def test_compress_goes_on_where_it_was_interrupted(
    capsys: pytest.CaptureFixture[str], idx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compress", "timm:test_vit", *TINY, "--data", idx, "--batch", "8", "--train", "2", "--epochs", "2"]
    out = tmp_path / "out"
    arguments += ["--flops", "0.8", "--out", str(out)]
    stopped, say = 0, common.say

    def stop(line: str) -> None:
        say(line)
        if "epoch 1" in line and stopped == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "say", stop)
    assert run(arguments) == 130
    assert list(out.glob("unfinished/first-*/epoch-*.safetensors"))
    assert not (out / "compressed.safetensors").exists()
    stopped = 1
    good(capsys, *arguments)
    assert (out / "compressed.safetensors").exists()
    assert not (out / "unfinished").exists()


def test_compress_a_transformers_folder(capsys: pytest.CaptureFixture[str], idx: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=2,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    arguments = ["compress", f"hf:{tmp_path / 'vit'}", "--data", idx, "--batch", "8", "--epochs", "1", "--json"]
    data = json.loads(good(capsys, *arguments, "--out", str(tmp_path / "out")))
    assert data["verification"]["passed"]
    assert data["channels"] == 32


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["frobnicate"], "No such command"),
        (["inspect"], "Missing argument"),
        (["inspect", "timm:test_vit", "--nonsense"], "nonsense"),
        (["inspect", "timm:no_such_model"], "no_such_model"),
        (["inspect", "resnet50"], "names no model"),
        (["inspect", "missing.safetensors"], "missing.safetensors"),
        (["inspect", "timm:test_vit", "-a", "num_classes"], "KEY=VALUE"),
        (["inspect", "timm:test_vit", "-a", "nonsense=1"], "nonsense"),
        (["inspect", "no.such.module:Model"], "cannot be imported"),
        (["inspect", f"{__name__}:Toy"], "--shape"),
        (["inspect", f"{__name__}:Toy", "--shape", "4y5"], "4y5"),
        (["inspect", f"{__name__}:Toy", "--shape", "7"], "for example --shape 3x224x224"),
        (["inspect", f"{__name__}:fail_to_make"], "out of steam"),
        (["inspect", "torch.nn:Identity", "--shape", "4"], "no activation"),
        (["bench", f"{__name__}:Toy", f"{__name__}:Toy", "--shape", "4", "--dtype", "int8"], "int8"),
        (["bench", f"{__name__}:Toy", f"{__name__}:Toy", "--shape", "4", "--compile", "maybe"], "maybe"),
        (["bench", f"{__name__}:Toy", f"{__name__}:Toy", "--shape", "4", "--batch-sizes", "1,x"], "1,x"),
        (["bench", f"{__name__}:Toy", f"{__name__}:Toy", "--shape", "4", "--device", "abacus"], "abacus"),
        (["bench", f"{__name__}:Toy", f"{__name__}:Toy", "--shape", "4", "--rounds", "0"], "--rounds"),
        (["verify", f"{__name__}:Toy", "torch.nn:Identity", "--shape", "4", "--tolerance", "-1"], "tolerance"),
        (["compress", "timm:test_vit", "--out", "{tmp}/o"], "--data"),
        (["compress", "timm:test_vit", "--data", "nowhere", "--out", "{tmp}/o"], "does not exist"),
        (["compress", "timm:test_vit", "--data", "digits", "--linear", "1.5", "--out", "{tmp}/o"], "--linear"),
        (["compress", f"{__name__}:Toy", "--data", "digits", "--out", "{tmp}/o"], "inputs are not known"),
        (["compress", "timm:test_vit", "--data", "digits", "--out", "{tmp}/file/o"], "cannot make the folder"),
        (["compress", "timm:test_vit", "-a", "num_classes=3", "--data", "digits", "--out", "{tmp}/o"], "3 outputs"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], found: str
) -> None:
    (tmp_path / "file").touch()
    assert run([part.replace("{tmp}", str(tmp_path)) for part in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert found in line
    assert captured.out == ""


@pytest.mark.slow
def test_truncated_and_foreign_files(capsys: pytest.CaptureFixture[str], files: tuple[str, str]) -> None:
    path = Path(files[1])
    path.write_bytes(path.read_bytes()[:-100])
    assert run(["inspect", files[1]]) == 2
    path.write_bytes(b"hello")
    assert run(["verify", *files]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("small.safetensors" in line for line in errors)


def test_a_bug_is_told_in_one_line_and_shown_whole_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(sys.modules["linearize.cli.inspect"], "summary", broken)
    arguments = ["inspect", f"{__name__}:Toy", "--shape", "4"]
    assert run(arguments) == 1
    assert "ZeroDivisionError: by zero" in capsys.readouterr().err
    monkeypatch.setenv("LINEARIZE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(arguments)


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["linearize.cli.inspect"], "summary", stop)
    assert run(["inspect", f"{__name__}:Toy", "--shape", "4"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("command", [[], ["inspect"], ["compress"], ["verify"], ["bench"]])
def test_help_with_an_example(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert "Usage" in shown.output
    if command:
        assert f"linearize {command[0]} " in shown.output.partition("Example: ")[2]


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "linearize"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"linearize {linearize.__version__}\n"
    done = subprocess.run([*command, "inspect", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")

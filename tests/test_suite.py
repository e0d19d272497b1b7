"""Suites of measurements: the matrix, measuring on a device that only pretends, going on, and putting side by side."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.cli import run
from linearize.errors import UsageError
from linearize.graph.capture import Inputs
from linearize.suite import generating, ways
from linearize.suite.devices import Cuda, Device, Processor, device_for
from linearize.suite.matrix import Cell, Suite, read_suite, suite_of
from linearize.suite.merge import machines_of, to_csv
from linearize.suite.nvml import Nvml
from linearize.suite.page import suite_page
from linearize.suite.powercap import PowerCap, clock_mhz, throttled
from linearize.suite.results import records_of
from linearize.suite.run import run_suite
from tests.pages import HOSTILE, Page, check_alone, check_shown

SUITES = sorted((Path(__file__).parent.parent / "benchmarks" / "suites").glob("*.yaml"))
TINY = ["-a", "img_size=16", "-a", "patch_size=8", "-a", "in_chans=1"]
WATTS = 50.0


class Plain(nn.Linear):
    """A model that no library knows."""

    def __init__(self) -> None:
        super().__init__(3, 3)


class Time:
    """A clock that only models move, shared by all copies of them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __deepcopy__(self, memo: Any) -> Time:
        return self


class Takes(nn.Module):
    """A model that takes a known time per sample; the first calls take longer, as on a cold device."""

    def __init__(self, clock: Time, seconds: float, cold: int = 0) -> None:
        super().__init__()
        self.clock, self.seconds, self.cold = clock, seconds, cold
        self.weight = nn.Parameter(torch.zeros(100))
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.cold = max(0, self.cold - 1)
        self.clock.now += self.seconds * x.shape[0] * (1.0 + self.cold)
        return x

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        assert options["min_new_tokens"] == max_new_tokens
        assert not options["do_sample"]
        self.clock.now += self.seconds * (input_ids.shape[1] + max_new_tokens)
        return input_ids


class Pretended:
    """A device whose time is that of the models' clock."""

    def __init__(self, clock: Time, name: str = "Pretended 100", slow_after: float = float("inf")) -> None:
        self.clock, self.name, self.slow_after = clock, name, slow_after
        self.place = torch.device("cpu")

    def facts(self) -> dict[str, Any]:
        versions = {"torch": torch.__version__}
        return {"device": self.name, "kind": "cuda", "driver": "1.2", "power_limit_w": 300.0, "versions": versions}

    def now(self) -> float:
        return self.clock.now

    def seconds(self, run: Callable[[], Any], number: int) -> float:
        before = self.clock.now
        for _ in range(number):
            run()
        return (self.clock.now - before) / number

    def state(self) -> dict[str, Any]:
        slow = self.clock.now > self.slow_after
        return {"clock_mhz": 900 if slow else 1800, "temperature_c": None, "slowed": ["power limit"] if slow else []}

    def joules(self) -> float | None:
        return WATTS * self.clock.now

    def peak(self, run: Callable[[], Any]) -> int | None:
        run()
        return 1000

    def tidy(self) -> None:
        pass


@pytest.fixture
def clock() -> Time:
    return Time()


def pair(clock: Time, cold: int = 0) -> dict[str, nn.Module]:
    return {"original": Takes(clock, 0.004, cold), "small": Takes(clock, 0.002, cold)}


def zeros(batch: int, shape: str | None) -> Tensor:
    return torch.zeros(batch, *[int(size) for size in (shape or "3").split("x")])


def measured(
    models: dict[str, nn.Module], suite: Suite, folder: Path, device: Device, **more: Any
) -> list[dict[str, Any]]:
    return run_suite(models, suite, folder, inputs=more.pop("inputs", zeros), device=device, **more)


def test_a_fake_is_a_device(clock: Time) -> None:
    device: Device = Pretended(clock)
    for name in ("facts", "now", "seconds", "state", "joules", "peak", "tidy", "place"):
        assert hasattr(device, name)
        assert hasattr(Processor(), name)


def test_cells_of_a_matrix() -> None:
    suite = suite_of(
        {"work": ["forward", "generate"], "lengths": [8, 16], "new_tokens": [4, 8], "batch_sizes": [1, 1, 2]}, "s"
    )
    cells = suite.cells()
    assert len(cells) == 4 + 8, "forward has no new tokens, and what is named twice is measured once"
    assert len({cell.key for cell in cells}) == len(cells)
    assert str(cells[-1]) == "generate, eager, float32, batch 2, length 16, 8 new tokens"
    assert (
        Cell("forward", "eager", "float32", 32, "3x8x8", threads=1).without_batch
        == "forward, eager, float32, 3x8x8, 1 thread"
    )
    assert suite_of(suite.to_dict(), "s") == suite


def test_copies_change_least() -> None:
    suite = Suite(dtypes=("float32", "bfloat16"), ways=("eager", "compile"), batch_sizes=(1, 2))
    assert [cell.dtype for cell in suite.cells()] == ["float32"] * 4 + ["bfloat16"] * 4


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suites_of_the_repository(path: Path) -> None:
    suite = read_suite(path)
    assert 4 <= len(suite.cells()) <= 60
    page = (path.parent.parent.parent / "docs" / "benchmarks.md").read_text()
    assert f"benchmarks/suites/{path.name}" in page


def test_there_are_suites() -> None:
    assert len(SUITES) >= 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_sizes: [1]", "'bach_sizes'.*Known are work, ways"),
        ("batch_sizes: [0]", "batch_sizes"),
        ("batch_sizes: many", "batch_sizes"),
        ("ways: [eager, warp]", "ways.*'warp'.*cudagraphs"),
        ("dtypes: int8", "dtypes"),
        ("shapes: [3-224]", "shapes"),
        ("shapes: [[3, 224]]", "shapes"),
        ("device: 7", "device"),
        ("device: gpu0", "device"),
        ("rounds: 0", "rounds"),
        ("steady: 0", "steady"),
        ("threads: [true]", "threads"),
        ("new_tokens: 1", "new_tokens"),
        ("warmup_seconds: .inf", "warmup_seconds"),
        ("work: generate", "lengths"),
        ("{shapes: [3], lengths: [4]}", "beside lengths"),
        ("rounds: 3\nrounds: 4", "'rounds' is there twice"),
        ("- a list", "no keys"),
        ("", "nothing"),
        ("a: [", "cannot be understood"),
        ("rounds: !!python/object/apply:os.getcwd []", "cannot be understood"),
    ],
)
def test_a_suite_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_suite(path)
    assert "suite.yaml" in str(caught.value)


def test_no_file_no_text_and_json(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_suite(tmp_path / "missing.yaml")
    (tmp_path / "suite.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="it is no text"):
        read_suite(tmp_path / "suite.yaml")
    (tmp_path / "suite.json").write_text('{"rounds": 3}')
    assert read_suite(tmp_path / "suite.json") == Suite(rounds=3)


def test_without_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suite.yaml").write_text("rounds: 3")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UsageError, match=r"linearize\[suite\]"):
        read_suite(tmp_path / "suite.yaml")


def test_figures_of_a_cell(clock: Time, tmp_path: Path) -> None:
    """Times, ratios, rates, energy and memory follow from what the device pretends."""
    suite = Suite(batch_sizes=(1, 8), shapes=("3", "2x2"), rounds=5, energy_seconds=1.0)
    records = measured(pair(clock), suite, tmp_path / "out", Pretended(clock))
    assert [(r["cell"]["shape"], r["cell"]["batch"]) for r in records] == [("3", 1), ("3", 8), ("2x2", 1), ("2x2", 8)]
    for record in records:
        batch, models = record["cell"]["batch"], record["models"]
        assert list(models) == ["original", "small"]
        assert models["original"]["seconds"]["median"] == pytest.approx(0.004 * batch)
        assert models["original"]["ratio"] is None
        assert models["small"]["ratio"]["q1"] == pytest.approx(0.5) == models["small"]["ratio"]["q3"]
        assert models["small"]["per_second"] == pytest.approx(500.0)
        assert models["small"]["joules"] == pytest.approx(WATTS * 0.002 * batch)
        assert models["small"]["peak_bytes"] == 400 + 1000
        assert len(models["small"]["samples"]) == 5
        assert record["environment"]["driver"] == "1.2"
        assert record["environment"]["power_limit_w"] == 300.0
        assert record["watched"] == {"clock_mhz": [1800, 1800.0, 1800], "temperature_c": None, "slowed": []}
    assert records == [json.loads(json.dumps(record)) for record in records_of(tmp_path / "out")]


def test_energy_can_be_left_out(clock: Time, tmp_path: Path) -> None:
    (record,) = measured(pair(clock), Suite(rounds=1, energy_seconds=0), tmp_path / "out", Pretended(clock))
    assert record["models"]["small"]["joules"] is None


def test_warm_up_until_steady(clock: Time, tmp_path: Path) -> None:
    (warm,) = measured(pair(clock), Suite(rounds=2), tmp_path / "warm", Pretended(clock))
    (cold,) = measured(pair(clock, cold=60), Suite(rounds=2), tmp_path / "cold", Pretended(clock))
    assert warm["steady"]
    assert cold["steady"]
    assert warm["warmup"] == 3, "three measurements must agree"
    assert cold["warmup"] > 3
    assert cold["models"]["small"]["ratio"]["median"] == pytest.approx(0.5)
    hasty = Suite(rounds=2, warmup_seconds=0.0)
    (short,) = measured(pair(clock, cold=60), hasty, tmp_path / "short", Pretended(clock))
    assert not short["steady"]
    assert "had not settled" in suite_page(machines_of([tmp_path / "short"]))
    assert "had not settled" not in suite_page(machines_of([tmp_path / "warm"]))


def test_slowness_is_seen(clock: Time, tmp_path: Path) -> None:
    device = Pretended(clock, slow_after=0.3)
    (record,) = measured(pair(clock), Suite(rounds=9), tmp_path / "out", device)
    assert record["watched"]["slowed"] == ["power limit"]
    assert record["watched"]["clock_mhz"] == [900, pytest.approx(900, abs=900), 1800]
    assert "slowed by power limit" in suite_page(machines_of([tmp_path / "out"]))


def test_models_stay_as_they_were(clock: Time, tmp_path: Path) -> None:
    models = pair(clock)
    kept: Any = models["small"].train()
    before = torch.get_num_threads()
    measured(models, Suite(dtypes=("bfloat16",), threads=(before + 1,), rounds=1), tmp_path / "out", Pretended(clock))
    assert torch.get_num_threads() == before
    assert kept.training
    assert kept.weight.dtype == torch.float32
    assert kept.cold == 0
    (record,) = records_of(tmp_path / "out")
    assert record["environment"]["threads"] == before + 1


def test_an_interrupted_suite_goes_on(clock: Time, tmp_path: Path) -> None:
    suite = Suite(batch_sizes=(1, 2, 4, 8), rounds=2)
    whole = measured(pair(clock), suite, tmp_path / "whole", Pretended(clock))
    lines: list[str] = []

    def stop(text: str) -> None:
        lines.append(text)
        if len(lines) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(pair(clock), suite, tmp_path / "out", Pretended(clock), say=stop)
    path = tmp_path / "out" / "results.jsonl"
    assert len(path.read_text().splitlines()) == 2
    lines.clear()
    path.write_bytes(path.read_bytes()[:-40])  # killed while it was writing the second one
    records = measured(pair(clock), suite, tmp_path / "out", Pretended(clock), say=lines.append)
    assert [line.split(" ")[0] for line in lines] == ["[2/4]", "[3/4]", "[4/4]"]
    assert len(path.read_text().splitlines()) == 4
    for a, b in zip(whole, records, strict=True):
        assert a["cell"] == b["cell"]
        assert a["models"]["small"]["ratio"]["median"] == pytest.approx(b["models"]["small"]["ratio"]["median"])
    lines.clear()
    measured(pair(clock), suite, tmp_path / "out", Pretended(clock), say=lines.append)
    assert lines == []


@pytest.mark.parametrize(
    "what", ["rounds", "models", "device", "about", "something else", "damaged", "newer", "a file"]
)
def test_a_folder_of_something_else(what: str, clock: Time, tmp_path: Path) -> None:
    folder, suite = tmp_path / "out", Suite(rounds=2)
    measured(pair(clock), suite, folder, Pretended(clock), about={"small": "abc"})
    before = (folder / "results.jsonl").read_bytes()
    models, device, about, message = pair(clock), Pretended(clock), {"small": "abc"}, "belongs to another suite"
    if what == "rounds":
        suite, message = Suite(rounds=3), r"suite\.rounds is 2 there and 3 here"
    elif what == "models":
        models = {"original": models["original"], "other": models["small"]}
    elif what == "device":
        device, message = Pretended(clock, "Another 200"), "device is 'Pretended 100' there and 'Another 200' here"
    elif what == "about":
        about, message = {"small": "def"}, r"about\.small"
    elif what == "something else":
        folder, message = tmp_path / "thesis", "which no suite has made"
        folder.mkdir()
        (folder / "thesis.txt").write_text("precious")
    elif what == "damaged":
        (folder / "suite.json").write_text("{")
        message = "is damaged"
    elif what == "newer":
        (folder / "suite.json").write_text('{"format": 99}')
        message = "format 99"
    else:
        folder, message = tmp_path / "note.txt", "--out"
        folder.write_text("")
    with pytest.raises(UsageError, match=message):
        measured(models, suite, folder, device, about=about)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_a_damaged_line_is_named(clock: Time, tmp_path: Path) -> None:
    measured(pair(clock), Suite(batch_sizes=(1, 2), rounds=1), tmp_path, Pretended(clock))
    path = tmp_path / "results.jsonl"
    first, second = path.read_text().splitlines()
    odd = json.loads(first)
    odd["models"]["small"]["seconds"]["median"] = "<b>"
    endless = first.replace('"rounds": 1', '"rounds": NaN')
    for bad in ("{}", "no json", json.dumps(odd), endless, "[" * 100_000):
        path.write_text(f"{first}\n{bad}\n{second}\n")
        with pytest.raises(UsageError, match=r"results\.jsonl, line 2: is damaged"):
            records_of(tmp_path)


class Fails(Takes):
    """A model that is too large for a batch of 4."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return super().forward(x)


def test_what_does_not_run_is_left_out(clock: Time, tmp_path: Path) -> None:
    """The other model is measured, the reason is told, and the cell is measured again if asked."""
    models: dict[str, nn.Module] = {"original": Fails(clock, 0.004), "small": Takes(clock, 0.002)}
    suite = Suite(batch_sizes=(2, 4), rounds=1)
    fits, large = measured(models, suite, tmp_path, Pretended(clock))
    assert fits["models"]["small"]["ratio"]["median"] == pytest.approx(0.5)
    assert large["models"]["original"] == {"left_out": "OutOfMemoryError: CUDA out of memory."}
    assert large["models"]["small"]["seconds"]["median"] == pytest.approx(0.008)
    assert large["models"]["small"]["ratio"] is None
    assert "left out: OutOfMemoryError" in Page(suite_page(machines_of([tmp_path]))).text
    lines: list[str] = []
    models["original"].forward = models["small"].forward
    measured(models, suite, tmp_path, Pretended(clock), say=lines.append)
    assert lines == []
    measured(models, suite, tmp_path, Pretended(clock), retry=True, say=lines.append)
    assert [line.split()[0] for line in lines] == ["[2/2]"]
    assert len(records_of(tmp_path)) == 2, "the last result of a cell counts"


def test_a_failure_in_the_midst_leaves_the_rest(clock: Time, tmp_path: Path) -> None:
    class Breaks(Takes):
        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(())
            if x.shape[0] == 1 and len(self.seen) > 5:
                raise RuntimeError("device-side assert")
            return super().forward(x)

    models: dict[str, nn.Module] = {"original": Takes(clock, 0.1), "small": Breaks(clock, 0.1)}
    first, second = measured(models, Suite(batch_sizes=(1, 2), rounds=2), tmp_path, Pretended(clock))
    assert first["models"]["small"] == {"left_out": "RuntimeError: device-side assert"}
    assert "seconds" in second["models"]["small"]


def tokens(batch: int, shape: str | None) -> dict[str, Tensor]:
    ids = torch.arange(6).repeat(batch, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_generating(clock: Time, tmp_path: Path) -> None:
    """Each token takes as long as the model says, and so does each token of the prompt."""
    suite = Suite(work=("generate",), lengths=(4, 16), new_tokens=(9,), batch_sizes=(2,), rounds=3)
    records = measured(pair(clock), suite, tmp_path, Pretended(clock), inputs=tokens)
    for record, length in zip(records, (4, 16), strict=True):
        small = record["models"]["small"]
        assert small["first_token"]["median"] == pytest.approx(0.002 * (length + 1))
        assert small["seconds"]["median"] == pytest.approx(0.002 * (length + 9))
        assert small["tokens_per_second"] == pytest.approx(2 * 8 / (0.002 * 8))
        assert small["first_token_ratio"]["median"] == pytest.approx(0.5)
    text = Page(suite_page(machines_of([tmp_path]))).text
    assert "tokens/s" in text
    assert "first token" in text


def test_what_does_not_generate(clock: Time, tmp_path: Path) -> None:
    models = {"original": Takes(clock, 0.1), "small": nn.Identity()}
    suite = Suite(work=("generate",), ways=("eager", "compile"), lengths=(4,), rounds=1)
    eager, compiled = measured(models, suite, tmp_path, Pretended(clock), inputs=tokens)
    assert "does not generate" in eager["models"]["small"]["left_out"]
    assert "seconds" in eager["models"]["original"]
    assert "eager way only" in compiled["models"]["original"]["left_out"]


def test_a_real_model_writes(tmp_path: Path) -> None:
    """What transformers' generate gives: as many tokens as asked for, whatever they are."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, eos_token_id=3
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are alike, so that the end is as likely as any other
    calls = generating.calls(model, ((), tokens(2, None)), 5)
    assert calls[generating.FIRST]().shape == (2, 6 + 1)
    assert calls[generating.ALL]().shape == (2, 6 + 5)


def test_lengths_need_sequences(clock: Time, tmp_path: Path) -> None:
    (record,) = measured(pair(clock), Suite(lengths=(4,), rounds=1), tmp_path, Pretended(clock))
    assert "no sequences" in record["models"]["original"]["left_out"]


def test_other_runtimes_compute_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    batch: Inputs = ((torch.randn(2, 4),), {})
    with torch.no_grad():
        expected = model(*batch[0])
    binding, _ = ways.runner("onnxruntime", model, batch)()
    assert torch.allclose(torch.from_numpy(binding.copy_outputs_to_cpu()[0]), expected, atol=1e-5)
    half = nn.Linear(4, 4).bfloat16()
    with pytest.raises(ways.LeftOut, match="bfloat16"):
        ways.runner("onnxruntime", half, ((torch.randn(2, 4).bfloat16(),), {}))


def test_openvino_computes_the_same() -> None:
    pytest.importorskip("openvino")
    model = nn.Linear(4, 3).eval()
    batch: Inputs = ((torch.randn(2, 4),), {})
    with torch.no_grad():
        expected = model(*batch[0])
        found = ways.runner("openvino", model, batch)()
    assert torch.allclose(torch.from_numpy(next(iter(found.values()))), expected, atol=1e-5)


def test_what_is_not_here_is_said_first(monkeypatch: pytest.MonkeyPatch, clock: Time, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cudagraphs.*CUDA"):
        measured(pair(clock), Suite(ways=("cudagraphs",)), tmp_path / "out", Pretended(clock))
    with pytest.raises(UsageError, match=r"openvino.*CPU"):
        ways.check_ways(("openvino",), torch.device("cuda", 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for way, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        with pytest.raises(UsageError, match=rf"{way}.*not installed.*linearize\[{extra}\]"):
            ways.check_ways((way,), torch.device("cpu"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="does not have"):
        device_for("cuda:77")


def test_the_processor_tells_of_itself() -> None:
    device = device_for("cpu")
    facts, state = device.facts(), device.state()
    assert facts["device"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["energy"]
    assert state["slowed"] == []
    assert device.seconds(lambda: None, 3) >= 0
    peak = device.peak(lambda: torch.zeros(1000, 1000))
    assert peak is not None
    assert 4_000_000 <= peak < 8_000_000


def test_counters_of_sockets(tmp_path: Path) -> None:
    for socket in range(2):
        folder = tmp_path / f"intel-rapl:{socket}"
        folder.mkdir()
        (folder / "energy_uj").write_text("900\n")
        (folder / "max_energy_range_uj").write_text("1000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of a socket, which is counted there already
    power = PowerCap(tmp_path)
    assert power.told == "RAPL of 2 sockets"
    assert power.joules() == 0.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("950")
    assert power.joules() == pytest.approx(50e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("100")  # it has started again at 0
    assert power.joules() == pytest.approx(250e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert power.joules() is None
    assert "root only" in PowerCap(tmp_path).told
    assert "no RAPL" in PowerCap(tmp_path / "missing").told


def test_clocks_and_heat(tmp_path: Path) -> None:
    for core, (clock, count) in enumerate(((1_000_000, 3), (3_000_000, 4))):
        for name, value in (("cpufreq/scaling_cur_freq", clock), ("thermal_throttle/core_throttle_count", count)):
            path = tmp_path / f"cpu{core}" / name
            path.parent.mkdir(parents=True)
            path.write_text(str(value))
    assert clock_mhz(tmp_path) == 2000.0
    assert throttled(tmp_path) == 7
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 2600.5\nother: 1\n")
    assert clock_mhz(tmp_path / "none", tmp_path / "cpuinfo") == 2600.5
    assert clock_mhz(tmp_path / "none", tmp_path / "none") is None
    assert throttled(tmp_path / "none") is None


class Card:
    """What torch.cuda is of a GPU that runs everything in 2 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        about = {"name": "Card 1", "total_memory": 8 * 2**30, "major": 9, "minor": 0, "uuid": "1234-5678"}
        fakes = {
            "current_device": lambda: 0,
            "get_device_properties": lambda place: SimpleNamespace(**about),
            "device": lambda place: nullcontext(),
            "Event": lambda enable_timing: SimpleNamespace(
                record=lambda: self.calls.append("record"), elapsed_time=lambda end: 2.0 * self.calls.count("run")
            ),
            "reset_peak_memory_stats": lambda place: self.calls.append("reset"),
            "memory_allocated": lambda place: 100,
            "max_memory_allocated": lambda place: 350,
            "empty_cache": lambda: self.calls.append("empty"),
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.calls.append("replay")),
            "graph": lambda graph: nullcontext(),
        }
        for name, fake in fakes.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda place: self.calls.append("wait"))
        monkeypatch.setitem(sys.modules, "pynvml", library())

    def run(self) -> None:
        self.calls.append("run")


def test_a_card_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    device = Cuda(torch.device("cuda"))
    assert device.place == torch.device("cuda", 0)
    assert device.seconds(card.run, 4) == pytest.approx(0.002), "from milliseconds, per call"
    assert card.calls == ["wait", "record", *["run"] * 4, "record", "wait"]
    facts = device.facts()
    assert (facts["device"], facts["capability"], facts["driver"]) == ("Card 1", "9.0", "580.65")
    assert device.state()["slowed"] == ["power limit", "heat (hardware)"]
    assert device.joules() == 5.0
    card.calls.clear()
    assert device.peak(card.run) == 250
    assert card.calls == ["wait", "reset", "run", "wait"]
    device.tidy()
    assert card.calls[-1] == "empty"


def test_a_graph_is_captured_after_some_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            card.run()
            return x

    replay = ways.runner("cudagraphs", Counts(), ((torch.zeros(1),), {}))
    assert card.calls == ["run"] * 4
    replay()
    assert card.calls[4:] == ["replay"], "the model's own code does not run again"


class NVMLError(Exception):
    """What the library raises."""


def library(**functions: Any) -> Any:
    def refuse(*_: Any) -> None:
        raise NVMLError("Not Supported")

    told: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda name: f"handle of {name}",
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlSystemGetDriverVersion": lambda: "580.65",
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 350_000,
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
        "nvmlDeviceGetPersistenceMode": refuse,
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1500, 2: 2619}[kind],
        "nvmlDeviceGetPowerUsage": lambda handle: 123_400,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x01 | 0x04 | 0x40,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5_000,
    }
    return SimpleNamespace(NVMLError=NVMLError, **{**told, **functions})


def test_what_the_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library())
    card = Nvml.of("1234-5678", 0)
    assert card.facts() == {
        "driver": "580.65", "power_limit_w": 350.0, "most_clock_mhz": 1980, "most_memory_clock_mhz": 2619,
        "persistence": None, "nvml": "read",
    }  # fmt: skip
    assert card.state() == {
        "clock_mhz": 1500, "memory_clock_mhz": 2619, "power_w": 123.4, "temperature_c": 61,
        "slowed": ["power limit", "heat (hardware)"],
    }  # fmt: skip
    assert card.joules() == 5.0


def test_a_driver_that_tells_little(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise NVMLError("Not Supported")

    names = [name for name in vars(library()) if name.startswith("nvml") and name != "nvmlInit"]
    quiet = library(**{**dict.fromkeys(names, refuse), "nvmlDeviceGetHandleByIndex": lambda index: index})
    monkeypatch.setitem(sys.modules, "pynvml", quiet)
    card = Nvml.of("1234", 3)
    assert card.joules() is None
    assert card.state()["slowed"] == []
    monkeypatch.setitem(sys.modules, "pynvml", library(nvmlInit=refuse))
    assert Nvml.of("", 0).facts()["nvml"] == "not read: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "linearize[suite]" in Nvml.of("", 0).facts()["nvml"]
    assert Nvml.of("", 0).joules() is None


@pytest.fixture
def folders(clock: Time, tmp_path: Path) -> list[Path]:
    """Results of two machines, one of which is not done."""
    suite = Suite(batch_sizes=(1, 4), dtypes=("float32", "bfloat16"), rounds=3)
    measured(pair(clock), suite, tmp_path / "one", Pretended(clock))
    measured(pair(clock), suite, tmp_path / "two", Pretended(clock, "Another 200", slow_after=0.0))
    path = tmp_path / "two" / "results.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:3]))
    return [tmp_path / "one", tmp_path / "two"]


def test_machines_side_by_side(folders: list[Path]) -> None:
    machines = machines_of(folders)
    assert [(m.name, len(m.records), m.missing) for m in machines] == [("Pretended 100", 4, 0), ("Another 200", 3, 1)]
    rows = list(csv.DictReader(io.StringIO(to_csv(machines))))
    assert len(rows) == 2 * (4 + 3)
    assert [row["model"] for row in rows[:2]] == ["original", "small"], "the original always beside"
    assert float(rows[1]["ratio"]) == pytest.approx(0.5)
    assert rows[1]["driver"] == "1.2"
    assert {row["slowed"] for row in rows} == {"", "power limit"}
    page = Page(suite_page(machines))
    check_alone(page)
    assert page.saved("suite.csv") == to_csv(machines)
    assert "Measured on 2 machines" in page.text
    assert "not measured yet: 1" in page.text
    bars = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(bars) == len(rows)


def test_the_same_card_twice(folders: list[Path], clock: Time, tmp_path: Path) -> None:
    measured(pair(clock), Suite(rounds=1), tmp_path / "three", Pretended(clock))
    names = [machine.name for machine in machines_of([folders[0], tmp_path / "three"])]
    assert names == ["Pretended 100 (one)", "Pretended 100 (three)"]


def test_folders_that_cannot_be_merged(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none"):
        machines_of([])
    with pytest.raises(UsageError, match="twice"):
        machines_of([folders[0], folders[0] / ".." / "one"])
    with pytest.raises(UsageError, match="no results of a suite"):
        machines_of([tmp_path])
    (folders[1] / "results.jsonl").unlink()
    with pytest.raises(UsageError, match="no results yet"):
        machines_of(folders)


def test_names_of_strangers(clock: Time, tmp_path: Path) -> None:
    models = {"original": Takes(clock, 0.1), HOSTILE: Takes(clock, 0.1), "=1+1": Takes(clock, 0.1)}
    measured(dict(models), Suite(rounds=1), tmp_path, Pretended(clock, HOSTILE))
    machines = machines_of([tmp_path])
    text = suite_page(machines)
    page = Page(text)
    check_alone(page)
    assert "<script" not in text
    assert HOSTILE in page.text
    rows = list(csv.DictReader(io.StringIO(to_csv(machines))))
    assert [row["model"] for row in rows] == ["original", HOSTILE, "'=1+1"]


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_in_a_real_browser(window: Any, folders: list[Path], tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "suite.html"
    path.write_text(suite_page(machines_of(folders)), encoding="utf-8")
    check_shown(window, path, tmp_path, width, dark=dark)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite on the real processor, again, and as a report."""
    (tmp_path / "suite.yaml").write_text("{rounds: 2, warmup_seconds: 0, energy_seconds: 0, device: cpu, threads: 1}")
    suite = ["bench", "timm:test_vit", "timm:test_vit2", *TINY, "--suite", str(tmp_path / "suite.yaml")]
    out = tmp_path / "out"
    assert run([*suite, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "[1/1] forward, eager, float32, batch 1, 1 thread" in shown.err
    assert "timm:test_vit2" in shown.out
    assert sorted(path.name for path in out.iterdir()) == ["results.jsonl", "suite.csv", "suite.html", "suite.json"]
    check_alone(Page((out / "suite.html").read_text(encoding="utf-8")))
    assert run([*suite, "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    assert "[1/1]" not in shown.err
    (record,) = json.loads(shown.out)
    assert record["models"]["timm:test_vit2"]["ratio"]["median"] > 0
    assert run(["bench", "report", str(out), "--out", str(tmp_path / "all")]) == 0
    assert (tmp_path / "all" / "suite.csv").read_text() == (out / "suite.csv").read_text()
    assert (tmp_path / "all" / "suite.html").read_text() == (out / "suite.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "report"], "--out: is missing"),
        (["bench", "report", "nowhere"], "holds no results"),
        (["bench", "report", "nowhere", "--rounds", "3"], "--rounds: found beside report"),
        (["bench", "report", "a", "b"], "--out: is missing"),
        (["bench", "timm:test_vit"], "found 1 model"),
        (["bench", "timm:test_vit", "timm:test_vit", "--retry"], "--retry: found without --suite"),
        (["bench", "timm:test_vit", "timm:test_vit2", "--suite", "suite.json"], "--out: is missing"),
        (["bench", "timm:test_vit", "timm:test_vit2", "--suite", "suite.json", "--rounds", "3"], "--rounds: found"),
        (["bench", "timm:test_vit", "timm:test_vit2", "--suite", "suite.json", "--compile", "no"], "--compile: found"),
        (["bench", "timm:test_vit", "--suite", "suite.json", "--out", "o"], "found 1 model"),
        (["bench", "timm:test_vit", "timm:nothing", "--suite", "suite.json", "--out", "o"], "nothing"),
        (["bench", "timm:test_vit", "gone.safetensors", "--suite", "suite.json", "--out", "o"], "gone.safetensors"),
        (
            ["bench", "timm:test_vit", "timm:test_vit2", "--suite", "none.json", "--out", "o"],
            "none.json: cannot be read",
        ),
        (["bench", "timm:test_vit", "timm:test_vit2", "--suite", "odd.json", "--out", "o"], "unknown key 'batches'"),
        (
            ["bench", f"{__name__}:Plain", f"{__name__}:Plain", "--suite", "suite.json", "--out", "o"],
            "Write shapes into",
        ),
        (["bench", "a:b", "timm:x", "timm:x", "--suite", "suite.json", "--out", "o"], "a model twice"),
    ],
)
def test_bad_use(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.json").write_text('{"device": "cpu", "rounds": 1, "warmup_seconds": 0}')
    (tmp_path / "odd.json").write_text('{"batches": 1}')
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()

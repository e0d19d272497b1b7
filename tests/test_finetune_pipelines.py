"""`finetune` among what users have around it: accelerators, trackers, accumulation, compilers, several processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.finetune import finetune
from linearize.gating.gate import ChannelGate
from linearize.training.priors import SparsityPrior

pytest.importorskip("accelerate")

import accelerate
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker, on_main_process

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


def network(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(nn.Linear(6, 24), *between, ChannelGate(nn.GELU(), 24), nn.Linear(24, 2))


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


def near(a: nn.Module, b: nn.Module) -> bool:
    """Equal up to the order of sums: each step of Adam divides gradients of about 1e-7 accuracy by their own size."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x.float(), y.float(), rtol=1e-3, atol=2e-5) for x, y in pairs)


@pytest.mark.parametrize("own", [False, True])
def test_accumulated_batches_are_one_step(own: bool) -> None:
    """Three parts of a batch give the step of the whole, the prior's penalty included."""
    models = [network() for _ in range(3)]
    steps: list[list[dict[str, float]]] = [[], [], []]
    for model, size, kept in zip(models, (24, 8, 8), steps, strict=True):
        options: dict[str, Any] = {}
        if size == 8 and model is models[1]:
            accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3) if own else None
            options = {"accelerator": accelerator} if own else {"accumulate": 3}
        prior = SparsityPrior(model, kind="paper", weight=0.05)
        result = finetune(model, batches(size), prior=prior, on_step=kept.append, warmup=0.0, **options)
        assert result.steps == prior.steps_taken == len(kept)
    whole, parts, small_steps = models
    assert [len(kept) for kept in steps] == [4, 4, 12]
    assert near(whole, parts)
    assert not near(whole, small_steps)
    for a, b in zip(*steps[:2], strict=True):
        assert a.keys() == b.keys()
        assert a.keys() >= {"step", "loss", "task", "prior", "lr", "share"}
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) for name in a), (a, b)


def test_what_is_left_at_the_end_of_an_epoch_counts_in_full() -> None:
    """Four batches in steps of three: the last step has one batch, and is the step of that batch."""
    data = batches(24)
    model, other = network(), network()
    finetune(model, data, accumulate=3, warmup=0.0, clip=None)
    first = (torch.cat([x for x, _ in data[:3]]), torch.cat([y for _, y in data[:3]]))
    finetune(other, [first, data[3]], warmup=0.0, clip=None)
    assert near(model, other)


def stop(record: dict[str, float]) -> None:
    raise KeyError("stop")


def test_accumulation_resumes(tmp_path: Path) -> None:
    whole, other = network(), network()
    finetune(whole, batches(8), epochs=2, accumulate=5)
    with pytest.raises(KeyError):
        finetune(other, batches(8), epochs=2, accumulate=5, checkpoint_dir=tmp_path, on_epoch=stop)
    again = network()
    result = finetune(again, batches(8), epochs=2, accumulate=5, checkpoint_dir=tmp_path, resume=True)
    assert (result.resumed_from, result.steps) == (1, 6)
    pairs = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_accelerator_of_the_users_keeps_its_state() -> None:
    mine = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    finetune(network(), batches(24), mixed_precision="no")
    assert mine.mixed_precision == "bf16"
    assert mine.gradient_accumulation_steps == 4
    assert AcceleratorState().mixed_precision == "bf16"
    seen = []

    class Seeing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x

    model = nn.Sequential(nn.Linear(6, 8), Seeing(), nn.Linear(8, 2))
    finetune(model, batches(48))  # as the user has set it
    finetune(model, batches(48), mixed_precision="no")
    finetune(model, batches(48), accelerator=mine)
    assert seen == 2 * [torch.bfloat16] + 2 * [torch.float32] + 2 * [torch.bfloat16]
    with pytest.raises(UsageError, match="mixed_precision: found 'no', and an accelerator with 'bf16'"):
        finetune(model, batches(48), accelerator=mine, mixed_precision="no")
    with pytest.raises(UsageError, match="gradient_accumulation_steps=4"):
        finetune(model, batches(48), accelerator=mine, accumulate=2)


def test_the_launchers_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = []
    model = nn.Sequential(nn.Linear(6, 2))
    model.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    finetune(model, batches(96))
    assert seen == [torch.bfloat16]
    assert not AcceleratorState._shared_state, "nothing stays behind"


class Notes(GeneralTracker):  # type: ignore[misc]
    """A tracker as users write them."""

    name = "notes"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.kept

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.kept.append((step, values))


def test_trackers_get_every_record() -> None:
    notes = Notes()
    accelerator = accelerate.Accelerator(cpu=True, log_with=notes)
    accelerator.init_trackers("run")
    model = network()
    prior = SparsityPrior(model, kind="target", target=0.5, steps=4)
    result = finetune(model, batches(24), prior=prior, accelerator=accelerator, evaluate=lambda model: {"score": 2.0})
    assert [step for step, _ in notes.kept] == [1, 2, 3, 4, 4]
    assert [values["share"] for _, values in notes.kept[:4]][-1] == 0.5
    assert notes.kept[-1][1] == {f"epoch/{name}": value for name, value in result.history[0].items()}
    assert notes.kept[-1][1]["epoch/score"] == 2.0


def test_norms_keep_their_statistics() -> None:
    model = network(norm=True)
    norm: Any = model[1]
    with torch.no_grad():
        norm.running_mean.fill_(0.3)
    before = copy.deepcopy(norm.state_dict())
    finetune(model, batches(24), keep_norms=True)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(before[name], norm.state_dict()[name])
    assert not torch.equal(before["weight"], norm.weight)
    assert norm.training, "back in the mode it was in"
    finetune(model, batches(24))
    assert not torch.equal(before["running_mean"], norm.running_mean)


def test_compiled() -> None:
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    models = [network(), network()]
    ways: tuple[Any, ...] = (False, {"backend": backend, "fullgraph": True})
    for model, chosen in zip(models, ways, strict=True):
        prior = SparsityPrior(model, kind="target", target=0.5, steps=4)
        assert finetune(model, batches(24), prior=prior, torch_compile=chosen).history[-1]["share"] == 0.5
    assert calls, "the compiler was used"
    assert near(*models)
    assert type(models[1]) is nn.Sequential
    with pytest.raises(UsageError, match="torch_compile"):
        finetune(network(), batches(24), torch_compile="inductor")  # type: ignore[arg-type]


PROGRAM = """
import sys
import torch
import accelerate
from linearize.finetune import finetune
from linearize.training.priors import SparsityPrior
from tests.test_finetune_pipelines import X, Y, network
from torch.utils.data import DataLoader, TensorDataset
accelerator = accelerate.Accelerator(cpu=True)
rank = accelerator.process_index
said = []
model = network()
prior = SparsityPrior(model, kind="target", target=0.5, steps=4)
loader = accelerator.prepare(DataLoader(TensorDataset(X, Y), 12))

def evaluate(model):
    said.append("evaluate")
    return {"score": 1.0 + rank}

result = finetune(
    model, loader, prior=prior, evaluate=evaluate, accelerator=accelerator, accumulate=1, progress=False,
    on_step=lambda record: said.append("step"), on_epoch=lambda record: said.append("epoch"),
)
try:
    finetune(network(), loader, accelerator=accelerator, evaluate=lambda model: 1 / 0, progress=False)
except Exception as error:
    failed = type(error).__name__
told = {"history": result.history, "said": said, "failed": failed, "model": model.state_dict()}
torch.save(told, f"{sys.argv[1]}/rank-{rank}.pt")
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Records are means over both, and the same in both; the user's functions are called in one."""
    program, here = tmp_path / "program.py", Path(__file__).resolve().parent.parent
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    done = subprocess.run(
        [*command, "--rdzv-endpoint=localhost:0", str(program), str(tmp_path)],
        capture_output=True, text=True, timeout=250, check=False, cwd=here,
        env={**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert first["said"] == 4 * ["step"] + ["evaluate", "epoch"]
    assert second["said"] == []
    timed = [{n: v for n, v in side["history"][0].items() if n != "seconds"} for side in (first, second)]
    assert timed[0] == timed[1]
    assert timed[0]["score"] == 1.0
    assert timed[0]["share"] == 0.5
    assert (first["failed"], second["failed"]) == ("ZeroDivisionError", "TrainingError")
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())

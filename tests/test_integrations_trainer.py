"""The Trainer of transformers, as it is, with a prior in a callback."""

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

import linearize
from linearize.errors import TrainingError, UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.training.priors import SparsityPrior
from linearize.training.state import read_state, write_state

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from linearize.integrations import PriorCallback, gated_optimizer, gated_optimizer_groups
from linearize.integrations.trainer import TRAINER_FILE

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*has changed.*:UserWarning",  # what the guard says of each checkpoint
    "ignore::FutureWarning",
    "ignore:.*pin_memory.*",
)

STEPS = 8


class Task(nn.Module):
    """A classifier as the Trainer takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), ChannelGate(nn.GELU(), 24), nn.Linear(24, 2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count: int = 64) -> list[dict[str, Any]]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": int(row[0] > 0)} for row in x]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.1,
        "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "seed": 3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**given, **more})


def prior_for(model: nn.Module, **more: Any) -> SparsityPrior:
    return SparsityPrior(model, **{"kind": "target", "target": 0.5, "steps": STEPS, "weight": 1e-2, **more})


# One step is the rate times the gradient, in the order of the data.
PLAIN = {
    "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential",
}  # fmt: skip


def trainer_for(model: nn.Module, args: TrainingArguments, prior: SparsityPrior, data: Any = None, **more: Any) -> Any:
    made = {"optimizer_cls_and_kwargs": gated_optimizer(args, model)} if "optimizers" not in more else {}
    data = rows() if data is None else data
    return Trainer(model, args, train_dataset=data, callbacks=[PriorCallback(prior)], **made, **more)


def test_the_target_is_reached_and_logged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Task()
    prior = prior_for(model)
    trainer = trainer_for(model, arguments(tmp_path), prior)
    trainer.train()
    assert prior.share == 0.5
    assert prior.steps_taken == STEPS
    shares = [record["prior_share"] for record in trainer.state.log_history if "loss" in record]
    assert shares == sorted(shares)
    assert shares[-1] == 0.5
    assert shares[0] < 0.5
    assert all(record["prior"] > 0 for record in trainer.state.log_history if "loss" in record)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks, "taken off again"


@pytest.mark.slow
def test_a_resumed_run_is_one_that_was_never_interrupted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Task()
    whole, half, other = (copy.deepcopy(model) for _ in range(3))
    trainer_for(whole, arguments(tmp_path / "whole"), prior_for(whole)).train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer_for(half, arguments(tmp_path / "half", **saving), prior_for(half))
    first.train()
    assert (tmp_path / "half" / "checkpoint-3" / TRAINER_FILE).is_file()

    torch.manual_seed(5)
    again = prior_for(other)
    trainer = trainer_for(other, arguments(tmp_path / "half", **saving), again)
    trainer.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert again.steps_taken == STEPS
    assert again.share == 0.5
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name

    # Without the state of the prior the schedule would begin anew: it is said, and nothing is trained.
    (tmp_path / "half" / "checkpoint-6" / TRAINER_FILE).unlink()
    third = copy.deepcopy(model)
    with pytest.raises(TrainingError, match="no such file"):
        trainer_for(third, arguments(tmp_path / "half", **saving), prior_for(third)).train(
            resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-6")
        )


def test_a_checkpoint_elsewhere(tmp_path: Path) -> None:
    model = Task()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_for(model, arguments(tmp_path / "a", **saving), prior_for(model)).train()
    args = arguments(tmp_path / "b")
    for folder, found in (("checkpoint-6", "of step 6"), ("checkpoint-3", None)):
        fresh = Task()
        prior = prior_for(fresh)
        callback = PriorCallback(prior, resume_from=tmp_path / "a" / folder)
        made = gated_optimizer(args, fresh)
        trainer = Trainer(fresh, args, train_dataset=rows(), callbacks=[callback], optimizer_cls_and_kwargs=made)
        at = str(tmp_path / "a" / "checkpoint-3")
        if found is None:
            trainer.train(resume_from_checkpoint=at)
            assert prior.share == 0.5
        else:
            with pytest.raises(TrainingError, match=found):
                trainer.train(resume_from_checkpoint=at)


def test_state_for_other_alphas_is_refused(tmp_path: Path) -> None:
    model = Task()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_for(model, arguments(tmp_path, **saving), prior_for(model)).train()
    path = tmp_path / "checkpoint-3" / TRAINER_FILE
    state = read_state(path)
    state["alphas"][0] += 0.25
    write_state(path, state)
    fresh = Task()
    with pytest.raises(TrainingError, match="other alphas"):
        trainer_for(fresh, arguments(tmp_path), prior_for(fresh)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def by_hand(model: Any, batches: list[Any], prior: SparsityPrior, groups: Any, *, times: float = 1.0) -> None:
    """The loop that the Trainer stands for: the prior in the loss, once for the batches of a step together."""
    optimizer = torch.optim.SGD(groups)
    model.train()
    for parts in batches:
        for part in parts:
            (model(**part)["loss"] / len(parts)).backward()
        (times * prior()).backward()
        optimizer.step()
        optimizer.zero_grad()
        prior.step()


@pytest.mark.parametrize("accumulated", [1, 4])
def test_accumulation_counts_the_prior_once(accumulated: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Task()
    models = [copy.deepcopy(start) for _ in range(3)]
    args = arguments(
        tmp_path, gradient_accumulation_steps=accumulated, per_device_train_batch_size=4, max_steps=3, **PLAIN
    )
    kind = {"kind": "paper", "weight": 0.05, "target": None, "steps": None}
    trainer_for(models[0], args, prior_for(models[0], **kind)).train()
    data = rows()
    batch = [
        {
            "x": torch.stack([r["x"] for r in data[i : i + 4]]),
            "labels": torch.tensor([r["labels"] for r in data[i : i + 4]]),
        }
        for i in range(0, 64, 4)
    ]
    steps = [batch[i * accumulated : (i + 1) * accumulated] for i in range(3)]
    for model, times in zip(models[1:], (1.0, float(accumulated) if accumulated > 1 else 2.0), strict=True):
        by_hand(model, steps, prior_for(model, **kind), gated_optimizer_groups(args, model), times=times)
    found, expected, wrong = (gates(model)["body.1"].alpha.detach() for model in models)
    assert bool((expected > 0).any())
    # Three steps of sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, wrong, rtol=1e-2)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_language_models_that_take_the_number_of_items(accumulated: int, tmp_path: Path) -> None:
    """Llama divides its loss by the items of all accumulated batches itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(2))
    start = linearize.convert(LlamaForCausalLM(config), {"input_ids": ids[:2]})
    data = [{"input_ids": row, "labels": row} for row in ids]
    found = []
    for weight in (0.0, 0.05):
        model = copy.deepcopy(start)
        args = arguments(
            tmp_path, gradient_accumulation_steps=accumulated, per_device_train_batch_size=8 // accumulated,
            max_steps=1, **PLAIN,
        )  # fmt: skip
        trainer = trainer_for(model, args, prior_for(model, kind="paper", weight=weight, target=None, steps=None), data)
        assert trainer.model_accepts_loss_kwargs
        with torch.no_grad():
            for gate in gates(model).values():
                gate.alpha.fill_(0.5)
        trainer.train()
        found.append(torch.cat([gate.alpha.detach() for gate in gates(model).values()]))
    # One step of SGD at 1e-2: the two differ by the gradient of the penalty, weight * p * (1 - alpha) ** (p - 1).
    slope = 0.05 * 0.5 * 0.5**-0.5
    torch.testing.assert_close(found[1] - found[0], torch.full_like(found[0], 1e-2 * slope), rtol=1e-3, atol=0)


def test_decay_of_the_trainers_own_optimizer_is_said(tmp_path: Path) -> None:
    model = Task()
    prior = prior_for(model)
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(), callbacks=[PriorCallback(prior)])
    with pytest.warns(UserWarning, match="alpha of 1 of 1 gates .* decays"):
        trainer.train()


def test_what_cannot_be(tmp_path: Path) -> None:
    model, other = Task(), Task()
    with pytest.raises(UsageError, match="another model"):
        trainer_for(model, arguments(tmp_path), prior_for(other)).train()
    with pytest.raises(UsageError, match="SparsityPrior"):
        PriorCallback(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no gate"):
        gated_optimizer(arguments(tmp_path), nn.Linear(2, 2))


PROGRAM = """
import sys
import torch
from pathlib import Path
from tests.test_integrations_trainer import Task, arguments, prior_for, rows, trainer_for
torch.manual_seed(0)
model = Task()
prior = prior_for(model, steps=4)
args = arguments(Path(sys.argv[1]), max_steps=4, ddp_backend="gloo", save_strategy="steps", save_steps=2)
trainer = trainer_for(model, args, prior)
trainer.train()
assert args.world_size == 2, args.world_size
torch.save({"model": model.state_dict(), "share": prior.share}, f"{sys.argv[1]}/rank-{args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--rdzv-backend=c10d",
    ]
    command += ["--rdzv-endpoint=localhost:0", str(program), str(tmp_path)]
    here = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, cwd=here,
        env={**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert first["share"] == second["share"] == 0.5
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    assert (tmp_path / "checkpoint-2" / TRAINER_FILE).is_file()

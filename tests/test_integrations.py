"""The loops of other libraries, with their own pieces: timm, accelerate, Lightning; and what they do without a word."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.errors import UsageError
from linearize.gating.gate import ChannelGate, gates
from linearize.integrations import LightningPrior, attach, gates_apart
from linearize.training.priors import SparsityPrior, param_groups

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
STEPS = 12


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), ChannelGate(nn.GELU(), 24), nn.Linear(24, 2))


def loss_of(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def prior_for(model: nn.Module, **more: Any) -> SparsityPrior:
    return SparsityPrior(model, **{"kind": "target", "target": 0.5, "steps": STEPS, "weight": 1e-2, **more})


def alphas(model: nn.Module) -> Tensor:
    return torch.cat([gate.alpha.detach() for gate in gates(model).values()])


# ---------------------------------------------------------------------------------------------------------- attach


@pytest.mark.parametrize("kind", ["paper", "folding", "target"])
def test_attached_is_the_prior_in_the_loss(kind: str) -> None:
    more = {"kind": kind} if kind == "target" else {"kind": kind, "target": None, "steps": None, "weight": 0.05}
    models = [network(), network()]
    for index, model in enumerate(models):
        with torch.no_grad():
            gates(model)["1"].alpha.fill_(0.3)
        prior, optimizer = prior_for(model, **more), torch.optim.SGD(param_groups(model, 0.1, 0.1, 0.0))
        if index:
            attach(prior, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            (loss_of(model) + (0 if index else prior())).backward()
            optimizer.step()
            if not index:
                prior.step()
        assert prior.steps_taken == 3
    a, b = (alphas(model) for model in models)
    assert not torch.allclose(a, torch.full_like(a, 0.3))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the gradient's two terms are added elsewhere


def test_state_travels_with_the_optimizers(tmp_path: Path) -> None:
    """As the checkpoints of most loops are made: model and optimizer, and nothing else."""

    def train(model: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    def made() -> tuple[nn.Module, Any, SparsityPrior]:
        model = network()
        prior, optimizer = prior_for(model), torch.optim.AdamW(param_groups(model))
        attach(prior, optimizer)
        return model, optimizer, prior

    whole, optimizer, _ = made()
    train(whole, optimizer, STEPS)
    half, optimizer, _ = made()
    train(half, optimizer, 5)
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "here.pt")
    read = torch.load(tmp_path / "here.pt", weights_only=True)
    other, optimizer, prior = made()
    other.load_state_dict(read["model"])
    optimizer.load_state_dict(read["optimizer"])
    assert prior.steps_taken == 5
    train(other, optimizer, STEPS - 5)
    assert prior.share == 0.5
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))

    # A state that was saved without the prior is told, since the schedule begins anew.
    _, optimizer, _ = made()
    with pytest.warns(UserWarning, match="saved without a prior's"):
        optimizer.load_state_dict({key: value for key, value in read["optimizer"].items() if key != "linearize_prior"})


def test_a_handle_takes_the_prior_off() -> None:
    model = network()
    prior, optimizer = prior_for(model), torch.optim.AdamW(param_groups(model))
    handle = attach(prior, optimizer)
    with pytest.raises(UsageError, match="a prior on this optimizer"):
        attach(prior_for(model), optimizer)
    handle.remove()
    loss_of(model).backward()
    optimizer.step()
    assert prior.steps_taken == 0
    assert "linearize_prior" not in optimizer.state_dict()
    attach(prior, optimizer).remove()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_has_the_same_penalty(fused: bool) -> None:
    """torch's GradScaler takes its scale out of the gradients before the step, or leaves it to a fused one."""
    found = []
    for scale in (None, 1024.0, 4096.0):
        model = network()
        with torch.no_grad():
            gates(model)["1"].alpha.fill_(0.3)
        optimizer = torch.optim.SGD(param_groups(model, 0.1, 0.1, 0.0), fused=fused)
        attach(prior_for(model, kind="paper", target=None, steps=None, weight=0.05), optimizer)
        if scale is None:
            loss_of(model).backward()
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss_of(model)).backward()
            scaler.step(optimizer)
        found.append(alphas(model))
    assert not torch.allclose(found[0], torch.full_like(found[0], 0.3))
    # Scales are powers of two: what remains is rounding.
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=1e-7)


def test_wrong_arguments() -> None:
    model = network()
    prior = prior_for(model)
    with pytest.raises(UsageError, match="optimizer"):
        attach(prior, model)
    with pytest.raises(UsageError, match="prior"):
        attach(3, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(param_groups(model))
    with pytest.raises(UsageError, match="no gate"):
        gates_apart(optimizer, nn.Linear(2, 2))
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(UsageError, match="scheduler"):
        gates_apart(optimizer, model)
    optimizer = torch.optim.AdamW(param_groups(model))
    loss_of(model).backward()
    optimizer.step()
    with pytest.raises(UsageError, match="steps"):
        gates_apart(optimizer, model)


def test_groups_with_names() -> None:
    model = network()
    optimizer = gates_apart(torch.optim.AdamW(model.named_parameters(), lr=1.0), model, gate_lr=0.5)
    assert [group["param_names"] for group in optimizer.param_groups][-1] == ["1.alpha"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


# ------------------------------------------------------------------------------------- states that go wrong silently


def test_frozen_alphas_are_said_once() -> None:
    model = network()
    prior = prior_for(model)
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"1 of 1 gates \(act 0\) are not trained"):
        prior()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.step()


def test_alphas_out_of_the_optimizer_are_said() -> None:
    model = network()
    with pytest.warns(UserWarning, match="is not in the optimizer"):
        attach(prior_for(model), torch.optim.AdamW(model[0].parameters()))


@pytest.mark.parametrize("divided", [True, False])
def test_a_penalty_that_counts_twice_is_said(divided: bool) -> None:
    model = network()
    prior = prior_for(model, kind="paper", target=None, steps=None)
    optimizer = torch.optim.SGD(param_groups(model))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            for half in X.split(32):
                task = loss_of(model, half, Y[:32]) / 2
                (task + (prior() / 2 if divided else prior())).backward()
            optimizer.step()
            prior.step()
            optimizer.zero_grad()
    texts = [str(each.message) for each in told]
    assert len(texts) == (0 if divided else 1), texts
    assert divided or "was added 2 times before prior.step(), and counts 2 times" in texts[0]


# ------------------------------------------------------------------------------------------------------------- timm


@cache
def _vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return linearize.convert(timm.create_model("test_vit", num_classes=4, img_size=32))


def vit() -> nn.Module:
    return copy.deepcopy(_vit())


def images() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(4)
    return torch.randn(8, 3, 32, 32, generator=drawn), torch.randint(0, 4, (8,), generator=drawn)


def timm_optimizer(model: nn.Module) -> Any:
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)


def test_layer_decay_leaves_the_gates_alone() -> None:
    model = vit()
    plain = timm_optimizer(model)
    prior = prior_for(model)
    with pytest.warns(UserWarning, match="scaled by the depth"):
        attach(prior, plain).remove()
    optimizer = gates_apart(timm_optimizer(model), model, gate_lr=0.02)
    attach(prior, optimizer)
    own = {id(gate.alpha) for gate in gates(model).values()}
    groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
    assert len(groups) == 1
    assert {id(p) for p in groups[0]["params"]} == own
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (0.02, 0.0)
    assert "lr_scale" not in groups[0]
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == sum(len(group["params"]) for group in plain.param_groups)

    from timm.scheduler import CosineLRScheduler

    scheduler = CosineLRScheduler(optimizer, t_initial=4, lr_min=0.0)
    scheduler.step(2)
    assert groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.filterwarnings("ignore:.*weights_only.*")
def test_timms_train_loop(tmp_path: Path) -> None:
    """Mixup with soft targets, an average of the weights, the saver, and a run that is resumed from its file."""
    pytest.importorskip("timm")
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver, ModelEmaV3

    criterion = SoftTargetCrossEntropy()
    x, y = images()

    def made() -> tuple[nn.Module, Any, SparsityPrior, Any]:
        model = vit()
        optimizer = gates_apart(timm_optimizer(model), model, gate_lr=0.05)
        prior = prior_for(model, steps=6)
        attach(prior, optimizer)
        return model, optimizer, prior, ModelEmaV3(model, decay=0.7)

    def train(model: nn.Module, optimizer: Any, ema: Any, steps: range) -> None:
        model.train()
        for step in steps:
            torch.manual_seed(step)
            import numpy as np

            np.random.seed(step)  # noqa: NPY002 - mixup draws from it
            mixed, soft = Mixup(mixup_alpha=0.8, num_classes=4, label_smoothing=0.1)(x.clone(), y.clone())
            optimizer.zero_grad()
            criterion(model(mixed), soft).backward()
            optimizer.step()
            ema.update(model)

    whole, optimizer, prior, ema = made()
    train(whole, optimizer, ema, range(6))
    assert prior.share == 0.5

    half, optimizer, _, ema_half = made()
    saver = CheckpointSaver(
        half, optimizer, model_ema=ema_half, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    train(half, optimizer, ema_half, range(3))
    saver.save_checkpoint(0, metric=0.5)
    other, optimizer, again, ema_other = made()
    resume_checkpoint(other, str(tmp_path / "last.pth.tar"), optimizer, log_info=False)
    ema_other.module.load_state_dict(torch.load(tmp_path / "last.pth.tar", weights_only=True)["state_dict_ema"])
    assert again.steps_taken == 3
    train(other, optimizer, ema_other, range(3, 6))
    assert again.share == 0.5
    for a, b in ((whole, other), (ema.module, ema_other.module)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name

    # The average stops half way, and says so; rounded it is decided.
    average = ema.module.eval()
    undecided = sum(int(gate.half_way.sum()) for gate in gates(average).values())
    assert undecided > 0
    with pytest.warns(UserWarning, match=rf"{undecided} of \d+ channels have an alpha between 0 and 1.*round_\(\)"):
        linearize.collapse(average)
    for gate in gates(average).values():
        gate.round_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = linearize.collapse(average, when="always")
    assert linearize.verify(average, small, [x]).passed


# ------------------------------------------------------------------------------------------------------- accelerate


def test_accelerates_loop(tmp_path: Path) -> None:
    """Gradients accumulate, state is saved and loaded by accelerate alone."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def run(model: nn.Module, accumulated: int, first: int, last: int, folder: str | None = None) -> SparsityPrior:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        prior = prior_for(model, steps=6)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(param_groups(model)))
        attach(prior, optimizer)
        if folder is not None:
            accelerator.load_state(folder)
        for step in range(first, last):
            for part in X.roll(step, 0).split(64 // accumulated):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(loss_of(wrapped, part, Y[: len(part)]))
                    optimizer.step()
                    optimizer.zero_grad()
        accelerator.save_state(str(tmp_path / f"{accumulated}-{last}"), safe_serialization=True)
        return prior

    for accumulated in (1, 4):
        whole, half, other = network(), network(), network()
        assert run(whole, accumulated, 0, 6).share == 0.5
        run(half, accumulated, 0, 3)
        prior = run(other, accumulated, 3, 6, str(tmp_path / f"{accumulated}-3"))
        assert prior.steps_taken == 6
        assert prior.share == 0.5
        pairs = zip(whole.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    AcceleratorState._reset_state()
    GradientState._reset_state()


# -------------------------------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is in no extra that CI installs")
    from torch.utils.data import DataLoader, TensorDataset

    class Task(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.model, *batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(param_groups(self.model, 1e-2))

    def fit(model: nn.Module, steps: int, prior: SparsityPrior, path: Path | None = None, **more: Any) -> Any:
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[LightningPrior(prior)], default_root_dir=str(tmp_path),
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **more,
        )  # fmt: skip
        loader = DataLoader(TensorDataset(X[:32].repeat(2, 1), Y[:32].repeat(2)), 32)
        trainer.fit(Task(model), loader, ckpt_path=None if path is None else str(path))
        return trainer

    # All batches are the same: where Lightning resumes within an epoch is its own affair.
    whole, half, other = network(), network(), network()
    prior = prior_for(whole, steps=6)
    trainer = fit(whole, 6, prior, log_every_n_steps=1)
    assert prior.share == 0.5
    assert float(trainer.logged_metrics["prior_share"]) == 0.5
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks, "taken off again"
    fit(half, 3, prior_for(half, steps=6)).save_checkpoint(tmp_path / "half.ckpt")
    again = prior_for(other, steps=6)
    fit(other, 6, again, tmp_path / "half.ckpt")
    assert again.steps_taken == 6
    assert again.share == 0.5
    pairs = zip(whole.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    accumulating = network()
    prior = prior_for(accumulating, steps=2)
    fit(accumulating, 2, prior, accumulate_grad_batches=2)
    assert prior.steps_taken == 2
    assert prior.share == 0.5

    with pytest.raises(UsageError, match="no optimizer with the gates"):
        fit(network(), 1, prior_for(network()))


# ------------------------------------------------------------------------------------------------------------- PEFT


@cache
def _gated_llama() -> nn.Module:
    return linearize.convert(llama(), {"input_ids": IDS})


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return made


IDS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(3))


@pytest.mark.filterwarnings("ignore")
def test_lora_on_a_collapsed_model() -> None:
    peft = pytest.importorskip("peft")
    gated = copy.deepcopy(_gated_llama())
    for gate in gates(gated).values():
        gate.linearize_(torch.rand(gate.channels) < 0.7)
    small = linearize.collapse(gated, when="always")
    before = small(input_ids=IDS).logits.detach()
    tuned = peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(tuned(input_ids=IDS).logits, before)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
    assert tuned(input_ids=IDS, labels=IDS).loss < loss
    after = tuned.eval()(input_ids=IDS).logits.detach()
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.slow
def test_adapters_on_the_way_in_are_named_and_merged() -> None:
    """Sites whose maps have adapters beside them stay, with that reason; merged first, they are like any other."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(llama(), config).eval()
    rows = linearize.summary(linearize.convert(adapted, {"input_ids": IDS})).sites
    assert rows
    assert all("has an adapter beside its weight: merge it first" in str(row.reason) for row in rows)
    merged = adapted.merge_and_unload()
    gated = linearize.convert(merged, {"input_ids": IDS})
    for gate in gates(gated).values():
        gate.linearize_(torch.ones(gate.channels, dtype=torch.bool))
    small = linearize.collapse(gated)
    assert {row.form for row in linearize.summary(gated).sites} == {"vanished"}
    assert linearize.verify(gated, small, [{"input_ids": IDS}]).passed


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_alphas_that_get_peft_model_froze_are_said() -> None:
    peft = pytest.importorskip("peft")
    gated = copy.deepcopy(_gated_llama())
    tuned = peft.get_peft_model(gated, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    prior = SparsityPrior(tuned)
    with pytest.warns(UserWarning, match=r"2 of 2 gates .* get_peft_model"):
        prior.step()
    for gate in gates(tuned).values():
        gate.alpha.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparsityPrior(tuned).step()

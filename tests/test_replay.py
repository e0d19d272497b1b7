"""Runs that start late give what whole runs give, bit for bit, or start at the beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.running.batches import read_batch
from linearize.running.models import evaluating
from linearize.running.replay import Replay
from linearize.surgery.specs import replace_module
from linearize.training.distance import losses_with_all

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.calls = nn.Linear(5, 9), nn.Linear(9, 5), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    """Blocks in a list, and what a kind of chain does besides."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.head, self.kind = (
            nn.Linear(5, 5),
            nn.ModuleList(Block() for _ in range(4)),
            nn.Linear(5, 3),
            kind,
        )

    def forward(self, x: Tensor) -> Tensor:
        x, sums = self.first(x), 0
        for block in self.blocks:
            x = block(x)
            if self.kind == "in place":
                x.mul_(0.5)
            if self.kind == "notes":
                sums += getattr(block, "calls", 0)
        if self.kind == "twice":
            x = self.blocks[0](x)
        if self.kind == "random":
            x = x + torch.rand_like(x)
        out: Tensor = self.head(x) + sums
        return out


def trial(model: Chain, path: str) -> tuple[Tensor, Tensor, list[int]]:
    """The output with another module in a place, by a run that starts late and a whole one; the blocks computed."""
    other: nn.Module = nn.Linear(9, 5) if path.endswith("down") else nn.Linear(5, 5)
    replay, batch = Replay(model), read_batch(model, X)
    with evaluating(model):
        replay.run(batch)
        before = [block.calls if isinstance(block, Block) else 0 for block in model.blocks]
        own = model.get_submodule(path)
        replace_module(model, path, other)
        with replay.before([path]):
            late = batch.run(model)
        calls = [getattr(block, "calls", n) - n for block, n in zip(model.blocks, before, strict=True)]
        whole = batch.run(model)
        replace_module(model, path, own)
    return late, whole, calls


@pytest.mark.parametrize(
    ("kind", "path", "computed"),
    [
        ("plain", "blocks.2.down", [0, 0, 1, 1]),
        ("plain", "blocks.0", [0, 1, 1, 1]),
        ("plain", "head", [1, 1, 1, 1]),  # no stage: nobody knows what comes before it
        ("in place", "blocks.2.down", [0, 0, 1, 1]),
        ("twice", "blocks.2.down", [2, 0, 1, 1]),  # what is called twice is computed
    ],
)
def test_what_comes_first_is_not_computed_again(kind: str, path: str, computed: list[int]) -> None:
    late, whole, calls = trial(Chain(kind), path)
    assert torch.equal(late, whole)
    assert calls == computed


@pytest.mark.parametrize("kind", ["notes", "random"])
def test_a_model_that_does_more_runs_as_a_whole(kind: str) -> None:
    model = Chain(kind)
    replay = Replay(model)
    with evaluating(model):
        replay.run(read_batch(model, X))
    assert replay.stages == ()


def test_without_memory_for_the_values_runs_are_whole() -> None:
    model = Chain()
    replay = Replay(model, memory=3 * X.nbytes)
    with evaluating(model):
        replay.run(read_batch(model, X))
    assert replay.stages == ()


def test_the_model_is_left_as_it_was() -> None:
    model = Chain()
    model.blocks[1].forward = model.blocks[1].forward
    own = vars(model.blocks[1])["forward"]
    trial(model, "blocks.3")
    assert vars(model.blocks[1])["forward"] is own
    assert all("forward" not in vars(model.blocks[index]) for index in (0, 2, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_losses_are_those_of_whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Chain().double().eval(), [X.double(), X.double().flip(0) * 2]
    standing: dict[str, dict[str, nn.Module]] = {
        "one": {"blocks.2": nn.Identity()},
        "two": {"blocks.1.down": nn.Linear(9, 5).double(), "blocks.3": nn.Identity()},
        "head": {"head": nn.Linear(5, 3).double()},
    }
    found = losses_with_all(model, standing, batches)
    whole: Callable[..., Any] = Replay._replaying
    monkeypatch.setattr(Replay, "_replaying", lambda self, _: whole(self, []))
    assert losses_with_all(model, standing, batches) == found
    assert all(loss > 0 for loss in found.values())


def test_a_decoder_with_a_cache_starts_late_too() -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes)).eval()
    batch = read_batch(model, {"input_ids": torch.arange(12).view(2, 6)})
    replay = Replay(model)
    with evaluating(model):
        replay.run(batch)
        assert len(replay.stages) == 3
        model.model.layers[2].mlp = nn.Identity()
        with replay.before(["model.layers.2.mlp"]):
            late = batch.run(model)
        assert torch.equal(late.logits, batch.run(model).logits)

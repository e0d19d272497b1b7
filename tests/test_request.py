"""One request: checked where it is made, and told apart by everything that the result depends on."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from benchmarks.stress import toys
from linearize.compress import compress
from linearize.errors import UsageError
from linearize.planning.request import Request
from linearize.planning.resume import fingerprint

OTHER: dict[str, Any] = {
    "latency": 0.4, "flops": 0.4, "params": 0.4, "speedup": 3, "activations": 0.4, "linear": 0.4, "finetune": 3,
    "distill": False, "example_inputs": torch.ones(2, 8), "include": ["a"], "exclude": ["a"], "sequential": True,
    "search": 3, "output": "logits", "uniform": True, "stock": True, "modules": False, "round_to": 4, "when": "always",
    "batch_sizes": [1, 7], "rounds": 3, "seed": 1, "target": "gguf", "families": ("channels", "heads"), "runtime": len,
    "decode": 3, "prefill": 0.4, "memory": 0.4, "serving": (8, 64),
}  # fmt: skip
ASIDE = {"evaluate", "dry_run", "cache", "checkpoint_dir", "progress", "plan"}
ELSEWHERE = {"method", "candidates"}  # in test_method.py: they need more options


def test_every_option_is_in_the_key_or_said_to_be_aside() -> None:
    assert {field.name for field in fields(Request)} == set(OTHER) | ASIDE | ELSEWHERE


@pytest.mark.parametrize("name", sorted(OTHER))
def test_another_option_is_another_request(name: str) -> None:
    budget = name in ("latency", "flops", "params", "speedup", "activations", "linear", "decode", "prefill", "memory")
    other = {"memory": 0.5} if name == "serving" else {"flops": 0.5}
    first = Request(**({name: 0.5 if name not in ("speedup", "decode") else 2} if budget else other))
    keys = [fingerprint(nn.Identity(), request.key) for request in (first, replace(first, **{name: OTHER[name]}))]
    assert keys[0] != keys[1]
    assert keys[0] == fingerprint(nn.Identity(), replace(first).key)


def test_options_of_training_are_told_apart_by_name() -> None:
    some = [Request(flops=0.5, finetune={"epochs": 1, name: 0.25}) for name in ("warmup", "distill_weight")]
    assert fingerprint(nn.Identity(), some[0].key) != fingerprint(nn.Identity(), some[1].key)


def test_what_is_aside_makes_no_other_request(tmp_path: Path) -> None:
    other = Request(flops=0.5, evaluate=len, cache=False, checkpoint_dir=tmp_path, progress=print)
    assert fingerprint(nn.Identity(), other.key) == fingerprint(nn.Identity(), Request(flops=0.5).key)


def test_a_request_cannot_be_changed() -> None:
    request = Request(flops=0.5)
    with pytest.raises(FrozenInstanceError):
        request.flops = 0.4  # type: ignore[misc]
    with pytest.raises(UsageError, match="flops: found 2"):
        replace(request, flops=2)


def test_an_interrupted_run_with_other_batch_sizes_makes_its_own_plan(tmp_path: Path) -> None:
    """The sizes for latencies are part of what was asked."""

    def stop(line: str) -> None:
        if "epoch 1" in line:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"flops": 0.6, "search": 0, "rounds": 0, "cache": False, "finetune": 2}
    options["checkpoint_dir"] = tmp_path
    with pytest.raises(KeyboardInterrupt):
        compress(toys.network(), toys.data(), batch_sizes=[1], progress=stop, **options)
    (noted,) = tmp_path.rglob("plan.json")
    for sizes, again in (([2], False), ([1], True)):
        lines: list[str] = []
        compress(toys.network(), toys.data(), batch_sizes=sizes, progress=lines.append, **options)
        assert any("plan of the run that was interrupted" in line for line in lines) is again
        assert any("epoch 1" in line for line in lines) is not again
        assert noted.exists() is not again  # what another request has noted stays
    assert not tmp_path.exists()


def test_a_plan_that_was_noted_is_plain_json(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line == "fine-tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toys.compress_job(tmp_path, progress=stop)
    (noted,) = tmp_path.rglob("plan.json")
    held = json.loads(noted.read_text())
    assert {"sha256", "decision", "format"} == set(held)
    assert held["decision"]["outcome"]["met"] is True


def test_the_function_and_the_request_have_the_same_defaults() -> None:
    """They are written in both, since a signature is what people read."""
    parameters = inspect.signature(linearize.compress).parameters
    shared = {field.name: field.default for field in dataclasses.fields(Request) if field.name in parameters}
    assert len(shared) > 30
    assert shared == {name: parameters[name].default for name in shared}

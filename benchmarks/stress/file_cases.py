"""The cases of `files.py`, one by one: a hostile file, plan or table of latencies, and what came of it."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import linearize
from benchmarks.stress.file_mutations import mutated_file, mutated_json
from benchmarks.stress.watch import Watch
from linearize.errors import LinearizeError
from linearize.planning.timing.table import LatencyTable
from linearize.surgery.form_choice import make_plan
from linearize.zoo import create

__all__ = ["LIMIT", "Cases"]

LIMIT = 10.0
"""Seconds of the processor that a case may take: a busy machine must not count as a slow file."""


class TooLong(BaseException):
    """A case takes longer than it may; no `except Exception` stops this."""


class Net(nn.Module):
    """A model of no library: convolutions, a norm, an activation that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.second, self.act, self.head = nn.Conv2d(16, 8, 1), nn.GELU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to scores (B, 4)."""
        x = self.act(self.second(functional.relu(self.norm(self.first(x)))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@dataclass
class Subject:
    """A good file: its bytes, how it is loaded, and what its model computes."""

    name: str
    raw: bytes
    base: Callable[[], nn.Module] | None
    inputs: Any
    output: Tensor


def _tiny(kind: str, head: str, **sizes: int) -> Callable[[], nn.Module]:
    """What makes a small model of transformers."""
    import transformers

    def make() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(hidden_size=16, vocab_size=100, **sizes)
        model: nn.Module = getattr(transformers, f"{kind}{head}")(config)
        return model.eval()

    return make


_DECODER = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def _compressed(model: nn.Module, **options: Any) -> nn.Module:
    """Smaller by other families than channels: experts, heads, whole layers."""
    data = [{"input_ids": torch.randint(0, 100, (4, 12))} for _ in range(4)]
    return linearize.compress(model, data, params=0.85, progress=False, **options).model


def _run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found.clone()


def subjects(folder: Path) -> list[Subject]:
    """Three models, each with gates and collapsed, and two that other families have changed; saved."""
    torch.manual_seed(0)
    ids = {"input_ids": torch.arange(8)[None], "use_cache": False}
    bases: list[tuple[str, Callable[[], nn.Module], Any]] = [
        ("timm", lambda: create("timm:test_vit", num_classes=10, img_size=32, in_chans=1), torch.randn(2, 1, 32, 32)),
        ("transformers", _tiny("Llama", "ForCausalLM", intermediate_size=48, **_DECODER), ids),
        ("plain", Net, torch.randn(2, 3, 6, 6)),
    ]
    found = []
    for name, make, inputs in bases:
        gated = linearize.convert(make().eval(), inputs)
        for gate in linearize.gates(gated).values():
            gate.linearize_(torch.rand(gate.channels) < 0.7)
        for stage, model in (("gated", gated), ("collapsed", linearize.collapse(gated, when="always"))):
            path = folder / f"{name}-{stage}.safetensors"
            linearize.save(model, path)
            base = make if name == "plain" else None
            found.append(Subject(f"{name} {stage}", path.read_bytes(), base, inputs, _run(model.eval(), inputs)))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    layers = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
    mixtral = _tiny("Mixtral", "ForCausalLM", intermediate_size=24, **_DECODER, **experts)
    bert = _tiny("Bert", "ForMaskedLM", intermediate_size=24, **layers)
    for name, make, families, given in (
        ("mixture", mixtral, ["experts"], ids),
        ("encoder", bert, ["heads", "depth", "modules"], {"input_ids": ids["input_ids"]}),
    ):
        model = _compressed(make(), families=families)
        path = folder / f"{name}.safetensors"
        linearize.save(model, path)
        found.append(Subject(f"{name} compressed", path.read_bytes(), None, given, _run(model.eval(), given)))
    return found


class _Evil:
    """What a pickle that is opened does: a file named `ran` says so."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


class Cases:
    """Makes and tries cases by number; the same number and seed give the same case.

    Args:
        folder: a folder of its own, which becomes the current one: it holds bait.
        seed: of all cases.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        warnings.simplefilter("ignore")
        self.folder, self.seed = folder.resolve(), seed
        os.chdir(self.folder)
        Path("evil.pth").write_bytes(pickle.dumps(_Evil()))
        Path("evil.py").write_text("open('ran', 'w').close()\nclass Evil: pass\n", encoding="utf-8")
        Path("evil").mkdir(exist_ok=True)
        Path("evil/config.json").write_text('{"architecture": "test_vit", "auto_map": {}}', encoding="utf-8")
        sys.path.insert(0, str(self.folder))
        self.subjects = subjects(self.folder)
        text = linearize.collapse.__doc__ or ""
        self.plan = _plan()
        self.table = json.dumps({f"{abs(hash(text)) % 10**6}{n}": 0.5 + n / 7 for n in range(40)})
        own = ("case.safetensors", "latency.json", ".linearize-", "ran")
        self.watch = Watch(*(str(self.folder / name) for name in own), folder=str(self.folder))
        signal.signal(signal.SIGPROF, _stop)

    def run(self, kind: str, number: int) -> dict[str, Any]:
        """What came of a case."""
        random = Random(f"{self.seed} {kind} {number}")  # noqa: S311 - cases, not secrets
        work = {"file": self._file, "plan": self._plan, "cache": self._cache}[kind]
        before = _memory(reset=True)
        start = time.process_time()
        self.watch.start()
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            found = work(random)
        except TooLong:
            found = {"outcome": "hang"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            seen = self.watch.stop()
        if Path("ran").exists():
            seen.setdefault("code", []).append("the bait ran")
            Path("ran").unlink()
        used = _memory() - before
        return {**found, "seconds": time.process_time() - start, "memory": used, "seen": seen}

    def _file(self, random: Random) -> dict[str, Any]:
        subject, other = random.choice(self.subjects), random.choice(self.subjects)
        raw, change = mutated_file(subject.raw, other.raw, random)
        path = self.folder / "case.safetensors"
        path.write_bytes(raw)
        told = {"subject": subject.name, "change": change, "size": len(raw)}
        base = None if subject.base is None else subject.base()
        model, outcome = _tried(lambda: linearize.load(path, model=base))
        if model is None:
            return {**told, **outcome}
        try:
            output = _run(model, subject.inputs)
        except Exception as error:  # a forward may do anything
            return {
                **told,
                "outcome": "loads, fails at the first call",
                "text": f"{type(error).__name__}: {error!s:.120}",
            }
        same = output.shape == subject.output.shape and torch.allclose(output, subject.output, rtol=1e-4, atol=1e-5)
        outcome = {"outcome": "the same function" if same else f"other weights or numbers ({change})"}
        if linearize.gates(model):
            small, failed = _tried(lambda: linearize.collapse(model, when="always"))
            if small is None and failed["outcome"] == "foreign":
                return {**told, **failed, "text": f"collapse: {failed['text']}"}
            if small is not None and same:
                outcome["outcome"] = _after_collapse(small, subject, outcome["outcome"])
        return {**told, **outcome}

    def _plan(self, random: Random) -> dict[str, Any]:
        text = mutated_json(self.plan, random)
        plan, outcome = _tried(lambda: linearize.Plan.from_json(text))
        if plan is None:
            return outcome
        _, outcome = _tried(lambda: (str(plan), plan.sha256))
        return {"outcome": "a plan", **outcome}

    def _cache(self, random: Random) -> dict[str, Any]:
        path = self.folder / "latency.json"
        text = mutated_json(self.table, random).encode("utf-8", "surrogatepass")
        path.write_bytes(text if random.random() < 0.9 else bytes(random.randrange(256) for _ in range(100)))
        table, outcome = _tried(lambda: LatencyTable.open(path))
        if table is None:
            return outcome
        wrong = [value for value in table.entries.values() if not math.isfinite(value) or value <= 0]
        _, outcome = _tried(table.save)
        return {"outcome": "foreign", "text": f"kept {wrong[0]}"} if wrong else {"outcome": "a table", **outcome}


def _after_collapse(small: nn.Module, subject: Subject, before: str) -> str:
    """A file that loads as the same function must also collapse to it, or refuse."""
    with suppress(Exception):
        if torch.allclose(_run(small, subject.inputs), subject.output, rtol=1e-3, atol=1e-4):
            return before
    return "the same function, another one collapsed"


def _plan() -> str:
    torch.manual_seed(0)
    gated = linearize.convert(Net().eval(), torch.randn(2, 3, 6, 6))
    for gate in linearize.gates(gated).values():
        gate.linearize_(torch.rand(gate.channels) < 0.7)

    return make_plan(gated, when="always").to_json()


def _tried(action: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What an action gives, and what came of it."""
    try:
        return action(), {}
    except LinearizeError as error:
        text = str(error)
        if "memory" in text and "than there is in the file" not in text:
            return None, {"outcome": "refused", "text": text[:200], "note": "out of memory"}
        return None, {"outcome": "refused", "text": text[:200]}
    except Exception as error:  # what is looked for
        return None, {"outcome": "foreign", "text": f"{type(error).__name__}: {error!s:.200}"}


def _stop(_signal: int, _frame: Any) -> None:
    raise TooLong


def _memory(*, reset: bool = False) -> int:
    """Bytes of this process at their peak since the last reset; now, at a reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    name = "VmRSS:" if reset else "VmHWM:"
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

"""Processes that are killed at random moments, and what is left behind them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import linearize
from benchmarks.stress import toys
from linearize.planning.timing.table import LatencyTable
from linearize.storage.digest import take_in
from linearize.storage.tensorfile import read_tensors

__all__ = ["ABORTED", "TARGETS", "Target", "interrupt", "kill", "warm"]

# Now and then torch ends a forked process itself ("Invalid thread pool"): that is one kill more.
ABORTED = "aborted"
_ATTEMPTS = 4
_ENTRIES = 40  # that each write adds to the latency table
_CLI = [
    "compress", "timm:test_vit", "-a", "img_size=8", "-a", "patch_size=4", "-a", "depth=1", "-a", "in_chans=1",
    "--data", "digits", "--flops", "0.7", "--epochs", "1", "--train", "1", "--limit", "96", "--search", "1",
    "--batch", "32",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Something to be killed.

    Attributes:
        job: works in a folder, and goes on with what it finds there.
        judge: given the folder after a kill, runs the job to its end if it must, and says what came out: "" if that is
            what an uninterrupted run gives.
        variants: options of the job, of which each run takes one; they are in variant.json.
    """

    job: Callable[[Path], None]
    judge: Callable[[Path], str]
    variants: tuple[Mapping[str, Any], ...] = ({},)


def _save(folder: Path) -> None:
    for turn in range(12):
        linearize.save(toys.network(turn % 2), folder / "model.safetensors")


def _judge_saved(folder: Path) -> str:
    path = folder / "model.safetensors"
    if path.exists():
        found = toys.digest(linearize.load(path, model=toys.network()))
        if found not in {toys.digest(toys.network(seed)) for seed in (0, 1)}:
            return "the file holds neither model"
    linearize.save(toys.network(), path)
    return "" if toys.digest(linearize.load(path, model=toys.network())) == toys.digest(toys.network()) else "not saved"


def _variant(folder: Path) -> dict[str, Any]:
    path = folder / "variant.json"
    held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return held


def _finetune(folder: Path) -> None:
    (folder / "told.json").write_text(json.dumps(toys.finetune_job(folder / "run", **_variant(folder))))


def _compress(folder: Path) -> None:
    (folder / "told.json").write_text(json.dumps(toys.compress_job(folder / "run", **_variant(folder))))


def _command(folder: Path) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        from linearize.cli import run

        code = run([*_CLI, "--out", str(folder / "out")])
    if code:
        raise RuntimeError(shown.getvalue()[-500:])
    told: dict[str, Any] = {"plan": (folder / "out" / "plan.json").read_text()}
    for name in ("original", "compressed"):
        tensors = read_tensors(folder / "out" / f"{name}.safetensors", "cpu")
        summed = hashlib.sha256()
        for key in sorted(tensors):
            take_in(summed, tensors[key])
        told[name] = summed.hexdigest()
    report = json.loads((folder / "out" / "report.json").read_text())
    told |= {key: report[key] for key in ("quality", "budget", "cost")}
    told["left"] = sorted(path.name for path in (folder / "out").iterdir())
    (folder / "told.json").write_text(json.dumps(told))


def _table(folder: Path) -> None:
    for turn in range(60):
        table = LatencyTable.open(folder / "latency.json")
        table.entries.update({f"{turn} {i} {random.random()}": 1.0 for i in range(_ENTRIES)})  # noqa: S311
        table.save()


def _judge_table(folder: Path) -> str:
    path = folder / "latency.json"
    entries = LatencyTable.open(path).entries
    if path.exists() and (not entries or len(entries) % _ENTRIES):
        return f"the table holds {len(entries)} entries"
    return ""


_WHOLE: dict[str, str] = {}  # what uninterrupted runs told


def _judge(job: Callable[[Path], None]) -> Callable[[Path], str]:
    """Run the job to its end, and compare with a run that was never interrupted."""

    def judge(folder: Path) -> str:
        name = f"{job.__name__} {_variant(folder)}"
        if name not in _WHOLE:
            whole = folder.with_name(f"whole{job.__name__}")
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir(parents=True)
            (whole / "variant.json").write_text(json.dumps(_variant(folder)))
            if status := _to_its_end(job, whole):
                raise RuntimeError(f"{name} does not run by itself: {status}")
            _WHOLE[name] = (whole / "told.json").read_text()
        (folder / "told.json").unlink(missing_ok=True)
        if status := _to_its_end(job, folder):
            return status
        return "" if (folder / "told.json").read_text() == _WHOLE[name] else "another result"

    return judge


def _to_its_end(job: Callable[[Path], None], folder: Path) -> str:
    """Run a job in a process of its own, again where torch aborts it: the threads of its pool do not survive a fork."""
    status = ABORTED
    for _ in range(_ATTEMPTS):
        status = forked(lambda: job(folder), None)
        if status != ABORTED:
            break
    return status


_WAYS: tuple[Mapping[str, Any], ...] = (
    {},
    {"sequential": False, "finetune": {"epochs": 2, "gradual": 0.5}},
    {"flops": None, "linear": 0.5, "sequential": False},
    {"flops": None, "params": 0.7, "epochs": 0},
    {"flops": None, "activations": 0.5, "sequential": False, "epochs": 1},
    {"uniform": True, "epochs": 1},
)

TARGETS: dict[str, Target] = {
    "save": Target(_save, _judge_saved),
    "finetune": Target(_finetune, _judge(_finetune), ({}, {"keep": 1}, {"weight_decay": 0.0, "clip": None})),
    "compress": Target(_compress, _judge(_compress), _WAYS),
    "command line": Target(_command, _judge(_command)),
    "latency cache": Target(_table, _judge_table),
}
"""What is killed, by name."""


def forked(work: Callable[[], object], kill_after: float | None) -> str:
    """Run something in a process of its own, which is killed after some seconds: "", "killed", or what went wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reading)
            work()
            code = 0
        except BaseException:
            os.write(writing, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(code)
    os.close(writing)
    if kill_after is not None:
        deadline = time.perf_counter() + kill_after
        while time.perf_counter() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(min(0.002, max(0.0, deadline - time.perf_counter())))
        else:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    else:
        _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else ABORTED
    return told.strip() or ("" if status == 0 else f"status {status}")


def kill(name: str, folder: Path, rng: random.Random) -> tuple[bool, str]:
    """Kill a target at a random moment: whether it was still at work, and what is wrong with what came of it then."""
    target = TARGETS[name]
    variant = json.dumps(rng.choice(target.variants))

    def anew() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "variant.json").write_text(variant)

    anew()
    if name not in _SECONDS:
        start = time.perf_counter()
        wrong = forked(lambda: target.job(folder), None)
        if wrong:
            return False, wrong
        _SECONDS[name] = time.perf_counter() - start
        anew()
    status = forked(lambda: target.job(folder), rng.uniform(0, _SECONDS[name]))
    if status not in ("killed", ABORTED):
        return False, status
    return True, target.judge(folder)


_SECONDS: dict[str, float] = {}  # that an uninterrupted run takes


def interrupt(rng: random.Random, longest: float) -> tuple[bool, str]:
    """Interrupt `compress` by a signal at a random moment: whether it was, and what of the user's model has changed."""
    delay = rng.uniform(0, longest)

    def work() -> None:
        model = toys.network().train()
        model[4].eval()
        model[0].bias.requires_grad_(False)
        model[3].register_forward_hook(_nothing)
        before = _state_of(model)

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, delay)
        try:
            linearize.compress(
                model, toys.data(), flops=0.6, finetune={"epochs": 1}, search=2, rounds=0, cache=False, progress=False
            )
        except KeyboardInterrupt:
            after = _state_of(model)
            wrong = [name for name in before if before[name] != after[name]]
            raise SystemExit("changed: " + ", ".join(wrong) if wrong else "interrupted") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    last = forked(work, None).strip().splitlines()
    if not last:
        return False, ""
    if last[-1] == ABORTED:  # an interrupt within torch's C++ ends the process: there is no model then
        return True, ABORTED
    return True, "" if last[-1] == "SystemExit: interrupted" else "\n".join(last[-6:])


def _nothing(*_: object) -> None:
    return None


def _state_of(model: nn.Module) -> dict[str, object]:
    """Everything about a model, and about torch, that must be as it was."""
    found: dict[str, object] = {
        "gradients recorded": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "random state": torch.get_rng_state().tolist(),
    }
    for path, module in model.named_modules():
        found[f"{path}: kind"] = type(module)
        found[f"{path}: mode"] = module.training
        found[f"{path}: attributes"] = sorted(vars(module))
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found[f"{path}: hooks"] = [list(map(id, each.values())) for each in hooks]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}: object"] = (id(tensor), type(tensor), tensor.requires_grad, tensor.device, tensor.data_ptr())
        found[f"{name}: gradient"] = None if tensor.grad is None else id(tensor.grad)
    found["values"] = toys.digest(model)
    return found


def warm(folder: Path, names: Sequence[str]) -> None:
    """Import in this process what the jobs import, so that those that are forked from it need not.

    Nothing is computed with gradients here: after that, no process that is forked from this one could.
    """
    found = folder / "modules.json"

    def work() -> None:
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            TARGETS[name].job(folder / name)
        found.write_text(json.dumps(sorted(sys.modules)))

    wrong = forked(work, None)
    if wrong:
        raise RuntimeError(wrong)
    for module in json.loads(found.read_text()):
        with contextlib.suppress(Exception):  # some are no modules that can be imported by that name
            importlib.import_module(module)
    toys.gated()

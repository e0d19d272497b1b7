"""Small chains of blocks for `tests/test_engine.py`; run as a program, runs that are killed at every stage.

The program never computes in its own process: it forks one process after the other, so that what it costs to import
is paid once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from linearize.blockwise import engine, states
from linearize.blockwise.verb import compress_blockwise
from linearize.blockwise.work import Work


class Block(nn.Module):
    """A residual block that is told a scale."""

    def __init__(self, width: int = 8, hidden: int = 48) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        out: Tensor = x + scale * self.down(self.act(self.up(x)))
        return out


class Net(nn.Module):
    """Blocks between an embedding and a head; `between` may change what passes from block to block."""

    def __init__(self, blocks: int = 3, between: Callable[[Tensor, list[Tensor]], Tensor] | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        states = [self.embed(x)]
        scale = states[0].new_full((), 0.5)
        for block in self.blocks:
            states.append(block(states[-1], scale=scale))
            if self.between is not None:
                states[-1] = self.between(states[-1], states)
        out: Tensor = self.head(states[-1])
        return out


def net(blocks: int = 3, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(blocks, **options).eval()


def points(batches: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 4, generator=generator) for _ in range(batches)]


STAGES = ["first states", "block saved", "states half", "note", "written"]


def _kill_at(stage: str) -> None:
    """Let this process be killed at a stage of the run."""

    def dead() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    keep, write, finish, forget = Work.keep, states.write_states, Work.finish, Work.forget

    def kept(self: Work, position: int, small: nn.Module, base: nn.Module) -> nn.Module:
        found = keep(self, position, small, base)
        if stage == "block saved" and position == 1:
            dead()
        return found

    def written(path: Path, like: dict[str, Tensor], values: Any) -> None:
        def half() -> Any:
            for number, pair in enumerate(values):
                if number == 2 and path.name in _HALF.get(stage, ()):
                    dead()
                yield pair

        write(path, like, half())

    def finished(self: Work, position: int, note: Any) -> None:
        finish(self, position, note)
        if stage == "note" and position == 0:
            dead()

    def forgotten(self: Work) -> None:
        if stage == "written" and self.finished():
            dead()
        forget(self)

    Work.keep, Work.finish, Work.forget = kept, finished, forgotten  # type: ignore[method-assign]
    vars(engine)["write_states"] = written


_HALF = {
    "first states": ("states-00000.safetensors",),
    "states half": ("states-00002.safetensors",),
}


def _forked(out: Path, stage: str = "") -> tuple[int, list[str]]:
    """What became of a run in a process of its own: its signal or status, and the lines that it said."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        with os.fdopen(read) as told:
            lines = told.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), lines
    status = 1

    def say(line: str) -> None:
        os.write(write, f"{line}\n".encode())

    try:
        torch.set_num_threads(1)
        _kill_at(stage)
        compress_blockwise(net(2), points(), out, params=0.7, progress=say)
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    folder = Path(sys.argv[1])
    with torch.device("meta"):  # what is imported late is imported here, once; nothing is computed
        linearize.convert(Net(1), torch.zeros(1, 4))
    assert _forked(folder / "whole.safetensors")[0] == 0
    whole = (folder / "whole.safetensors").read_bytes()
    found = {}
    for number, stage in enumerate(STAGES):
        out = folder / f"{number}.safetensors"
        killed, _ = _forked(out, stage)
        before = out.exists()
        status, lines = _forked(out)
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith(f"{number}."))
        found[stage] = [killed, before, status, lines, out.read_bytes() == whole, left]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()

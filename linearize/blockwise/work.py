"""What a run has finished, in a folder: each compressed block, a note of it, and the hidden states behind the last one.

A block is finished once its note is there, which is written last. So a run that is killed loses the block at work, and
nothing before it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from linearize.checkpoint import load, save
from linearize.errors import CheckpointError
from linearize.storage import atomic
from linearize.storage.folders import clear
from linearize.storage.tensorfile import read_tensor

__all__ = ["FinishedBlock", "Work"]

_log = logging.getLogger(__name__)
_FILES = (r"block-\d{5}\.safetensors", r"note-\d{5}\.json", r"states-\d{5}\.safetensors")


@dataclass(frozen=True)
class FinishedBlock:
    """What became of a block.

    Attributes:
        path: of the block in the model.
        plan: what happened to its channels, as `Plan.to_json` writes it.
        before, after: its parameters.
        flops_before, flops_after: for one batch.
        predicted: what its options were expected to lose.
        error: relative squared error of its output, on inputs behind the compressed blocks.
        drift: relative squared distance of the hidden state behind it from that of the original model.
        seconds: that it took.
        notes: further remarks.
    """

    path: str
    plan: str
    before: int
    after: int
    flops_before: int
    flops_after: int
    predicted: float
    error: float
    drift: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """The folder.

    Attributes:
        folder: it exists, and nobody else works there.
        key: what tells model, data and request from others.
    """

    folder: Path
    key: str

    def states(self, position: int) -> Path:
        """The file of the hidden states in front of a block."""
        return self.folder / f"states-{position:05d}.safetensors"

    def block(self, position: int) -> Path:
        """The file of a compressed block."""
        return self.folder / f"block-{position:05d}.safetensors"

    def keep(self, position: int, small: nn.Module, base: nn.Module) -> nn.Module:
        """Store a compressed block, and give it as any later run would read it.

        Args:
            position: of the block in the chain.
            small: the block.
            base: the block as it was, which needs no weights.
        """
        save(small, self.block(position))
        return self.read(position, base)

    def read(self, position: int, base: nn.Module) -> nn.Module:
        """A compressed block, its weights mapped from its file."""
        return load(self.block(position), model=base)

    def tensor(self, position: int, name: str) -> Tensor:
        """One tensor of a compressed block, mapped from its file."""
        return read_tensor(self.block(position), name)

    def finish(self, position: int, note: FinishedBlock) -> None:
        """Note that a block, and the hidden states behind it, are complete."""
        sums = {path.name: atomic.file_checksum(path) for path in (self.block(position), self.states(position + 1))}
        text = json.dumps({"key": self.key, "files": sums, "note": asdict(note)})
        atomic.write_checked(self._note(position), text.encode())
        self.states(position).unlink(missing_ok=True)

    def finished(self) -> list[FinishedBlock]:
        """The notes of the blocks that are finished, from the first on.

        Work of another model, data or request, or with a damaged file, is none.
        """
        found: list[FinishedBlock] = []
        sums: dict[str, str] = {}
        while self._note(len(found)).is_file():
            try:
                told = json.loads(atomic.read_checked(self._note(len(found))))
                note = FinishedBlock(**{**told["note"], "notes": tuple(told["note"]["notes"])})
            except (CheckpointError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s is damaged, the run starts again: %s", self._note(len(found)), error)
                return []
            if told["key"] != self.key:
                _log.warning("what is in %s is of another model, data or request: the run starts anew", self.folder)
                return []
            found.append(note)
            sums |= told["files"]
        last = self.states(len(found)).name
        wanted = {name: value for name, value in sums.items() if name.startswith("block") or name == last}
        for name, value in wanted.items():
            try:
                right = atomic.file_checksum(self.folder / name) == value
            except CheckpointError:
                right = False
            if not right:
                _log.warning("%s is damaged or gone, the run starts again", self.folder / name)
                return []
        return found

    def start(self) -> None:
        """Forget what is there."""
        for path in sorted(self.folder.glob("note-*.json")):  # first what says that others are complete
            path.unlink()
        self.forget()
        self.folder.mkdir(parents=True, exist_ok=True)

    def forget(self) -> None:
        """Remove the files of this run, and the folder if nothing else is in it."""
        clear(self.folder, _FILES)

    def _note(self, position: int) -> Path:
        return self.folder / f"note-{position:05d}.json"

"""The checkpoints of one run in a folder. One is written after each epoch; a resumed run takes the latest sound one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize import checks
from linearize.errors import TrainingError, UsageError
from linearize.storage.folders import make_folder, remove_leftovers
from linearize.storage.lock import alone_in
from linearize.training.schema import flaw_in_checkpoint
from linearize.training.state import EPOCH_FILE, Damaged, checkpoint_path, checkpoints, read_state, write_state

__all__ = ["Kept", "check_folder", "checkpoints_in"]

_log = logging.getLogger(__name__)


class Kept:
    """The checkpoints of a run. Without a folder none are written.

    Args:
        folder: where they are.
        options: of the run: a checkpoint of others is refused.
        keep: how many stay.
    """

    def __init__(self, folder: Path | None, options: Mapping[str, Any], keep: int) -> None:
        self.folder, self.options, self.keep = folder, dict(options), keep

    def restore(self, load: Callable[[Any], None]) -> None:
        """Load the latest sound state. A damaged one is reported in one line, and its epochs are trained again.

        Raises:
            TrainingError: it is of a run with other options, or of another model.
        """
        for path in reversed(checkpoints(self.folder)) if self.folder is not None else ():
            try:
                state = read_state(path)
                if flaw := flaw_in_checkpoint(state):
                    raise Damaged(str(path), f"found {flaw}", "Resume from another.")
                _check_same(path, state["options"], self.options)
                load(state["run"])
            except Damaged as error:
                _log.warning("%s is damaged and left out: %s", path, error.found)
            else:
                return

    def write(self, state: Any, epoch: int) -> None:
        """Write the state after an epoch, and remove the oldest ones beyond `keep`.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_state(checkpoint_path(self.folder, epoch), {"options": self.options, "run": state})
        for old in checkpoints(self.folder)[: -self.keep]:
            old.unlink(missing_ok=True)


@contextmanager
def checkpoints_in(
    folder: str | os.PathLike[str] | None, options: Mapping[str, Any], *, keep: int, resume: bool, main: bool
) -> Iterator[Kept]:
    """The checkpoints in a folder. It is made before any training, and locked for this run.

    Args:
        folder: None keeps none.
        options: of the run.
        keep: how many stay.
        resume: whether there may be some already.
        main: whether this is the process, of several that train together, that writes.

    Raises:
        UsageError: there are some already, or another process is at work there.
        CheckpointError: no file can be written there.
    """
    place = check_folder(folder, resume=resume)
    if place is None or not main:
        yield Kept(place, options, keep)
        return
    make_folder(place)
    with alone_in(place, "checkpoint_dir"):
        remove_leftovers(place, EPOCH_FILE)
        yield Kept(place, options, keep)


def check_folder(folder: Any, *, resume: bool) -> Path | None:
    """Check the folder of a run's checkpoints. It may contain some only if the run is resumed.

    Raises:
        UsageError: it is no folder; there are some, or there is none to be resumed from.
    """
    if folder is None:
        if resume:
            raise UsageError("finetune", "found resume=True without checkpoint_dir", "Pass the folder.")
        return None
    place = checks.folder("checkpoint_dir", folder)
    found = checkpoints(place)
    if found and not resume:
        remedy = "Pass resume=True to continue that run, or another folder."
        raise UsageError(str(place), f"found checkpoints of an earlier run, {found[-1].name} the last", remedy)
    return place


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            found = f"found {name}={before.get(name)} in the checkpoint, but {value} in this call"
            raise TrainingError(str(path), found, "Resume with the options of that run, or begin in a new folder.")

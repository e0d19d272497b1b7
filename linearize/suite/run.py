"""Run a suite: each cell that has no result yet is measured, and its line written, before the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from linearize.errors import CheckpointError, UsageError
from linearize.running.devices import check_whole
from linearize.storage.folders import make_folder
from linearize.storage.lock import alone_in
from linearize.suite.cell import Bench
from linearize.suite.devices import Device, device_for
from linearize.suite.inputs import Inputting
from linearize.suite.matrix import Cell, Suite
from linearize.suite.results import append, begin
from linearize.suite.schema import FORMAT
from linearize.suite.ways import check_ways

__all__ = ["run_suite"]


def run_suite(
    models: Mapping[str, nn.Module],
    suite: Suite,
    folder: Path,
    *,
    inputs: Inputting,
    about: Mapping[str, Any] | None = None,
    device: Device | None = None,
    retry: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure models in every cell of a suite, and give all results of the folder.

    A suite that was interrupted goes on. A model that does not run in a cell is left out of it, with the reason.

    Args:
        models: by name, the original first. They are copied, not changed.
        suite: what to measure.
        folder: for the results; new, or of the same suite.
        inputs: makes a batch.
        about: what else tells the models from others, such as checksums; a folder is bound to it.
        device: where; None takes that of the suite.
        retry: measure cells again in which a model was left out.
        say: told what is going on.

    Raises:
        UsageError: something that the suite asks for is not here, or the folder belongs to another suite.

    Examples:
        >>> import tempfile, torch
        >>> models = {"original": nn.Linear(8, 8), "small": nn.Identity()}
        >>> suite = Suite(rounds=2, warmup_seconds=0, energy_seconds=0, device="cpu")
        >>> with tempfile.TemporaryDirectory() as name:
        ...     (record,) = run_suite(models, suite, Path(name) / "out", inputs=lambda n, _: torch.zeros(n, 8))
        >>> record["models"]["small"]["ratio"]["median"] > 0
        True
    """
    device = device_for(suite.device) if device is None else device
    check_ways(suite.ways, device.place)
    for model in models.values():
        check_whole(model, values=True)
    facts = device.facts()
    own = {name: {"class": type(m).__name__, "parameters": _size(m)} for name, m in models.items()}
    identity = {"format": FORMAT, "suite": suite.to_dict(), "models": own, "about": dict(about or {})}
    identity |= {"device": str(facts.get("device"))}
    _made(folder)
    with alone_in(folder, "--out"):
        known = begin(folder, identity)
        done = {_key(record) for record in known if not (retry and _left_out(record))}
        cells = suite.cells()
        bench = Bench(models, suite, device, inputs)
        for place, cell in enumerate(cells, 1):
            if cell.key in done:
                continue
            say(f"[{place}/{len(cells)}] {cell}")
            record = {**bench.measure(cell), "time": datetime.now(UTC).isoformat(timespec="seconds")}
            append(folder, record)
            known = [other for other in known if _key(other) != cell.key] + [record]
    return known


def _made(folder: Path) -> None:
    if folder.is_dir():
        return
    try:
        make_folder(folder)
    except CheckpointError as error:
        raise UsageError("--out", f"{folder}: {error.found}", error.remedy) from error


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _key(record: Mapping[str, Any]) -> str:
    return Cell(**record["cell"]).key


def _left_out(record: Mapping[str, Any]) -> bool:
    return any("left_out" in result for result in record["models"].values())

"""One cell of a suite: copies of the models are brought there, measured in turns, and what came of it is told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from linearize.errors import LinearizeError
from linearize.report.timing import quartiles
from linearize.running.models import evaluating
from linearize.suite import generating
from linearize.suite.devices import Device
from linearize.suite.inputs import Inputting, batch_of
from linearize.suite.matrix import DTYPES, Cell, Suite
from linearize.suite.measure import CellCalls, Measured, energy, in_turns
from linearize.suite.schema import FORMAT
from linearize.suite.ways import LeftOut, runner

__all__ = ["Bench"]

_FORWARD = "forward"
_COUNTED = ("eager", "compile")  # ways whose memory torch's allocator sees in a call


class Bench:
    """Copies of the models on the device, in the type of the cell at hand."""

    def __init__(self, models: Mapping[str, nn.Module], suite: Suite, device: Device, inputs: Inputting) -> None:
        self.models, self.suite, self.device, self.inputs = models, suite, device, inputs
        self.dtype = ""
        self.placed: dict[str, nn.Module] = {}

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell."""
        left: dict[str, str] = {}
        found, results = Measured(), dict[str, dict[str, Any]]()
        try:
            placed = self._placed(cell.dtype)
            with _threads(cell.threads), evaluating(*placed.values()), self._on_device():
                calls = self._calls(cell, left)
                threads = torch.get_num_threads()
                if calls:
                    found = in_turns(calls, self.device, self.suite)
                    results = self._results(cell, calls, found)
        except Exception as error:  # whatever a kernel, a runtime or a model raises in the midst: the suite goes on
            results, threads = {}, torch.get_num_threads()
            left = dict.fromkeys(self.models, _told(error)) | left
        finally:
            if cell.way == "compile":
                torch.compiler.reset()
            self.device.tidy()
        told = {name: results.get(name) or {"left_out": left.get(name, "it was not measured")} for name in self.models}
        record = {"format": FORMAT, "cell": asdict(cell), "models": told, "steady": found.steady}
        record |= {"warmup": found.warmup, "rounds": self.suite.rounds, "watched": found.watched()}
        return {**record, "environment": {**self.device.facts(), "threads": threads}}

    def _placed(self, dtype: str) -> dict[str, nn.Module]:
        if self.dtype != dtype:
            self.placed, self.dtype = {}, ""
            self.device.tidy()
            self.placed = {
                name: copy.deepcopy(model).to(device=self.device.place, dtype=DTYPES[dtype])
                for name, model in self.models.items()
            }
            self.dtype = dtype
        return self.placed

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if self.device.place.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device.place):
            yield

    def _calls(self, cell: Cell, left: dict[str, str]) -> CellCalls:
        """The calls of each model that runs in this cell."""
        found: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, model in self.placed.items():
            try:
                batch = batch_of(cell, self.inputs, self.device.place)
                if cell.work == _FORWARD:
                    parts = {_FORWARD: runner(cell.way, model, batch)}
                elif cell.way == "eager":
                    parts = generating.calls(model, batch, cell.new_tokens)
                else:
                    raise LeftOut("text is generated in the eager way only")
                for run in parts.values():
                    self.device.seconds(run, 1)
            except Exception as error:  # as above: another model may run
                left[name] = _told(error)
                self.device.tidy()
                continue
            found |= {(name, part): run for part, run in parts.items()}
        return found

    def _results(self, cell: Cell, calls: CellCalls, found: Measured) -> dict[str, dict[str, Any]]:
        main = _FORWARD if cell.work == _FORWARD else generating.ALL
        first = next(iter(self.models))
        results = {}
        for name in dict.fromkeys(name for name, _ in calls):
            seconds = found.samples[name, main]
            others = name != first
            run, median = calls[name, main], quartiles(seconds)[1]
            results[name] = {
                "seconds": _spread(seconds),
                "ratio": _ratio(seconds, found.samples.get((first, main)) if others else None),
                "per_second": cell.batch * max(1, cell.new_tokens) / median if median > 0 else None,
                "peak_bytes": self._peak(name, run) if cell.way in _COUNTED else None,
                "joules": energy(run, median, self.device, self.suite.energy_seconds),
                "samples": seconds,
            }
            if cell.work != _FORWARD:
                begun = found.samples[name, generating.FIRST]
                results[name] |= {
                    "first_token": _spread(begun),
                    "first_token_ratio": _ratio(
                        begun, found.samples.get((first, generating.FIRST)) if name != first else None
                    ),
                    "tokens_per_second": _speed(cell, begun, seconds),
                }
        return results

    def _peak(self, name: str, run: Callable[[], Any]) -> int | None:
        """Bytes of the weights, and of what a call takes besides."""
        model = self.placed[name]
        tensors = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*model.parameters(), *model.buffers())
        }
        taken = self.device.peak(run)
        return None if taken is None else sum(tensors.values()) + taken


def _spread(values: list[float]) -> dict[str, float]:
    q1, median, q3 = quartiles(values)
    return {"median": median, "q1": q1, "q3": q3}


def _ratio(values: list[float], reference: list[float] | None) -> dict[str, float] | None:
    """Round by round, of what took any time."""
    pairs = [(a, b) for a, b in zip(values, reference or [], strict=False) if b > 0]
    return _spread([a / b for a, b in pairs]) if pairs else None


def _speed(cell: Cell, first: list[float], whole: list[float]) -> float | None:
    """Tokens per second after the first one; None where noise hides it."""
    rest = quartiles([b - a for a, b in zip(first, whole, strict=True)])[1]
    return cell.batch * (cell.new_tokens - 1) / rest if rest > 0 else None


def _told(error: Exception) -> str:
    """One line of an error."""
    if isinstance(error, LeftOut | LinearizeError):
        return str(error)
    line = next((text.strip() for text in str(error).splitlines() if text.strip()), "no message")
    return f"{type(error).__name__}: {line[:300]}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)

"""One training run: a step, an epoch, and the state from which another process can continue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import DataError, LinearizeError, TrainingError
from linearize.gating.gate import gates
from linearize.running.batches import Batch, read_batch, to_device
from linearize.running.models import hold_norms
from linearize.running.order import generators_of, set_epoch
from linearize.running.outputs import OutputMeaning
from linearize.running.randomness import random_state, set_random_state
from linearize.training.accelerators import mean_over_processes
from linearize.training.objective import WHOLE_BATCH, BatchPart, Objective
from linearize.training.schema import fits_optimizer, flaw_in_run
from linearize.training.state import Damaged

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainingRun"]


@dataclass
class TrainingRun:
    """A model in training. `step` counts optimizer steps of the whole run, including those before it was resumed."""

    model: nn.Module
    wrapped: nn.Module  # the model, or what spreads it over several devices
    optimizer: Any
    accelerator: Accelerator
    objective: Objective
    total: int
    warmup: int
    clip: float | None
    meaning: OutputMeaning | None = None
    accumulate: int = 1  # batches of one step
    keep_norms: bool = False
    on_step: Callable[[dict[str, float]], None] | None = None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = self.optimizer.param_groups
        self._rates = [float(group["lr"]) for group in groups]
        self._clipped = [p for group in groups if group["name"] != "gates" for p in group["params"]]

    def epoch(self, data: Iterable[Any], length: int, advance: Callable[[str], None]) -> dict[str, float]:
        """Train on `length` batches and return the means of the loss and of its terms, over all processes.

        Raises:
            DataError: there are fewer batches.
            TrainingError: see `update`.
        """
        number, start = len(self.history), time.perf_counter()
        set_epoch(data, number)
        self.model.train()
        if self.keep_norms:
            hold_norms(self.model)
        sums: dict[str, float] = {"loss": 0.0}
        together: dict[str, float] = {}
        count = 0
        for raw in islice(data, length):
            batch = read_batch(self.model, raw, self.meaning)
            place = count % self.accumulate
            part = BatchPart(place, min(self.accumulate, length - count + place))
            terms = self.update(to_device(batch, self.accelerator.device), count, part)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
                together[name] = together.get(name, 0.0) + value / part.of
            count += 1
            if part.last:
                self._tell(together)
                together = {}
            advance(f"epoch {number + 1}, loss {terms['loss']:.4f}")
        if count < length:
            remedy = "Pass data that can be iterated once per epoch, such as a DataLoader or a list."
            raise DataError("data", f"found {count} batches in epoch {number + 1} instead of {length}", remedy)
        means = mean_over_processes(self.accelerator, {name: value / count for name, value in sums.items()})
        return {"epoch": float(number + 1)} | means | {"lr": self._rate(), "seconds": time.perf_counter() - start}

    def update(self, batch: Batch, index: int = 0, part: BatchPart = WHOLE_BATCH) -> dict[str, float]:
        """The gradients of one batch, and one step of the optimizer if it is the last of its step.

        Raises:
            TrainingError: the loss is not a scalar, not finite, or depends on nothing that is trained. The weights
                are then those of the step before.
        """
        if not part.place:
            self.model.zero_grad()
        with nullcontext() if part.last else self.accelerator.no_sync(self.wrapped):
            with self.accelerator.autocast():
                terms = self.objective(batch.checked(self.wrapped, index), batch, part)
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            names = ["loss", *terms]
            values = dict(zip(names, torch.stack([loss.detach(), *map(_plain, terms.values())]).tolist(), strict=True))
            self._check(loss, values)
            # accelerate divides by its own number of batches, also where fewer are left at the end of an epoch.
            share = self.accelerator.gradient_accumulation_steps / part.of
            self.accelerator.backward(loss if share == 1 else share * loss)
        if part.last:
            self._take_step()
        return values

    def _take_step(self) -> None:
        self.accelerator.gradient_state._set_sync_gradients(sync_gradients=True)  # else accelerate's optimizer waits
        if self.clip is not None:
            norm = self.accelerator.clip_grad_norm_(self._clipped, self.clip)
            if self.accelerator.scaler is None and not math.isfinite(float(norm)):
                raise self._error("found gradients that are not finite")
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._pace(self.step)
        self.optimizer.step()
        if self.objective.prior is not None:
            self.objective.prior.step()
        self.step += 1

    def _tell(self, terms: dict[str, float]) -> None:
        """Tell of a step that was taken."""
        if self.on_step is not None:
            self.on_step({"step": float(self.step)} | terms | {"lr": self._rate(), "share": self.share})

    def _rate(self) -> float:
        """The rate of the last step."""
        return self._rates[0] * self._pace(self.step - 1)

    def _pace(self, step: int) -> float:
        """Factor on the learning rates: a straight rise, then half a cosine down to 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.total - self.warmup))) / 2

    def _check(self, loss: Tensor, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if name != "loss" and not math.isfinite(value)]
        if bad:
            raise self._error(f"found a {bad[0]} loss of {values[bad[0]]}")
        if not loss.requires_grad:
            raise self._error("found a loss that depends on no trainable parameter")

    def _error(self, found: str) -> TrainingError:
        remedy = "Check the data and the loss, or lower the learning rate; the weights are those before this step."
        return TrainingError(f"finetune, step {self.step + 1}", found, remedy)

    def state_dict(self, data: Any) -> dict[str, Any]:
        """Everything that the next step depends on, as plain values and tensors."""
        prior, scaler = self.objective.prior, self.accelerator.scaler
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "prior": prior.state_dict() if prior is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": random_state(),
            "generators": [generator.get_state() for generator in generators_of(data)],
            "step": self.step,
            "history": self.history,
        }

    def load_state_dict(self, state: Any, data: Any) -> None:
        """Continue from the result of `state_dict`. After an error the run is unchanged.

        Raises:
            Damaged: it is no state of a run.
            TrainingError: the state is of another model, optimizer, prior or data.
        """
        if flaw := flaw_in_run(state):
            raise Damaged("checkpoint", f"found {flaw}", "Resume from another.")
        generators = generators_of(data)
        if len(generators) != len(state["generators"]):
            found = f"found data with {len(generators)} random generators, not {len(state['generators'])}"
            raise TrainingError("finetune", found, "Resume with the data of that run.")
        try:
            for generator, saved in zip(generators, state["generators"], strict=True):
                torch.Generator(generator.device).set_state(saved)
        except (RuntimeError, TypeError) as error:
            raise Damaged("checkpoint", "found random states that are none", "Resume from another.") from error
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        fresh, prior = self.optimizer.state_dict(), self.objective.prior
        schedule = None if prior is None else prior.state_dict()
        try:
            self._load_model(state)
            self._load_rest(state)
        except BaseException:
            if prior is not None and schedule is not None:
                prior.load_state_dict(schedule)
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(fresh)
            raise
        for generator, saved in zip(generators, state["generators"], strict=True):
            generator.set_state(saved)
        self.step, self.history = state["step"], state["history"]
        set_random_state(state["random"])

    def _load_model(self, state: dict[str, Any]) -> None:
        own, stored = self.optimizer.state_dict(), state["optimizer"]
        try:
            if gone := self.model.state_dict().keys() - state["model"].keys():  # torch forgives a norm's counter
                raise ValueError(f"without {min(gone)}")
            odd = [name for name, value in self.model.state_dict().items() if state["model"][name].dtype != value.dtype]
            if odd:  # torch would turn them into numbers of the model's type, without a word
                raise ValueError(f"{odd[0]} of type {state['model'][odd[0]].dtype}")
            self.model.load_state_dict(state["model"])
            sizes = [[len(group["params"]) for group in each["param_groups"]] for each in (own, stored)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"groups of {sizes[1]} parameters instead of {sizes[0]}")
            # Rates and the like are those of this call, which are the checkpoint's: see the options beside it.
            self.optimizer.load_state_dict({"state": stored["state"], "param_groups": own["param_groups"]})
        except (RuntimeError, ValueError) as error:
            found = f"found a checkpoint of another model or optimizer ({str(error).splitlines()[0]})"
            raise TrainingError("finetune", found, "Resume with the model of that run.") from error
        if not fits_optimizer(self.optimizer):
            raise Damaged("checkpoint", "found an optimizer's state of other shapes", "Resume from another.")

    def _load_rest(self, state: dict[str, Any]) -> None:
        try:
            if self.objective.prior is not None:
                self.objective.prior.load_state_dict(state["prior"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, LinearizeError):
                raise
            found = f"found no state of this prior ({type(error).__name__}: {error})"
            raise Damaged("checkpoint", found, "Resume from another.") from error

    @property
    def share(self) -> float:
        """Share of the model's channels that are linear now; 0 without gates."""
        linear = [gate.linear for gate in gates(self.model).values()]
        return sum(float(mask.sum()) for mask in linear) / max(1, sum(len(mask) for mask in linear))


def _plain(term: Tensor) -> Tensor:
    return term.detach().float()

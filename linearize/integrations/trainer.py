"""The Trainer of transformers, as it is: a callback that carries a prior, and groups in which gates do not decay.

prior = linearize.SparsityPrior(model, kind="target", target=0.6, steps=steps)
trainer = Trainer(
model, args, train_dataset=data,
callbacks=[PriorCallback(prior)], optimizer_cls_and_kwargs=gated_optimizer(args, model),
)
trainer.train()
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linearize import checks
from linearize.errors import TrainingError, UsageError
from linearize.integrations.attach import Attached, alphas_of, attach, check_state
from linearize.integrations.groups import gates_apart
from linearize.training.priors import SparsityPrior
from linearize.training.state import read_state, write_state

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise UsageError("linearize.integrations", "found no transformers", "Run: pip install transformers") from error

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["TRAINER_FILE", "PriorCallback", "gated_optimizer", "gated_optimizer_groups"]

TRAINER_FILE = "prior.safetensors"
"""Name of the prior's state in a checkpoint folder of the Trainer: tensors and JSON, no pickle."""


class PriorCallback(TrainerCallback):  # type: ignore[misc] # mypy does not follow transformers
    """A prior in the Trainer: its penalty in the gradients, its steps, its checkpoints and its logs.

    The gradient of the penalty is added right before each step of the optimizer (see `attach`): once for all batches
    that were accumulated, whatever the model and the Trainer divide a loss by, on every process the same. The loss that
    the Trainer logs is therefore the task's alone; `prior` and `prior_share` stand beside it in each record.

    Args:
        prior: for the model that the Trainer has, or for one inside it.
        resume_from: the checkpoint folder that `train(resume_from_checkpoint=...)` is given, if it lies elsewhere than
            in `args.output_dir`.

    Examples:
        >>> import linearize
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prior = SparsityPrior(linearize.convert(net, torch.randn(2, 4)), kind="target", target=0.5, steps=100)
        >>> PriorCallback(prior).prior.share
        0.0
    """

    def __init__(self, prior: SparsityPrior, *, resume_from: str | os.PathLike[str] | None = None) -> None:
        if not (callable(prior) and hasattr(prior, "gates") and hasattr(prior, "step")):
            checks.refuse("prior", prior, "a linearize.SparsityPrior")
        self.prior = prior
        self.resume_from = None if resume_from is None else checks.folder("resume_from", resume_from)
        self._attached: Attached | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        """Attach the prior to the optimizer; after a resumption, take its state from the checkpoint.

        Raises:
            UsageError: the prior is on gates of another model.
            TrainingError: a run is resumed, and its checkpoint has no state of the prior, or one for other alphas.
        """
        if not {id(gate) for gate in self.prior.gates} <= {id(module) for module in now["model"].modules()}:
            raise UsageError("PriorCallback", "found a prior on gates of another model", "Make it for this model.")
        if state.global_step:
            self._restore(args, state.global_step)
        self.on_train_end(args, state, control)
        self._attached = attach(self.prior, now["optimizer"], step=False, state=False)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        """One step of the prior."""
        self.prior.step()

    def on_save(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        """Write the prior's state into the checkpoint.

        Warns:
            UserWarning: the checkpoint is in another folder, as those of a search for hyperparameters are.
        """
        if args.should_save and not _folder(args, state.global_step).is_dir():
            text = f"found no folder {_folder(args, state.global_step)}: the prior's state is not saved."
            warnings.warn(text, stacklevel=2)
        elif args.should_save:
            told = {"step": state.global_step, "alphas": alphas_of(self.prior), "prior": self.prior.state_dict()}
            write_state(_folder(args, state.global_step) / TRAINER_FILE, told)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **now: Any) -> None:
        """Add the share of linear channels and the penalty to what is logged of training."""
        if logs is not None and "loss" in logs:
            with torch.no_grad():
                more = {"prior": float(self.prior()), "prior_share": self.prior.share}
            logs.update(more)
            if state.log_history:
                state.log_history[-1].update(more)  # which was copied before callbacks are asked

    def on_train_end(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        """Take the prior off."""
        if self._attached is not None:
            self._attached.remove()
        self._attached = None

    def _restore(self, args: Any, step: int) -> None:
        path = (self.resume_from or _folder(args, step)) / TRAINER_FILE
        if not path.is_file():
            found = f"found no such file, although training goes on from step {step}"
            remedy = "Pass PriorCallback(prior, resume_from=) the checkpoint's folder, if it is another."
            raise TrainingError(str(path), found, remedy)
        told = read_state(path)
        if told["step"] != step:
            found = f"found the state of step {told['step']}, not {step}"
            raise TrainingError(str(path), found, "Pass PriorCallback(prior, resume_from=) the checkpoint's folder.")
        check_state(self.prior, told["alphas"], str(path))
        self.prior.load_state_dict(told["prior"])


def gated_optimizer_groups(args: TrainingArguments, model: nn.Module, *, gate_lr: float = 1e-2) -> list[dict[str, Any]]:
    """The groups that the Trainer itself would make, with the gates in one of their own: no decay, their own rate.

    Args:
        args: of the Trainer: its `learning_rate` and `weight_decay`.
        model: with gates.
        gate_lr: learning rate of the gates; the Trainer's scheduler scales it like the others.

    Raises:
        UsageError: the model has no gates that are trained.

    Examples:
        >>> import linearize
        >>> from transformers import TrainingArguments
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = linearize.convert(net, torch.randn(2, 4))
        >>> args = TrainingArguments("unused", weight_decay=0.1, learning_rate=2e-4)
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in gated_optimizer_groups(args, net)]
        [(2, 0.0002, 0.1), (2, 0.0002, 0.0), (1, 0.01, 0.0)]
    """
    checks.module("model", model)
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    sides = (
        ([p for name, p in named if name in decaying], args.weight_decay),
        ([p for name, p in named if name not in decaying], 0.0),
    )
    groups = [{"params": side, "lr": args.learning_rate, "weight_decay": decay} for side, decay in sides]
    made: list[dict[str, Any]] = gates_apart(groups, model, gate_lr=gate_lr)
    return made


def gated_optimizer(args: TrainingArguments, model: nn.Module, *, gate_lr: float = 1e-2) -> tuple[type, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: the optimizer that `args` names, on `gated_optimizer_groups`.

    Args:
        args: of the Trainer.
        model: with gates.
        gate_lr: learning rate of the gates.

    Raises:
        UsageError: the model has no gates that are trained; `args.optim` makes groups of its own (GaLore and its kin).
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    own = sorted(set(options) & {"params", "model", "optimizer_dict"})
    if own:
        found = f"found optim={args.optim!r}, which makes groups of its own"
        raise UsageError("gated_optimizer", found, "Choose an optimizer such as adamw_torch.")
    return kind, {**options, "params": gated_optimizer_groups(args, model, gate_lr=gate_lr)}


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"

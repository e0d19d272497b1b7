"""Lightning: a callback that carries a prior through `fit`, and through checkpoints.

trainer = lightning.Trainer(callbacks=[LightningPrior(prior)])
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from linearize import checks
from linearize.errors import UsageError
from linearize.integrations.attach import Attached, attach
from linearize.training.priors import SparsityPrior

__all__ = ["LightningPrior"]


def _base() -> type:
    """Lightning's Callback, from whichever of its two packages is in use; `object` if there is neither."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    for package in sorted(packages, key=lambda name: name not in sys.modules):
        try:
            found: type = importlib.import_module(package).Callback
        except ImportError:
            continue
        return found
    return object


_BASE: Any = _base()


class LightningPrior(_BASE):  # type: ignore[misc] # of a package that may not be there
    """A prior in Lightning's Trainer: its penalty in the gradients, its steps, its checkpoints and its logs.

    The gradient of the penalty is added right before each step of the optimizer, and `prior.step()` follows it (see
    `attach`), so that `training_step` stays as it is and accumulated batches count the prior once. The state is in the
    checkpoint among those of the callbacks. `prior_share` is logged.

    Args:
        prior: for a model inside the LightningModule.

    Raises:
        UsageError: Lightning is not installed.
    """

    def __init__(self, prior: SparsityPrior) -> None:
        if _BASE is object:
            raise UsageError("LightningPrior", "found no lightning", "Run: pip install lightning")
        if not (callable(prior) and hasattr(prior, "gates") and hasattr(prior, "step")):
            checks.refuse("prior", prior, "a linearize.SparsityPrior")
        super().__init__()
        self.prior = prior
        self._attached: Attached | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the prior to the optimizer that has the gates.

        Raises:
            UsageError: no optimizer has them.
        """
        alphas = {id(gate.alpha) for gate in self.prior.gates}
        for optimizer in trainer.optimizers:
            if any(id(p) in alphas for group in optimizer.param_groups for p in group["params"]):
                self._remove()
                self._attached = attach(self.prior, optimizer, state=False)
                return
        remedy = "Give configure_optimizers the groups of linearize.param_groups(model)."
        raise UsageError("LightningPrior", "found no optimizer with the gates of this prior", remedy)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the share of linear channels."""
        if (trainer.global_step + 1) % max(1, trainer.log_every_n_steps) == 0:
            pl_module.log("prior_share", self.prior.share)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the prior off."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the prior off."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return self.prior.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.prior.load_state_dict(state_dict)

    def _remove(self) -> None:
        if self._attached is not None:
            self._attached.remove()
        self._attached = None

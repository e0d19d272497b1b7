"""A prior that hangs on an optimizer: whoever runs the loop, every step of the optimizer is one of the prior.

The penalty depends on the alphas alone. Its gradient is therefore the same on every process and for every part of a
batch, and can be added to theirs right before the optimizer's step: once, however many batches were accumulated, and
after the gradients of all processes were averaged, unscaled and clipped. Nothing has to be known about the loop.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from linearize import checks
from linearize.errors import TrainingError, UsageError
from linearize.gating.sharded import unsharded
from linearize.training.priors import SparsityPrior
from linearize.training.told import tell_of_optimizer

__all__ = ["KEY", "Attached", "attach", "plain_optimizer"]

KEY = "linearize_prior"
"""Under this name a prior's state is in the state of the optimizer that it is attached to."""


class Attached:
    """A prior on an optimizer, until `remove`. It is made by `attach`.

    Attributes:
        prior, optimizer: the two; the optimizer without the wrappers that it was passed in.
    """

    def __init__(self, prior: SparsityPrior, optimizer: torch.optim.Optimizer) -> None:
        self.prior, self.optimizer = prior, optimizer
        self.handles: list[Any] = []

    def remove(self) -> None:
        """Take the prior off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def add_penalty(self, *_: Any) -> None:
        """Add the gradient of the penalty to the alphas', in the scale that theirs have."""
        alphas = [gate.alpha for gate in self.prior.gates if gate.alpha.requires_grad]
        with torch.enable_grad():
            penalty = self.prior()
            if not penalty.requires_grad or not alphas:
                return
            found = torch.autograd.grad(penalty, alphas, allow_unused=True)
        # A fused optimizer under a GradScaler takes the scale out itself, within its step.
        scale = getattr(self.optimizer, "grad_scale", None)
        for alpha, gradient in zip(alphas, found, strict=True):
            if gradient is not None:
                _add(alpha, gradient if scale is None else gradient * scale)

    def _step(self, *_: Any) -> None:
        self.prior.step()

    def _write(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        state[KEY] = self.prior.state_dict()
        return state

    def _read(self, _: Any, state: dict[str, Any]) -> None:
        if KEY in state:
            self.prior.load_state_dict(state[KEY])
        elif state.get("state"):
            text = (
                "this optimizer's state was saved without a prior's: the prior begins anew, at step "
                f"{self.prior.steps_taken}. Load the prior's own state, if it was saved elsewhere."
            )
            warnings.warn(text, stacklevel=2)


def attach(
    prior: SparsityPrior, optimizer: Any, *, penalty: bool = True, step: bool = True, state: bool = True
) -> Attached:
    """Let an optimizer carry a prior: its penalty, its steps and its state, in a loop that knows nothing of it.

    Args:
        prior: for the model that the optimizer trains.
        optimizer: of torch, or one that wraps it in an attribute `optimizer`, as accelerate's does. If gradients are
            accumulated, it must be one that really steps once for all of them.
        penalty: add the gradient of `prior()` to that of the alphas before each step. Leave `prior()` out of the loss.
        step: call `prior.step()` after each step. A step that a GradScaler leaves out is none.
        state: put the prior's state into `optimizer.state_dict()`, and take it from there on loading: whatever saves
            the optimizer then saves the prior.

    Returns:
        A handle; its `remove` takes the prior off again.

    Raises:
        UsageError: it is no optimizer of torch, it has a prior already, or an alpha is a shard.

    Warns:
        UserWarning: an alpha decays, is moved at a rate of its layer's depth, or is not in the optimizer.

    Examples:
        >>> from torch import nn
        >>> import linearize
        >>> net = linearize.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
        >>> prior = SparsityPrior(net, kind="target", target=0.5, steps=3)
        >>> optimizer = torch.optim.AdamW(linearize.param_groups(net))
        >>> _ = attach(prior, optimizer)
        >>> for _ in range(3):
        ...     net(torch.randn(16, 4)).square().sum().backward()
        ...     optimizer.step()  # and nothing else
        >>> prior.share
        0.5
    """
    for name, flag in (("penalty", penalty), ("step", step), ("state", state)):
        checks.boolean(name, flag)
    if not (callable(prior) and hasattr(prior, "gates") and hasattr(prior, "step")):
        checks.refuse("prior", prior, "a linearize.SparsityPrior")
    plain = plain_optimizer(optimizer)
    made = Attached(prior, plain)
    if any(isinstance(getattr(hook, "__self__", None), Attached) for hook in _hooks(plain)):
        raise UsageError("attach", "found a prior on this optimizer", "Call remove() of the first one's handle.")
    tell_of_optimizer(prior.gates, plain)
    if penalty:
        made.handles.append(plain.register_step_pre_hook(made.add_penalty))
    if step:
        made.handles.append(plain.register_step_post_hook(made._step))
    if state:
        made.handles.append(plain.register_state_dict_post_hook(made._write))
        made.handles.append(plain.register_load_state_dict_pre_hook(made._read))
    return made


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside wrappers.

    Raises:
        UsageError: there is none.
    """
    found = optimizer
    while not hasattr(found, "_optimizer_step_post_hooks") and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, torch.optim.Optimizer) or not hasattr(found, "_optimizer_step_post_hooks"):
        checks.refuse("optimizer", optimizer, "a torch.optim.Optimizer, or a wrapper with one as `optimizer`")
    return found


def check_state(prior: SparsityPrior, alphas: Tensor, where: str) -> None:
    """See that a prior's state was taken beside the alphas that the model has now.

    Raises:
        TrainingError: the model's are others.
    """
    own = alphas_of(prior)
    if own.shape != alphas.shape or not torch.equal(own, alphas.to(own)):
        found = "found the state of a prior for other alphas than the model has now"
        raise TrainingError(where, found, "Resume model and prior from the same checkpoint.")


def alphas_of(prior: SparsityPrior) -> Tensor:
    """All alphas of a prior's gates in a row, on the CPU."""
    return torch.cat([unsharded(gate.alpha.detach()).float().cpu() for gate in prior.gates])


def _add(alpha: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        if alpha.grad is None:
            alpha.grad = gradient.to(alpha)
        else:
            alpha.grad.add_(gradient.to(alpha.grad))


def _hooks(optimizer: Any) -> list[Any]:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_post_hooks")
    return [hook for name in names for hook in getattr(optimizer, name, {}).values()]

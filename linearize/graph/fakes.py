"""Run a model any number of times on fake tensors. Nothing is computed or changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from linearize.graph.capture import Inputs
from linearize.graph.protect import untouched
from linearize.graph.state import muted
from linearize.nest import copied

__all__ = ["FakeRun", "fake_runs"]

FakeRun = Callable[..., Any]


@contextmanager
def fake_runs(model: nn.Module, inputs: Inputs, *, real: bool = False, on_cpu: bool = False) -> Iterator[FakeRun]:
    """Inside, a function that runs the model once. What one run leaves on the model, the next one finds there.

    Afterwards the model is as it was. The function takes `training` and `gradients` (both False), `twice` for a batch
    twice as large, and `around`, a context for the forward alone; it returns what the forward returned.

    Args:
        model: any model; no memory is taken for it.
        inputs: arguments of its forward, on any device: they are moved to the model's.
        real: compute, with the values that there are, because the model's control flow depends on them.
        on_cpu: as if everything were on the CPU.

    Examples:
        >>> with fake_runs(nn.Linear(2, 3), ((torch.ones(4, 2),), {})) as run:
        ...     run().shape, run(twice=True).shape
        (torch.Size([4, 3]), torch.Size([8, 3]))
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Faked once and for all: an op that is given a real tensor is slow.
    tensors = [*model.named_parameters(), *model.named_buffers()] if not real else []
    fake: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in tensors}
    if on_cpu:
        device = torch.device("cpu")
        with mode:
            fake = {
                name: torch.empty_like(tensor, device=device).requires_grad_(tensor.requires_grad)
                for name, tensor in fake.items()
            }
    modules = list(model.modules())

    def run(
        *,
        training: bool = False,
        gradients: bool = False,
        twice: bool = False,
        around: AbstractContextManager[Any] | None = None,
    ) -> Any:
        for module in modules:
            module.training = training
        with unset_fake_temporarily():  # in whose mode no object with real tensors in it can be copied
            args, kwargs = copied(inputs)  # of its own: a run may write into it, or fill a cache
        if not real:
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device=device), (args, kwargs))
        if twice:
            args, kwargs = _twice((args, kwargs))
        with torch.set_grad_enabled(gradients), around or nullcontext():
            return model(*args, **kwargs) if real else torch.func.functional_call(model, fake, args, kwargs)

    with untouched(model), muted("torch._subclasses.fake_tensor"), nullcontext() if real else mode:
        yield run


def _twice(inputs: Inputs) -> Inputs:
    """A batch after itself: all tensors that have its size first."""
    sizes = [t.shape[0] for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]

    def doubled(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor)) if tensor.dim() and tensor.shape[0] == sizes[0] else tensor

    made: Inputs = pytree.tree_map_only(Tensor, doubled, inputs)
    return made

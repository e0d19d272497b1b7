"""The Jacobian of a model's outputs with respect to its parameters, in float64, whole or piece by piece.

Shape letters: N samples, O outputs of a sample, R = N * O rows, P parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils import _pytree as pytree

from linearize import checks
from linearize.convert import eager_model
from linearize.errors import DataError, UsageError
from linearize.gating.gate import ChannelGate
from linearize.graph.capture import Inputs, normalize_inputs, tensors_of
from linearize.running.models import device_of, move

BYTES = 8  # of a float64


@dataclass
class Differentiable:
    """A copy of a model in float64 and eval mode, with the parameters to differentiate by.

    Attributes:
        model: the copy.
        parameters: by name; without the gates' `alpha`, which are no weights.
        inputs: all samples, in float64.
        samples: N, the size of the first axis of every tensor in the inputs.
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    inputs: Inputs
    samples: int
    vectorized: bool = True

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> Differentiable:
        """Copy a model; `inputs` is a tensor, a tuple or a dict whose tensors hold N samples each on their first axis.

        Raises:
            UsageError: there is no sample or no parameter, or the model does not run on the inputs.
        """
        checks.with_values("inputs", inputs)
        twin = copy.deepcopy(eager_model(model)).double().eval()
        for module in twin.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        alphas = {id(module.alpha) for module in twin.modules() if isinstance(module, ChannelGate)}
        named = {name: p.detach() for name, p in twin.named_parameters() if id(p) not in alphas}
        batch = move(normalize_inputs(inputs), device_of(twin), torch.float64)
        sizes = {t.shape[0] if t.dim() else 0 for t in tensors_of([batch[0], batch[1]])}
        if len(sizes) != 1 or 0 in sizes:
            remedy = "Pass tensors that hold the same number of samples on their first axis."
            raise UsageError("inputs", f"found {sorted(sizes)} samples", remedy)
        if not named:
            raise UsageError(type(model).__name__, "has no parameters", "There is nothing to differentiate by.")
        made = cls(twin, named, batch, sizes.pop())
        made.outputs(made.sample(0, 1))
        return made

    def sample(self, start: int, stop: int) -> Inputs:
        """Some of the samples, for one run: a model may overwrite them."""
        part: Inputs = pytree.tree_map_only(Tensor, lambda t: t[start:stop].clone(), self.inputs)
        return part

    @torch.no_grad()
    def outputs(self, inputs: Inputs) -> Tensor:
        """All floating outputs on some samples: (n, O).

        Raises:
            UsageError: the model does not run on the inputs, or mixes the samples.
        """
        try:
            out = self._run(self.parameters, inputs)
        except Exception as error:  # whatever the model's own forward raises
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            shapes = [tuple(t.shape) for t in tensors_of([inputs[0], inputs[1]])]
            found = f"does not run on inputs of shapes {shapes} ({line.strip()})"
            raise UsageError(type(self.model).__name__, found, "Pass inputs that its forward takes.") from error
        if not out.numel():
            raise UsageError(type(self.model).__name__, "has no floating output", "Pass a model with one.")
        return out

    def _run(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        output = functional_call(self.model, parameters, inputs[0], inputs[1])
        floating = [t for t in tensors_of(output) if t.is_floating_point()]
        return torch.cat([t.reshape(t.shape[0], -1) for t in floating], dim=1)

    def rows(self, start: int, stop: int) -> Tensor:
        """The Jacobian of some samples: ((stop - start) * O, P).

        Raises:
            DataError: it holds NaN or infinity.
        """
        found = self._rows(start, stop)
        if not bool(found.isfinite().all()):
            remedy = "Check these samples, and the weights."
            raise DataError(
                type(self.model).__name__,
                f"has NaN or infinity in its Jacobian on samples {start} to {stop - 1}",
                remedy,
            )
        return found

    def _rows(self, start: int, stop: int) -> Tensor:
        if self.vectorized:
            try:
                return self._vectorized(start, stop)
            except Exception:
                self.vectorized = False
        return torch.cat([self._looped(sample) for sample in range(start, stop)])

    def _vectorized(self, start: int, stop: int) -> Tensor:
        def one(parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
            single: Inputs = pytree.tree_map_only(Tensor, lambda t: t[None], inputs)
            return self._run(parameters, single)[0]

        found = vmap(jacrev(one), (None, 0))(self.parameters, self.sample(start, stop))
        blocks = [block.flatten(0, 1).flatten(1) for block in found.values()]
        return torch.cat(blocks, dim=1).detach()

    def _looped(self, sample: int) -> Tensor:
        held = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad():
            out = self._run(held, self.sample(sample, sample + 1))[0]
            rows = []
            for value in out:
                if not value.requires_grad:
                    rows.append(torch.zeros(self.size, dtype=torch.float64, device=value.device))
                    continue
                grads = torch.autograd.grad(value, list(held.values()), retain_graph=True, materialize_grads=True)
                rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
        return torch.stack(rows)


def chunks(samples: int, per_sample: int, memory: float) -> Iterator[tuple[int, int]]:
    """Ranges of samples whose rows fit in a quarter of the memory (in bytes); at least one sample each."""
    step = max(1, int(memory / 4 / max(1, per_sample * BYTES)))
    for start in range(0, samples, step):
        yield start, min(samples, start + step)


def human(size: float) -> str:
    """A number of bytes in readable form.

    Examples:
        >>> human(3 * 2**30)
        '3.0 GiB'
    """
    power = min(4, max(0, int(math.log(max(1.0, size), 1024))))
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"

"""The channel gate: a blend of an activation and a straight line, with one weight per channel.

`y = act(x) + a * (slope * x + intercept - act(x))` with one `a` in [0, 1] per channel. At `a = 0` the channel computes
its activation, at `a = 1` it is linear. With ReLU and the default surrogate (slope 1, intercept 0) it is the
channel-wise PReLU of Ali Mehmeti-Goepel and Disselhoff, "Nonlinear Advantage", ICML 2023; for smooth
activations it is the form of Dror et al., "Layer Folding", BMVC 2022.

Shape letters: C channels of the gate.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from linearize import checks
from linearize.errors import UsageError
from linearize.gating.arithmetic import Mixture, Recomputed, Surrogate, mix, mix_in_pieces, recomputable
from linearize.gating.sharded import put, unsharded
from linearize.purity import repeats

if TYPE_CHECKING:
    from linearize.sites.site import Site

__all__ = ["ChannelGate", "gates", "plain_activations"]

# Names that wrappers (DDP, torch.compile, FSDP, checkpointing) put into module paths.
_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class ChannelGate(nn.Module):
    """A blend of an activation and a straight line, with one weight `alpha` per channel.

    Args:
        activation: the wrapped activation; it becomes the child `activation`. Its own parameters and
            buffers keep their names in the state dict (a PReLU's `weight` stays `weight`). If it works in
            place, a copy that does not is used, because the gate needs its input.
        channels: C, the size of the channel axis.
        axis: the channel axis of the input, counted from the end, so a negative number.
        gated_unit: the activation is the gate factor of a gated linear unit, `act(g) * u`. Its surrogate
            is then a constant: slope 0, and an intercept that starts at 0.
        site: what is known about the place of the gate, as plain data.

    Shape:
        Any input with C entries on `axis`; the output has the input's shape and the activation's dtype.

    Attributes:
        alpha: parameter (C,), float32 unless the gate is cast; 0 at the start. Where FSDP has sharded it, what asks for
            channels (`linear`, `half_way`, a prior) asks all processes, and must be called on all of them.
        slope, intercept: buffers (C,), the line that a channel moves to.
        frozen: buffer (C,) of bool. A frozen channel is linear whatever its alpha is, and its alpha gets no gradient.

    Raises:
        UsageError: channels is not positive, or axis is not negative.

    Examples:
        >>> gate = ChannelGate(nn.ReLU(), channels=2)
        >>> gate(torch.tensor([[-1.0, -1.0]])).tolist()
        [[0.0, 0.0]]
        >>> _ = gate.linearize_(torch.tensor([False, True]))
        >>> gate(torch.tensor([[-1.0, -1.0]])).tolist()
        [[0.0, -1.0]]
    """

    alpha: nn.Parameter
    slope: Tensor
    intercept: Tensor
    frozen: Tensor

    def __init__(
        self,
        activation: nn.Module,
        channels: int,
        axis: int = -1,
        *,
        gated_unit: bool = False,
        site: Site | None = None,
    ) -> None:
        super().__init__()
        checks.module("activation", activation)
        checks.whole("channels", channels, 1)
        if not checks.is_whole(axis) or axis >= 0:
            checks.refuse("axis", axis, "a channel axis counted from the end: -1 is the last")
        self.activation = out_of_place(activation)
        self._inplace = tuple(name for name, module in activation.named_modules() if getattr(module, "inplace", False))
        self._repeats = repeats(activation)
        self._passes = False
        self.channels = channels
        self.axis = axis
        self.gated_unit = gated_unit
        self.site = site
        self.alpha = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        start = torch.zeros if gated_unit else torch.ones
        self.register_buffer("slope", start(channels, dtype=torch.float32))
        self.register_buffer("intercept", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("frozen", torch.zeros(channels, dtype=torch.bool))
        self.train(activation.training)

    @property
    def linear(self) -> Tensor:
        """Which channels are linear now: bool (C,)."""
        return self.frozen | (unsharded(self.alpha.detach()) >= 1)

    def check(self) -> None:
        """Check that `alpha` and the line still have the shape (C,).

        Raises:
            UsageError: one of them is not of shape (C,).
        """
        for name in ("alpha", "slope", "intercept", "frozen"):
            shape = tuple(getattr(self, name).shape)
            if shape != (self.channels,):
                where = f"{self.site.name}.{name}" if self.site is not None else f"ChannelGate.{name}"
                raise UsageError(where, f"found shape {shape}", f"Give it shape ({self.channels},), one per channel.")

    @torch.no_grad()
    def linearize_(self, mask: Tensor) -> ChannelGate:
        """Make the channels where `mask` (bool, (C,)) is True linear, for good. The others do not change.

        Raises:
            UsageError: mask is not a bool tensor of shape (C,).
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (self.channels,):
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            name = self.site.name if self.site is not None else "ChannelGate.linearize_"
            raise UsageError(name, f"found a mask {found}", f"Pass bool of shape ({self.channels},).")
        mask = mask.to(self.frozen.device)
        put(self.alpha, unsharded(self.alpha).masked_fill(mask, 1))
        self.frozen.logical_or_(mask)
        return self

    @property
    def half_way(self) -> Tensor:
        """Which channels are a blend, with an alpha between 0 and 1: bool (C,)."""
        alpha = unsharded(self.alpha.detach())
        return (alpha > 0) & (alpha < 1) & ~self.frozen

    @torch.no_grad()
    def round_(self, threshold: float = 0.5) -> ChannelGate:
        """Round the alpha of each channel that is a blend: to 1, for good, from `threshold` on, and to 0 below.

        Averaged weights (EMA) and training that ends early leave such channels. Rounding changes the function.

        Raises:
            UsageError: threshold is not between 0 and 1.

        Examples:
            >>> gate = ChannelGate(nn.ReLU(), channels=3)
            >>> _ = gate.alpha.data.copy_(torch.tensor([0.0, 0.25, 0.75]))
            >>> gate.round_().alpha.tolist(), gate.frozen.tolist()
            ([0.0, 0.0, 1.0], [False, False, True])
        """
        if not 0 <= threshold <= 1:
            raise UsageError("ChannelGate.round_", f"found threshold={threshold}", "Pass a number from 0 to 1.")
        undecided = self.half_way
        alpha = unsharded(self.alpha)
        up = undecided & (alpha >= threshold)
        put(self.alpha, alpha.masked_fill(undecided & ~up, 0))
        return self.linearize_(up)

    @property
    def in_place(self) -> bool:
        """Whether the activation worked in place before it got the gate."""
        return bool(self._inplace)

    def released(self) -> nn.Module:
        """The activation without the gate, working in place again if it did before."""
        for name in self._inplace:
            self.activation.get_submodule(name).inplace = True  # type: ignore[assignment]
        return self.activation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name by which torch's activations may be called
        """The gated activation of `input`."""
        activation, x = self.activation, input
        if self._passes:
            return cast("Tensor", activation(x))
        mixture = Mixture(activation, Surrogate(self.alpha, self.slope, self.intercept, self.frozen), self.axis)
        if torch.compiler.is_compiling() or not self._repeats or not recomputable(activation, x):
            return mix(mixture, x)
        if not torch.is_grad_enabled():
            return mix_in_pieces(mixture, x)
        return cast("Tensor", Recomputed.apply(mixture, x, self.alpha, *activation.parameters()))

    def extra_repr(self) -> str:
        """Channels and axis, for `print(model)`."""
        unit = ", gated_unit=True" if self.gated_unit else ""
        return f"channels={self.channels}, axis={self.axis}{unit}"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like that of any module, but the activation's own entries keep their names from before the gate."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        inner = f"{prefix}activation."
        for name in [name for name in state if name.startswith(inner)]:
            outer = prefix + name[len(inner) :]
            if outer not in state:
                state[outer] = state.pop(name)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.activation.state_dict():
            outer, inner = f"{prefix}{name}", f"{prefix}activation.{name}"
            if name not in ("alpha", "slope", "intercept", "frozen") and outer in state_dict:
                state_dict[inner] = state_dict.pop(outer)
        super()._load_from_state_dict(state_dict, prefix, *args)


def gates(model: nn.Module) -> dict[str, ChannelGate]:
    """The gates of `model` in order of execution, by site name. A gate that was put in by hand has its module path.

    Wrappers (DistributedDataParallel, torch.compile) are skipped: the names are those of the wrapped model.

    Examples:
        >>> list(gates(nn.Sequential(nn.Linear(2, 4), ChannelGate(nn.GELU(), 4), nn.Linear(4, 2))))
        ['1']
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, ChannelGate)]
    if all(gate.site is not None for _, gate in found):
        found.sort(key=lambda item: item[1].site.order if item[1].site is not None else 0)
    names = [gate.site.name if gate.site is not None else _plain(path) for path, gate in found]
    # Two converted models inside one may share site names; paths are always distinct.
    pairs = zip(names, found, strict=True)
    return {name if names.count(name) == 1 else path: gate for name, (path, gate) in pairs}


@contextmanager
def plain_activations(model: nn.Module) -> Iterator[None]:
    """Gates without a linear channel are their activations inside: the same values, at less cost.

    For passes over data, in which no alpha changes or gets a gradient.

    Examples:
        >>> model = nn.Sequential(ChannelGate(nn.GELU(), 4))
        >>> with plain_activations(model):
        ...     out = model(torch.ones(1, 4))
        >>> bool((out == model(torch.ones(1, 4))).all())
        True
    """
    untouched = [
        gate for gate in gates(model).values() if not bool((gate.frozen | (unsharded(gate.alpha.detach()) != 0)).any())
    ]
    try:
        for gate in untouched:
            gate._passes = True
        yield
    finally:
        for gate in untouched:
            gate._passes = False


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPER_PARTS)


def out_of_place(activation: nn.Module) -> nn.Module:
    """The activation, or a copy of it that does not work in place. Others may hold the same module."""
    if not any(getattr(module, "inplace", False) for module in activation.modules()):
        return activation
    activation = copy.deepcopy(activation)
    for module in activation.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return activation

"""How the tensors of experts may be read: which numbers count experts, and where the channels of each stand.

Shape letters: E experts, M channels of an expert, D features of a token, O of what comes out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from linearize.families.experts.place import ExpertChannels, ExpertNumber, Experts, Slots
from linearize.gating.gate import ChannelGate
from linearize.surgery.attributes import whole_numbers_of
from linearize.tensors import oddity

__all__ = ["Attributes", "axis_of", "channels_of", "numbers_for", "parameters_of", "widths_for", "with_rows"]

Attributes = dict[tuple[str, str], ExpertNumber]

_COUNTED = ("expert", "out_features")
_WIDE = ("inter", "inner", "ffn", "ff_")
_LAST = ("down", "out", "w2", "fc2", "wo")


def parameters_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters by name, without those of gates."""
    gates = {id(gate.alpha) for gate in module.modules() if isinstance(gate, ChannelGate)}
    return [(name, value) for name, value in module.named_parameters() if id(value) not in gates]


def axis_of(value: Tensor, count: int) -> int | None:
    """The axis of experts in a tensor: the first, or the last of one that has a number for each; None if it has none.

    Examples:
        >>> import torch
        >>> [axis_of(torch.zeros(shape), 3) for shape in ((3, 5), (1, 3), (5, 3), ())]
        [0, 1, None, None]
    """
    if value.dim() and len(value) == count:
        return 0
    return value.dim() - 1 if value.dim() and value.numel() == value.shape[-1] == count else None


def with_rows(module: nn.Module, count: int) -> list[str]:
    """Names of a module's own tensors that have a row, or a number, for each expert.

    Examples:
        >>> with_rows(nn.Linear(4, 3), 3), with_rows(nn.Linear(3, 4), 3)
        (['weight', 'bias'], [])
    """
    held = {**module._parameters, **module._buffers}
    return [name for name, value in held.items() if value is not None and axis_of(value, count) is not None]


def numbers_for(model: nn.Module, place: Experts) -> Iterator[Attributes]:
    """Which numbers of the modules of a mixture may count its experts, the likeliest reading first."""
    some: list[tuple[str, str]] = []
    for path, module in model.get_submodule(place.path).named_modules():
        whole = ".".join(filter(None, (place.path, path)))
        if place.listed and whole.startswith(f"{place.bank}."):
            continue
        some += [(whole, name) for name, value in whole_numbers_of(module).items() if value == place.count]
    likely = [key for key in some if any(part in key[1] for part in _COUNTED)]
    tried: list[list[tuple[str, str]]] = []
    for keys in (likely, some, []):
        if keys not in tried:
            tried.append(keys)
            yield dict.fromkeys(keys, "experts")


def widths_for(model: nn.Module, place: Experts, channels: ExpertChannels) -> Attributes:
    """Numbers of a bank that give the width of its experts; those that give another width, too, only by name."""
    bank = model.get_submodule(place.bank)
    down = bank.get_parameter(channels.down)
    sure = channels.width not in {place.shape[-1], down.shape[3 - channels.slots[channels.down].axis], place.count}
    names = [name for name, value in whole_numbers_of(bank).items() if value == channels.width]
    return {(place.bank, n): "width" for n in names if sure or any(part in n for part in _WIDE)}


def channels_of(bank: nn.Module, inputs: int) -> Iterator[ExpertChannels]:
    """Where the channels of a bank's experts may stand, the likeliest reading first.

    Args:
        bank: with parameters that hold all experts.
        inputs: D, which is O, too.
    """
    tensors = {name: value for name, value in bank._parameters.items() if value is not None}
    cubes = {name: value for name, value in tensors.items() if value.dim() == 3 and inputs in value.shape[1:]}
    flats = {name: value for name, value in tensors.items() if value.dim() == 2}
    if len(cubes) + len(flats) < len(tensors) or any(oddity(value) for value in tensors.values()) or len(cubes) < 2:
        return
    for down in sorted(cubes, key=lambda name: not any(part in name for part in _LAST)):
        axes = [[axis for axis in (2, 1) if value.shape[3 - axis] == inputs] for value in cubes.values()]
        for chosen in itertools.product(*axes):
            by_name = dict(zip(cubes, chosen, strict=True))
            width = cubes[down].shape[by_name[down]]
            for bias, woven in itertools.product(_biases(flats, inputs), (False, True)):
                others = {name: cubes[name].shape[axis] for name, axis in by_name.items() if name != down}
                others |= {name: value.shape[1] for name, value in flats.items() if name != bias}
                if all(size in {width, 2 * width} for size in others.values()):
                    twice = any(size == 2 * width for size in others.values())
                    if twice or not woven:
                        slots = {n: Slots(by_name.get(n, 1), size // width, woven) for n, size in others.items()}
                        yield ExpertChannels(width, {**slots, down: Slots(by_name[down])}, down, bias)


def _biases(flats: Mapping[str, Tensor], outputs: int) -> Sequence[str]:
    """Which tensor (E, O) may be added behind the last matrix: one of the right width, the likeliest first."""
    fitting = [name for name, value in flats.items() if value.shape[1] == outputs]
    return [*sorted(fitting, key=lambda name: not any(part in name for part in _LAST)), ""]

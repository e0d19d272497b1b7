"""Small networks, one for each thing that can go wrong around an activation; every one is built from a fixed seed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from torch import Tensor, nn

# What a test of `compress` mostly wants: no timing of models, no bar, nothing written to a folder of the user.
QUIET: dict[str, Any] = {"rounds": 0, "progress": False, "cache": False}


@dataclass(frozen=True)
class Toy:
    """A network, its inputs, and the forms of its sites under `when="always"`: half of the channels linear, and all."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    forms: tuple[str, ...]
    all_linear: tuple[str, ...]


TOYS: dict[str, Toy] = {}


def toy(
    inputs: Callable[[], Any], *, half: str | tuple[str, ...], full: str | tuple[str, ...]
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a network with the forms expected of it: half of the channels linear, and all of them."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        forms = tuple((value,) if isinstance(value, str) else value for value in (half, full))
        TOYS[make.__name__] = Toy(make, inputs, forms[0], forms[1])
        return make

    return register


def vector(batch: int = 3, features: int = 6) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, features)


def image(channels: int = 4, size: int = 9, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, channels, size, size)


def shaken(norm: nn.Module) -> nn.Module:
    """A norm with statistics as after training."""
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return norm


MASKED = "partial activation"


@toy(vector(), half="merged", full="vanished")
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5))


@toy(vector(), half="merged", full="vanished")
def mlp_without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16, bias=False), nn.SiLU(), nn.Linear(16, 5, bias=False))


@toy(vector(), half=("merged", "merged", "merged"), full=("vanished", "vanished", "vanished"))
def deep_mlp() -> nn.Module:
    """Each linear map is the consumer of one site and the producer of the next."""
    layers: list[nn.Module] = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


@toy(vector(), half="merged", full="vanished")
def inplace_and_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, 5))


@toy(vector(), half="merged", full="vanished")
def batch_norm_between() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), shaken(nn.BatchNorm1d(16, eps=0.3)), nn.ReLU(), nn.Linear(16, 5))


@toy(image(), half="merged", full="vanished")
def conv_then_pointwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 5, 1))


@toy(image(), half="merged", full="vanished")
def conv_strided_dilated() -> nn.Module:
    conv = nn.Conv2d(4, 12, 3, stride=2, padding=2, dilation=2, bias=False)
    return nn.Sequential(conv, shaken(nn.BatchNorm2d(12, eps=0.1)), nn.Hardswish(), nn.Conv2d(12, 5, 1, stride=2))


@toy(image(), half="merged (input)", full="vanished")
def pointwise_then_padded() -> nn.Module:
    """Padding inserts 0 where the hidden map would have held a bias."""
    return nn.Sequential(
        nn.Conv2d(4, 12, 1), shaken(nn.BatchNorm2d(12)), nn.ReLU6(), nn.Conv2d(12, 5, 3, stride=2, padding=1)
    )


@toy(image(), half="merged (input)", full="vanished")
def strided_pointwise_then_padded() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 1, stride=2), nn.ReLU(), nn.Conv2d(12, 5, 3, stride=2, padding=2, dilation=2))


@toy(image(), half="factored", full="vanished")
def two_spatial_unpadded() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2), nn.SiLU(), nn.Conv2d(8, 5, (2, 1), stride=(1, 2))
    )


@toy(image(), half="factored", full="factored")
def two_spatial_padded() -> nn.Module:
    """Never exact as one convolution: the border differs."""
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1))


@toy(image(), half="merged", full="vanished")
def grouped_producer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(12, 5, 1))


@toy(image(), half="merged (input)", full="vanished")
def grouped_consumer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 1), nn.GELU(), nn.Conv2d(12, 6, 3, padding=1, groups=3))


@toy(image(), half=("merged (input)", "merged"), full=("vanished", "vanished"))
def inverted_residual() -> nn.Module:
    """Expand, depthwise, project: with all channels linear, one dense convolution."""
    return nn.Sequential(
        OrderedDict(
            expand=nn.Conv2d(4, 12, 1, bias=False),
            bn1=shaken(nn.BatchNorm2d(12)),
            act1=nn.ReLU6(),
            depthwise=nn.Conv2d(12, 12, 3, padding=1, stride=2, groups=12, bias=False),
            bn2=shaken(nn.BatchNorm2d(12, eps=1e-2)),
            act2=nn.ReLU6(),
            project=nn.Conv2d(12, 4, 1, bias=False),
            bn3=shaken(nn.BatchNorm2d(4)),
        )
    )


@toy(lambda: torch.randn(2, 4, 15), half="merged", full="vanished")
def conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 12, 3, padding="same"), nn.LeakyReLU(), nn.Conv1d(12, 5, 1))


@toy(lambda: torch.randn(2, 3, 5, 5, 5), half="merged (input)", full="vanished")
def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 8, 1), nn.ReLU(), nn.Conv3d(8, 4, 3, padding=1))


@toy(lambda: image()().to(memory_format=torch.channels_last), half="merged", full="vanished")
def channels_last() -> nn.Module:
    return conv_then_pointwise().to(memory_format=torch.channels_last)


class _PooledHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 1)
        self.act = nn.SiLU()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.act(self.conv(x)), 1).flatten(1))


@toy(image(), half="merged (input)", full="vanished")
def pooled_head() -> nn.Module:
    return _PooledHead()


class _Permuted(nn.Module):
    """A convolution, then layers that work on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1)
        self.act = nn.GELU()
        self.scale = LayerScale(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)).flatten(2).transpose(1, 2)
        return self.fc(self.scale(x))


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@toy(image(), half="merged", full="vanished")
def permuted_with_scale() -> nn.Module:
    return _Permuted()


class _TwoConsumers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(6, 16), nn.ReLU()
        self.left, self.right = nn.Linear(16, 3), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.act(self.fc1(x))
        return {"left": self.left(h), "right": self.right(h)}


@toy(vector(), half="merged", full="factored")
def two_consumers_and_dict_output() -> nn.Module:
    return _TwoConsumers()


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)
        self.fc2.weight = self.fc1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@toy(vector(), half=MASKED, full=MASKED)
def tied_weights() -> nn.Module:
    return _Tied()


class _Repeated(nn.Module):
    """One block called twice: every site in it has two places in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.block(x))


@toy(vector(), half=MASKED, full=MASKED)
def repeated_block() -> nn.Module:
    return _Repeated()


class _SharedActivation(nn.Module):
    """One activation module called twice, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.relu(self.b(self.relu(self.a(x)))))


@toy(vector(), half=("merged", "merged"), full=("vanished", "vanished"))
def shared_activation() -> nn.Module:
    return nn.Sequential(OrderedDict(net=_SharedActivation()))


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: bool = False) -> Tensor:
        h = F.gelu(self.a(x), approximate="tanh")
        h = F.dropout(h, 0.5, self.training)
        h = torch.relu(self.b(h))
        if mask is not None:
            h = h * mask
        return self.c(h) * 2 if scale else self.c(h)


@toy(vector(), half=("merged", "merged"), full=("vanished", "vanished"))
def functional_activations() -> nn.Module:
    return _Functional()


class _GatedUnit(nn.Module):
    """SwiGLU with two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(6, 16, bias=False), nn.Linear(16, 6)
        self.act = nn.SiLU()

    def forward(self, *, hidden_states: Tensor) -> Tensor:
        return self.down(self.act(self.gate(hidden_states)) * self.up(hidden_states))


@toy(lambda: {"hidden_states": torch.randn(2, 3, 6)}, half="merged", full="vanished")
def gated_unit_by_keyword() -> nn.Module:
    return _GatedUnit()


class _PackedUnit(nn.Module):
    """GEGLU with one projection; which half is the gate is a matter of taste."""

    def __init__(self, gate_last: bool) -> None:
        super().__init__()
        self.packed, self.down, self.act = nn.Linear(6, 32), nn.Linear(16, 6), nn.GELU()
        self.gate_last = gate_last

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.packed(x).chunk(2, dim=-1)
        return self.down(a * self.act(b) if self.gate_last else self.act(a) * b)


@toy(vector(), half="merged", full="vanished")
def packed_unit() -> nn.Module:
    return _PackedUnit(gate_last=False)


@toy(vector(), half="merged", full="vanished")
def packed_unit_gate_last() -> nn.Module:
    return _PackedUnit(gate_last=True)


class _Residual(nn.Module):
    """The activation's output is also added to something: a boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        return h + self.b(h)


@toy(vector(), half=MASKED, full=MASKED)
def residual() -> nn.Module:
    return _Residual()


class _Normed(nn.Module):
    """A layer norm between activation and consumer mixes the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.norm, self.b = nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.act(self.a(x))))


@toy(vector(), half=MASKED, full=MASKED)
def inner_norm() -> nn.Module:
    return _Normed()


class _FixedWidth(nn.Module):
    """Forward code that names the hidden width: it does not take another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x)).view(x.shape[0], 1, 12)
        return self.b(h.squeeze(1))


@toy(vector(), half=MASKED, full=MASKED)
def fixed_width() -> nn.Module:
    return _FixedWidth()


class _BadPadding(nn.Module):
    """Average pooling that counts padding changes a constant at the border."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.out = nn.Conv2d(4, 12, 1), nn.ReLU(), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.avg_pool2d(self.act(self.conv(x)), 3, 1, 1))


@toy(image(), half="merged", full="factored")
def padded_pooling() -> nn.Module:
    return _BadPadding()


class _PreActivation(nn.Module):
    """Norm, activation, convolution: the producer is not a linear map alone, but the channels are known."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act, self.conv = shaken(nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(self.bn(x)))


@toy(image(), half=MASKED, full=MASKED)
def pre_activation() -> nn.Module:
    return _PreActivation()


class SamePadded(nn.Conv2d):
    """Padding that depends on the size of the input, as in networks that come from TensorFlow."""

    def forward(self, input: Tensor) -> Tensor:
        high, wide = (
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, s, k in zip(input.shape[-2:], self.stride, self.kernel_size, strict=True)
        )
        if high > 0 or wide > 0:
            input = F.pad(input, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return F.conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@toy(image(size=10), half=("merged (input)", "merged"), full=("vanished", "vanished"))
def same_padding() -> nn.Module:
    """At this size the second convolution needs padding on one side only."""
    return nn.Sequential(
        nn.Conv2d(4, 12, 1), nn.ReLU(), SamePadded(12, 12, 3, stride=2, groups=12), nn.ReLU(), nn.Conv2d(12, 5, 1)
    )


class StandardizedConv(nn.Conv2d):
    """A convolution that standardises its weight, as in networks without norms."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = self.weight.std(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(input, (self.weight - mean) / std, self.bias, self.stride, self.padding, self.dilation)


@toy(image(), half="merged", full="vanished")
def standardized_weights() -> nn.Module:
    return nn.Sequential(StandardizedConv(4, 12, 3, padding=1), nn.SiLU(), StandardizedConv(12, 5, 1))


@toy(vector(), half="merged", full="vanished")
def weight_norm() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 12))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(12, 5))


@toy(vector(), half=MASKED, full=MASKED)
def parametric_per_channel() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.PReLU(12), nn.Linear(12, 5))


@toy(vector(), half="merged", full="vanished")
def parametric_shared() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.PReLU(), nn.Linear(12, 5))


class _SquaredReLU(nn.Module):
    """Elementwise, with a child and numbers of its own, as StarReLU in MetaFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor([0.9])), nn.Parameter(torch.tensor([-0.4]))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.relu(x) ** 2 + self.bias


@toy(vector(), half="merged", full="vanished")
def activation_with_a_child() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), _SquaredReLU(), nn.Linear(12, 5))


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A toy in eval mode and inputs for it."""
    torch.manual_seed(len(name))
    chosen = TOYS[name]
    model, inputs = chosen.make().eval().to(dtype), chosen.inputs()
    if isinstance(inputs, dict):
        return model, {key: value.to(dtype) for key, value in inputs.items()}
    return model, inputs.to(dtype)

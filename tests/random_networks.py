"""Random small networks as Python source: what users write around activations, mixed at random.

A network is text, so that one that breaks can be printed, read and made into a toy. Kinds of tensors, with their axes:
"vec" (batch, C), "seq" (batch, positions, C), "sig" (batch, C, positions), "map" (batch, C, height, width),
"last" (batch, height, width, C).
"""

from __future__ import annotations

import linecache
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in user code
from torch import Tensor, nn
from torch.nn.utils import prune


class Scale(nn.Module):
    """A factor per channel on the last axis, or in front of `after` axes."""

    def __init__(self, channels: int, after: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, *(1,) * after))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Stored(nn.Module):
    """A linear map whose weight is stored (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], y.shape[-1])


class Normed(nn.Conv2d):
    """A convolution that normalises its weight and pads by hand."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, self.bias, self.stride)


class Quick(nn.Module):
    """An activation of several ops."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x)


class Odd(nn.Module):
    """An activation that works in place and has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.slope)


MODULES = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.GELU()",
    "nn.SiLU(inplace=True)",
    "nn.Hardswish()",
    "nn.ELU(0.7)",
    "nn.Tanh()",
    "nn.LeakyReLU(0.2, inplace=True)",
    "nn.PReLU()",
    "nn.Softplus()",
    "nn.ReLU6()",
    "Quick()",
    "Odd()",
)
FUNCTIONS = (
    "F.relu({x})",
    "F.relu({x}, inplace=True)",
    "F.gelu({x}, approximate='tanh')",
    "{x}.relu()",
    "{x}.relu_()",
    "torch.tanh({x})",
    "F.silu({x})",
    "F.leaky_relu({x}, 0.3)",
    "F.hardtanh({x}, -0.5, 2.0)",
)
# Kind -> how many axes come after the channels.
AFTER = {"vec": 0, "seq": 0, "last": 0, "sig": 1, "map": 2}


@dataclass
class Writer:
    """Writes one module: lines of its constructor and of its forward. `x` is always the current tensor."""

    rng: random.Random
    kind: str
    channels: int
    depth: int = 0
    made: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    count: int = 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def module(self, expression: str, stem: str = "m") -> str:
        name = self.name(stem)
        self.made.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def do(self, line: str) -> None:
        self.body.append(line)

    def maybe(self, chance: float) -> bool:
        return self.rng.random() < chance

    def width(self) -> int:
        return self.rng.choice((1, 2, 3, 4, 4, 6, 8, 8, 12))

    # -- linear maps

    def linear(self, out: int) -> str:
        """Source of a linear map of the current kind."""
        rng, bias = self.rng, f"bias={self.maybe(0.7)}"
        if AFTER[self.kind] == 0:
            choice = rng.random()
            if choice < 0.06:
                return f"Stored({self.channels}, {out})"
            if choice < 0.12:
                return f"nn.utils.parametrizations.weight_norm(nn.Linear({self.channels}, {out}, {bias}))"
            return f"nn.Linear({self.channels}, {out}, {bias})"
        if self.kind == "map" and self.maybe(0.06):
            return f"Normed({self.channels}, {out}, 3, stride={rng.choice((1, 2))}, {bias})"
        if self.kind == "map" and self.maybe(0.04):
            return f"nn.ConvTranspose2d({self.channels}, {out}, 2, stride=2)"
        n = AFTER[self.kind]
        if self.maybe(0.5):
            return f"nn.Conv{n}d({self.channels}, {out}, 1, stride={rng.choice((1, 1, 1, 2))}, {bias})"
        kernel = [rng.choice((1, 2, 3, 3)) for _ in range(n)]
        stride = [rng.choice((1, 1, 2)) for _ in range(n)]
        dilation = [rng.choice((1, 1, 2)) for _ in range(n)]
        padding = str([rng.choice((0, 0, 1, 2)) for _ in range(n)])
        if stride == [1] * n and self.maybe(0.2):
            padding = "'same'"
        mode = ", padding_mode='circular'" if self.maybe(0.05) and padding != "'same'" else ""
        groups = rng.choice([g for g in range(1, 13) if self.channels % g == 0 and out % g == 0])
        groups = groups if self.maybe(0.4) else 1
        return (
            f"nn.Conv{n}d({self.channels}, {out}, {kernel}, stride={stride}, padding={padding}, "
            f"dilation={dilation}, groups={groups}, {bias}{mode})"
        )

    def apply_linear(self) -> None:
        """A linear map; now and then one with a tied weight, or an earlier one again."""
        out, before = self.width(), self.channels
        expression = self.linear(out)
        same = [line.split(" = ")[0] for line in self.made if line.endswith(f" = {expression}")]
        if same and self.maybe(0.3):
            self.do(f"x = {self.rng.choice(same)}(x)")
        else:
            layer = self.module(expression)
            if same and self.maybe(0.5):
                self.made.append(f"{layer}.weight = {self.rng.choice(same)}.weight")
            self.do(f"x = {layer}({self.rng.choice(('x', 'x', 'x', 'input=x' if 'nn.' in expression else 'x'))})")
        self.channels = out
        if before == out and self.maybe(0.1):
            self.do(self.body[-1])

    # -- things between a linear map and an activation

    def between(self) -> None:
        for _ in range(self.rng.choice((0, 0, 0, 1, 1, 2))):
            self.rng.choice(self.BETWEEN)(self)

    def norm(self) -> None:
        eps, affine = self.rng.choice((1e-5, 1e-2, 0.3)), self.maybe(0.8)
        options = f"{self.channels}, eps={eps}, affine={affine}"
        if self.kind in ("vec", "sig"):
            self.do(f"x = {self.module(f'nn.BatchNorm1d({options})')}(x)")
        elif self.kind == "map":
            self.do(f"x = {self.module(f'nn.BatchNorm2d({options})')}(x)")
        elif self.maybe(0.3):
            self.do(f"x = {self.module(f'nn.LayerNorm({self.channels})')}(x)")

    def dropout(self) -> None:
        if self.maybe(0.5):
            self.do(f"x = {self.module('nn.Dropout(0.3, inplace=' + str(self.maybe(0.3)) + ')')}(x)")
        else:
            self.do("x = F.dropout(x, 0.2, self.training)")

    def scale(self) -> None:
        choice = self.rng.choice(("module", "module", "number", "inplace", "div", "width", "buffer"))
        if choice == "buffer":
            name, sizes = self.name("b"), (self.channels, *(1,) * AFTER[self.kind])
            self.made.append(f"self.register_buffer('{name}', torch.randn{sizes})")
            self.do(f"x = x * self.{name}")
            return
        if choice == "module":
            self.do(f"x = {self.module(f'Scale({self.channels}, {AFTER[self.kind]})')}(x)")
        else:
            line = {
                "number": "x = x * 0.7",
                "inplace": "x.mul_(1.3)",
                "div": "x = x / 3",
                "width": f"x = x * x.shape[{-1 - AFTER[self.kind]}] ** -0.5",
            }[choice]
            self.do(line)

    def move(self) -> None:
        """Another order of axes."""
        moves = {
            "seq": [("x = x.transpose(1, 2)", "sig")],
            "sig": [
                ("x = x.transpose(1, 2)", "seq"),
                ("x = x.unsqueeze(-1)", "map"),
                ("x = x.permute(0, 2, 1)", "seq"),
            ],
            "map": [
                ("x = x.permute(0, 2, 3, 1)", "last"),
                ("x = x.flatten(2)", "sig"),
                ("x = x.flatten(2).transpose(1, 2)", "seq"),
                ("x = x.permute(0, 1, 3, 2)", "map"),
                ("x = x.reshape(x.shape[0], x.shape[1], -1)", "sig"),
            ],
            "last": [
                ("x = x.permute(0, 3, 1, 2)", "map"),
                ("x = x.movedim(-1, 1)", "map"),
                ("x = x.flatten(1, 2)", "seq"),
                ("x = x.reshape(x.shape[0], -1, x.shape[-1])", "seq"),
                ("x = x.permute(0, 3, 1, 2).contiguous()", "map"),
            ],
            "vec": [("x = x.unsqueeze(1)", "seq"), ("x = x[:, :, None]", "sig"), ("x = x[:, :, None, None]", "map")],
        }[self.kind]
        line, self.kind = self.rng.choice(moves)
        self.do(line)

    def resize(self) -> None:
        """Fewer or more positions."""
        moves = {
            "vec": [("x = x.flip(0)", "vec"), ("x = x.view(-1, x.shape[1])", "vec")],
            "seq": [
                ("x = x.mean(1)", "vec"),
                ("x = x[:, 0]", "vec"),
                ("x = x[:, 1:]", "seq"),
                ("x = x.sum(1)", "vec"),
                ("x = x.roll(1, 1)", "seq"),
                ("x = F.pad(x, (0, 0, 1, 0))", "seq"),
                ("x = F.pad(x, (0, 0, 1, -1))", "seq"),
                ("x = torch.cat([x, x], 1)", "seq"),
                ("x = x.chunk(2, 1)[0]", "seq"),
                ("x = x.max(1)[0]", "vec"),
            ],
            "sig": [
                ("x = x.mean(-1)", "vec"),
                ("x = F.avg_pool1d(x, 2)", "sig"),
                ("x = F.avg_pool1d(x, 3, 1, 1)", "sig"),
                ("x = x[..., 1:]", "sig"),
                ("x = x[..., ::2]", "sig"),
                ("x = F.pad(x, (1, 1))", "sig"),
                ("x = F.adaptive_avg_pool1d(x, 1).squeeze(-1)", "vec"),
                ("x = F.adaptive_max_pool1d(x, 2)", "sig"),
                ("x = x.cumsum(-1)", "sig"),
                ("x = F.interpolate(x, scale_factor=2)", "sig"),
            ],
            "map": [
                ("x = F.adaptive_avg_pool2d(x, 1)", "map"),
                ("x = F.adaptive_avg_pool2d(x, 1).flatten(1)", "vec"),
                ("x = x.mean((2, 3))", "vec"),
                ("x = x.mean((-1, -2), keepdim=True)", "map"),
                ("x = F.avg_pool2d(x, 3, 1, 1)", "map"),
                ("x = F.avg_pool2d(x, 2, ceil_mode=True)", "map"),
                ("x = F.avg_pool2d(x, 2, divisor_override=3)", "map"),
                ("x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)", "map"),
                ("x = F.max_pool2d(x, 3, 2, 1)", "map"),
                ("x = x[:, :, 1:]", "map"),
                ("x = x[:, :, ::2, ::2]", "map"),
                ("x = F.pad(x, (1, 0, 1, 0))", "map"),
                ("x = F.pad(x, (1, 1, 0, 0), value=1.0)", "map"),
                ("x = F.pad(x, (1, 1, 1, 1), mode='replicate')", "map"),
                ("x = F.pad(x, (1, -1, 0, 0))", "map"),
                ("x = F.pad(x, (0, 0, 0, 0, 1, -1))", "map"),
                ("x = F.interpolate(x, scale_factor=2, mode='bilinear')", "map"),
                ("x = F.interpolate(x, size=(5, 4))", "map"),
                ("x = x.sum(2)", "sig"),
                ("x = x.roll(1, 2)", "map"),
                ("x = x.roll(1, 1)", "map"),
                ("x = x.amax(3)", "sig"),
            ],
            "last": [
                ("x = x.mean((1, 2))", "vec"),
                ("x = x[:, 0]", "seq"),
                ("x = x[:, 1:, :2]", "last"),
                ("x = x.flip(1)", "last"),
            ],
        }[self.kind]
        line, self.kind = self.rng.choice(moves)
        self.do(line)

    def shuffle(self) -> None:
        """Touch the channels: mostly no path for a linear channel."""
        axis, c = -1 - AFTER[self.kind], self.channels
        choices = [
            (f"x = x.flip({axis})", c),
            (f"x = x.narrow({axis}, 0, {max(1, c // 2)})", max(1, c // 2)),
            (f"x = torch.cat([x, x], {axis})", 2 * c),
            (f"x = x.softmax({axis})", c),
            ("x = x + 0.3", c),
            ("x.add_(0.1)", c),
            ("x = x.clone()", c),
            ("x = x.detach().to(x.dtype)", c),
            ("x = x.view(x.shape)", c),
            (f"x = x.unflatten({axis}, (1, -1)).squeeze({axis - 1})", c),
        ]
        if self.kind == "map" and c % 4 == 0:
            choices += [("x = F.pixel_shuffle(x, 2)", c // 4)]
        if self.kind == "map" and c % 2 == 0:
            choices += [("x = F.channel_shuffle(x, 2)", c)]
        if self.kind == "vec":
            choices += [("x = x.unsqueeze(0).squeeze(0)", c), (f"x = x.view(-1, {c})", c)]
        line, self.channels = self.rng.choice(choices)
        self.do(line.replace("x.view(x.shape)", "x.reshape(x.shape)"))

    def tap(self) -> None:
        """Let the tensor be read elsewhere: an output, a branch, an attribute."""
        name = self.name("t")
        self.do(f"{name} = {self.rng.choice(('x', 'x * 2', 'x.mean(0)', 'x.clone()'))}")
        self.outputs.append(name)

    BETWEEN: tuple[Callable[[Writer], None], ...] = (
        norm, norm, norm, dropout, scale, scale, move, move, resize, resize, resize, shuffle, tap,
    )  # fmt: skip

    # -- activations

    def activate(self) -> None:
        if self.maybe(0.35):
            call = self.rng.choice(FUNCTIONS).format(x="x")
            self.do(call if call.endswith("_()") and self.maybe(0.5) else f"x = {call}")
            return
        shared = [line.split(" ")[0] for line in self.made if line.startswith("self.act")]
        if shared and self.maybe(0.3):
            self.do(f"x = {self.rng.choice(shared)}(x)")
            return
        expression = self.rng.choice(MODULES)
        if self.maybe(0.05) and self.kind in ("vec", "map", "sig"):
            expression = f"nn.PReLU({self.channels})"
        act = self.module(expression, "act")
        if "inplace" in expression and self.maybe(0.2):
            self.do(f"{act}({self.rng.choice(('x', 'x', 'x.view(x.shape)', 'x[:]'))})")
        else:
            self.do(f"x = {act}(x)")

    # -- whole steps

    def site(self) -> None:
        """Linear map, activation, linear map, with things in between."""
        if self.maybe(0.8):
            self.apply_linear()
        self.between()
        self.activate()
        self.between()
        if self.maybe(0.2):
            self.fork()
        else:
            self.apply_linear()

    def fork(self) -> None:
        """Two linear maps read the same tensor."""
        left, right = self.width(), self.width()
        one, two = self.module(self.linear(left)), self.module(self.linear(right))
        name = self.name("t")
        self.do(f"{name} = {two}(x)")
        self.outputs.append(name)
        self.do(f"x = {one}(x)")
        self.channels = left

    def unit(self) -> None:
        """A gated linear unit."""
        if AFTER[self.kind]:
            self.move()
        if AFTER[self.kind]:
            self.site()
            return
        c, w = self.channels, self.width()
        act, down = self.module(self.rng.choice(MODULES), "act"), self.module(f"nn.Linear({w}, {c})")
        drop = self.module("nn.Dropout(0.1)")
        if self.maybe(0.5):
            packed = self.module(f"nn.Linear({c}, {2 * w}, bias={self.maybe(0.5)})")
            part = self.rng.choice(
                (
                    "a, b = {p}(x).chunk(2, -1)",
                    "h = {p}(x); a, b = h[..., :{w}], h[..., {w}:]",
                    "h = {p}(x); a, b = h.split({w}, -1)",
                    "h = {p}(x); a, b = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]",
                )
            )
            self.do(part.format(p=packed, w=w))
        else:
            gate, up = (self.module(f"nn.Linear({c}, {w}, bias={self.maybe(0.5)})") for _ in range(2))
            self.do(f"a, b = {gate}(x), {up}(x)")
        self.do(
            self.rng.choice(
                (
                    f"x = {down}({act}(a) * b)",
                    f"x = {down}(a * {act}(b))",
                    f"x = {down}({drop}({act}(a) * b))",
                    f"x = {down}(b.mul_({act}(a)))",
                    f"x = x + {down}(F.silu(a) * b)",
                )
            )
        )

    def residual(self) -> None:
        """A sub-network whose output is added to its input, as a block of its own."""
        if self.depth > 1:
            self.site()
            return
        inner = Writer(self.rng, self.kind, self.channels, self.depth + 1)
        inner.count = 100 * (self.depth + 1) + self.rng.randrange(10**6)
        linear = AFTER[self.kind] == 0
        n = AFTER[self.kind]
        for _ in range(self.rng.choice((1, 1, 2))):
            out = self.rng.choice((self.width(), self.channels))
            first = f"nn.Linear({inner.channels}, {out})" if linear else f"nn.Conv{n}d({inner.channels}, {out}, 1)"
            if not linear and self.maybe(0.5):
                first = f"nn.Conv{n}d({inner.channels}, {out}, 3, padding=1)"
            inner.do(f"x = {inner.module(first)}(x)")
            inner.channels = out
            if self.maybe(0.4):
                inner.norm()
            inner.activate()
            if self.maybe(0.3):
                inner.dropout()
        back = (
            f"nn.Linear({inner.channels}, {self.channels})"
            if linear
            else f"nn.Conv{n}d({inner.channels}, {self.channels}, 1)"
        )
        inner.do(f"x = {inner.module(back)}(x)")
        name = f"Block{inner.count}"
        inner.outputs.clear()
        self.blocks += [*inner.blocks, inner.source(name)]
        block = self.module(f"{name}()", "block")
        self.do(self.rng.choice((f"x = x + {block}(x)", f"x = {block}(x) + x", f"x = {block}(x)", f"x += {block}(x)")))
        if self.maybe(0.2):
            self.do(f"x = {block}(x)")

    def sequential(self) -> None:
        """The same in one nn.Sequential."""
        n, c, w, bias = AFTER[self.kind], self.channels, self.width(), self.maybe(0.5)
        kind = f"nn.Conv{n}d" if n else "nn.Linear"
        one = ", 1" if n else ""
        norm = {"vec": "nn.BatchNorm1d", "sig": "nn.BatchNorm1d", "map": "nn.BatchNorm2d"}.get(self.kind)
        layers = [f"{kind}({c}, {w}{one}, bias={bias})"]
        layers += [f"{norm}({w})"] if norm and self.maybe(0.5) else []
        layers += [self.rng.choice(MODULES)]
        layers += ["nn.Dropout(0.1)"] if self.maybe(0.3) else []
        layers += [f"{kind}({w}, {c}{one})"]
        block = self.module(f"nn.Sequential({', '.join(layers)})", "seq")
        self.do(
            self.rng.choice(
                (f"x = {block}(x)", f"x = {block}(x)", f"x = {block}[1:]({block}[:1](x))", f"x = x + {block}(x)")
            )
        )

    def cat(self) -> None:
        """Two branches side by side."""
        axis, left, right = -1 - AFTER[self.kind], self.width(), self.width()
        n = AFTER[self.kind]
        one, two = (
            self.module(f"nn.Conv{n}d({self.channels}, {w}, 1)" if n else f"nn.Linear({self.channels}, {w})")
            for w in (left, right)
        )
        act = self.module(self.rng.choice(MODULES), "act")
        self.do(f"x = torch.cat([{act}({one}(x)), {self.rng.choice((f'{two}(x)', f'F.relu({two}(x))'))}], {axis})")
        self.channels = left + right

    STEPS: tuple[Callable[[Writer], None], ...] = (
        site, site, site, site, site, unit, residual, residual, sequential, cat,
    )  # fmt: skip

    def source(self, name: str) -> str:
        outs = ", ".join(["x", *self.outputs])
        returned = outs if len(self.outputs) == 0 else self.rng.choice((f"({outs})", f"{{'a': x, 'b': [{outs}]}}"))
        lines = [f"class {name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.made]
        lines += ["    def forward(self, x):", *(f"        {line}" for line in self.body), f"        return {returned}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Network:
    """A random network: its source, its input's shape, the seed that made it, and the features it was given."""

    seed: int
    source: str
    shape: tuple[int, ...]
    features: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "prune": prune}
        space |= {part.__name__: part for part in (Scale, Stored, Normed, Quick, Odd)}
        file = f"<random network {self.seed} {'+'.join(self.features)}>"
        if self.seed % 2:  # every other network's source can be read, as that of a class in a file
            linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        exec(compile(self.source, file, "exec"), space)  # noqa: S102 - our own source
        torch.manual_seed(self.seed)
        model: nn.Module = space["Net"]().double().eval()
        with torch.no_grad():
            for module in model.modules():
                variance = getattr(module, "running_var", None)
                if isinstance(variance, Tensor):
                    variance.uniform_(0.5, 2.0)
                    module.running_mean.normal_()  # type: ignore[operator]
        return model


def network(seed: int, feature: Callable[[Writer], str] | None = None) -> Network:
    """The random network of a seed; with `feature`, about every other step is one that it writes."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    kind = rng.choice(("vec", "seq", "sig", "map", "map"))
    channels = rng.choice((1, 3, 4, 6))
    batch, size = rng.choice((1, 2, 2, 3, channels)), rng.choice((channels, 5, 6, 7))
    shape = {
        "vec": (batch, channels),
        "seq": (batch, size, channels),
        "sig": (batch, channels, max(size, 4)),
        "map": (batch, channels, max(size, 5), rng.choice((5, 6, 8))),
    }[kind]
    writer = Writer(rng, kind, channels)
    features: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        if feature is not None and (not features or rng.random() < 0.5):
            features.append(feature(writer))
        rng.choice(Writer.STEPS)(writer)
    source = "\n\n".join([*writer.blocks, writer.source("Net")])
    return Network(seed, source, shape, tuple(features))

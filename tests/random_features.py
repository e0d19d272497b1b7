"""What real models do besides computing: keep state, take fast paths, compute their weights, split and join.

Each function writes one step with a `Writer` of tests/random_networks.py. A feature that the library does not follow
stays uncollapsed; that it stays the same program is what the stress run shows.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.random_networks import AFTER, MODULES, Writer

__all__ = ["FEATURES", "add_feature"]

Step = Callable[[Writer], None]


def _layer(w: Writer, inputs: int, outputs: int) -> str:
    """Source of a linear map of one position."""
    n = AFTER[w.kind]
    return f"nn.Conv{n}d({inputs}, {outputs}, 1)" if n else f"nn.Linear({inputs}, {outputs})"


def _site(w: Writer) -> None:
    """Linear map, activation, linear map: something to collapse beside the feature."""
    hidden, out = w.width() + 2, w.width()
    first, second = w.module(_layer(w, w.channels, hidden)), w.module(_layer(w, hidden, out))
    w.do(f"x = {first}(x)")
    w.channels = hidden
    w.activate()
    w.do(f"x = {second}(x)")
    w.channels = out


def counter(w: Writer) -> None:
    """A Python number that every call changes, and that the output depends on."""
    name = w.name("calls")
    w.made.append(f"self.{name} = 0")
    w.do(f"self.{name} = self.{name} + 1")
    w.do(f"x = x * (1 + 0.1 * self.{name})")


def buffer_counter(w: Writer) -> None:
    """The same in a buffer, written in place."""
    name = w.name("steps")
    w.made.append(f"self.register_buffer('{name}', torch.zeros((), dtype=torch.long))")
    w.do(f"self.{name}.add_(1)")
    w.do(f"x = x + 0.1 * self.{name}")


def average(w: Writer) -> None:
    """A running mean that training mode moves."""
    name = w.name("mean")
    w.made.append(f"self.register_buffer('{name}', torch.zeros(()))")
    w.do("if self.training:")
    w.do(f"    self.{name}.mul_(0.9).add_(0.1 * x.detach().mean().to(self.{name}.dtype))")
    w.do(f"x = x - self.{name}")


def temperature(w: Writer) -> None:
    """A number that is read at every call, and may be set from outside."""
    w.made.append("self.temperature = 1.5")
    w.do("x = x / self.temperature")


def mode(w: Writer) -> None:
    """Another program in training mode."""
    w.do("if self.training:")
    w.do("    x = x * 1.25")
    w.do("else:")
    w.do("    x = x * 0.75")


def stored(w: Writer) -> None:
    """A feature that is left on the module."""
    name = w.name("feature")
    w.made.append(f"self.{name} = None")
    w.do(f"self.{name} = {w.rng.choice(('x', 'x * 2', '(x, x.shape[0])'))}")
    _site(w)


def auxiliary(w: Writer) -> None:
    """A loss that is left on the module, with its gradient."""
    name = w.name("aux")
    w.made.append(f"self.{name} = None")
    _site(w)
    w.do(f"self.{name} = x.square().mean()")


def appended(w: Writer) -> None:
    """A list that every call grows."""
    name = w.name("seen")
    w.made.append(f"self.{name} = []")
    w.do(f"self.{name}.append(x.shape[0])")


def drop(w: Writer) -> None:
    """Dropout whose probability is an attribute."""
    w.made.append("self.p = 0.25")
    w.do("x = F.dropout(x, self.p, self.training)")


def held_function(w: Writer) -> None:
    """An activation held as a function."""
    name = w.name("call")
    w.made.append(f"self.{name} = {w.rng.choice(('F.gelu', 'F.relu', 'torch.tanh', 'F.silu'))}")
    w.do(f"x = {w.module(_layer(w, w.channels, 6))}(x)")
    w.do(f"x = self.{name}(x)")
    w.do(f"x = {w.module(_layer(w, 6, w.channels))}(x)")


def split(w: Writer) -> None:
    """Branches of parts of the channels, each with an activation, and one linear map behind all of them."""
    axis, parts = -1 - AFTER[w.kind], [w.width() for _ in range(w.rng.choice((2, 2, 3)))]
    first, out = w.module(_layer(w, w.channels, sum(parts))), w.width()
    names = [w.name("part") for _ in parts]
    w.do(f"{', '.join(names)} = {first}(x).split({parts}, {axis})")
    done = [f"{w.module(w.rng.choice(MODULES), 'act')}({name})" if w.maybe(0.8) else name for name in names]
    w.do(f"x = {w.module(_layer(w, sum(parts), out))}(torch.cat([{', '.join(done)}], {axis}))")
    w.channels = out


def joined(w: Writer) -> None:
    """Two hidden layers and the input side by side, read by one linear map."""
    axis, widths, out = -1 - AFTER[w.kind], [w.width() + 1, w.width() + 1], w.width()
    made = [f"{w.module(w.rng.choice(MODULES), 'act')}({w.module(_layer(w, w.channels, c))}(x))" for c in widths]
    w.do(f"x = {w.module(_layer(w, sum(widths) + w.channels, out))}(torch.cat([{made[0]}, x, {made[1]}], {axis}))")
    w.channels = out


def frozen(w: Writer) -> None:
    """A constant map per channel between a linear map and an activation."""
    sizes, hidden = (6, *(1,) * AFTER[w.kind]), 6
    scale, shift = w.name("scale"), w.name("shift")
    w.made += [f"self.register_buffer('{name}', torch.randn{sizes})" for name in (scale, shift)]
    w.do(f"x = {w.module(_layer(w, w.channels, hidden))}(x) * self.{scale} + self.{shift}")
    w.do(f"x = {w.module(w.rng.choice(MODULES), 'act')}(x)")
    w.do(f"x = {w.module(_layer(w, hidden, w.channels))}(x)")


def shared(w: Writer) -> None:
    """One block and one activation in two places."""
    c, hidden = w.channels, w.width() + 2
    up, down = w.module(_layer(w, c, hidden)), w.module(_layer(w, hidden, c))
    act = w.module(w.rng.choice(MODULES), "act")
    w.do(f"x = {down}({act}({up}(x)))")
    w.do(w.rng.choice((f"x = x + {down}({act}({up}(x)))", f"x = {act}(x)")))


def computed(w: Writer) -> None:
    """Weights that are computed from other tensors at every call."""
    hidden, first, second = 6, _layer(w, w.channels, 6), _layer(w, 6, w.channels)
    wrap = (
        "nn.utils.parametrizations.weight_norm({})",
        "nn.utils.parametrizations.spectral_norm({})",
        "prune.l1_unstructured({}, 'weight', amount=0.3)",
        "{}",
    )
    one, two = (w.module(w.rng.choice(wrap).format(layer)) for layer in (first, second))
    w.channels = hidden
    w.do(f"x = {one}(x)")
    w.activate()
    w.do(f"x = {two}(x)")
    w.channels = int(second.split(", ")[1].rstrip(")"))


def encoder(w: Writer) -> None:
    """torch's own layer, whose forward takes a fused path in eval mode without gradients."""
    if w.kind != "seq":
        _site(w)
        return
    width, out = 8, w.width()
    act, norm = w.rng.choice(("'relu'", "'gelu'", "F.relu", "F.silu")), w.maybe(0.5)
    w.do(f"x = {w.module(f'nn.Linear({w.channels}, {width})')}(x)")
    layer = f"nn.TransformerEncoderLayer({width}, 2, 12, dropout=0.0, activation={act}, batch_first=True"
    w.do(f"x = {w.module(f'{layer}, norm_first={norm})')}(x)")
    w.do(f"x = {w.module(f'nn.Linear({width}, {out})')}(x)")
    w.channels = out


def attention(w: Writer) -> None:
    """nn.MultiheadAttention, then a feed-forward network."""
    if w.kind == "seq":
        w.do(f"x = {w.module(f'nn.Linear({w.channels}, 8)')}(x)")
        layer = w.module("nn.MultiheadAttention(8, 2, batch_first=True)")
        w.do(f"x = x + {layer}(x, x, x, need_weights={w.maybe(0.3)})[0]")
        w.channels = 8
    _site(w)


FEATURES: dict[str, Step] = {
    step.__name__: step
    for step in (
        counter, buffer_counter, average, temperature, mode, stored, auxiliary, appended, drop, held_function,
        split, joined, frozen, shared, computed, encoder, attention,
    )
}  # fmt: skip


def add_feature(w: Writer) -> str:
    """Write one feature, chosen at random; returns its name."""
    name = w.rng.choice(list(FEATURES))
    FEATURES[name](w)
    return name

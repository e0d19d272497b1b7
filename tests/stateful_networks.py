"""Random networks whose forwards read and write what can change, as Python source.

Temperatures, dropout rates and slopes that a schedule moves, counters, Python's and torch's random numbers, features
and losses that are stored, lists that grow, globals, closures, functions in attributes and in lists. `transcript` runs
one over several calls and returns all that can be seen of it.
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

WIDTH = 6

# How an activation is called: lines of the constructor, and the expression; {me} is the method's first parameter.
CALLS: tuple[tuple[str, str], ...] = (
    ("", "F.relu({h})"),
    ("", "F.gelu({h}, approximate='tanh')"),
    ("", "{h}.tanh()"),
    ("", "torch.sigmoid({h})"),
    ("{me}.slope = 0.1", "F.leaky_relu({h}, {me}.slope)"),
    ("{me}.slope = 0.3", "F.elu({h}, alpha={me}.slope)"),
    ("{me}.low = -0.5", "F.hardtanh({h}, {me}.low, 1.5)"),
    ("{me}.act = F.silu", "{me}.act({h})"),
    ("{me}.act = torch.tanh", "{me}.act({h})"),
    ("{me}.act = functools.partial(F.leaky_relu, negative_slope=0.2)", "{me}.act({h})"),
    ("{me}.act = lambda x: x * torch.sigmoid(1.7 * x)", "{me}.act({h})"),
    ("{me}.act = nn.GELU()", "{me}.act({h})"),
    ("{me}.act = nn.PReLU()", "{me}.act({h} - 0.1 * {me}.act({h}))"),
    ("{me}.acts = [F.relu, F.gelu]", "{me}.acts[0]({h})"),
    ("{me}.kind = 'relu'", "getattr(F, {me}.kind)({h})"),
    ("{me}.acts = nn.ModuleDict({{'a': nn.SiLU(), 'b': nn.Tanh()}})", "{me}.acts['a']({me}.acts['b']({h}))"),
    ("{me}.act = Remembering()", "{me}.act({h})"),
)
# What else a forward does with the hidden tensor `h`: lines of the constructor, lines of the forward.
HABITS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("{me}.temperature = 1.5",), ("h = h / {me}.temperature",)),
    (("{me}.p = 0.1",), ("h = F.dropout(h, {me}.p, {me}.training)",)),
    (("{me}.drop = nn.Dropout(0.2)",), ("h = F.dropout(h, {me}.drop.p, {me}.training)",)),
    (("{me}.steps = 0",), ("{me}.steps += 1", "h = h * min(1.0, {me}.steps / 3)")),
    (("{me}.steps = 0",), ("if {me}.training:", "    {me}.steps += 1", "h = h + 0.1 * {me}.steps")),
    ((), ("if random.random() < 0.5:", "    h = h * 2")),
    ((), ("if {me}.training:", "    h = h + 0.1 * torch.randn_like(h)")),
    (("{me}.feature = None",), ("{me}.feature = h",)),
    (("{me}.penalty = None",), ("{me}.penalty = h.abs().mean()",)),
    (("{me}.log = []",), ("{me}.log.append(h.mean())",)),
    (("{me}.notes = {{'all': [], 'last': None}}",), ("{me}.notes['all'].append(h.std())", "{me}.notes['last'] = h")),
    (("{me}.tracker = Tracker()",), ("{me}.tracker.see(h)", "h = h + 0.01 * {me}.tracker.seen")),
    (("{me}.register_buffer('count', torch.zeros(()))",), ("{me}.count += 1", "h = h + 0.1 * {me}.count")),
    ((), ("CALLS.append(h.detach().sum())", "h = h + 0.01 * len(CALLS)")),
    (("{me}.offset = torch.zeros(())",), ("{me}.offset = {me}.offset + 0.5", "h = h + {me}.offset")),
    (("{me}.deep = True",), ("if not {me}.deep:", "    return x + {me}.b(h)")),
    (("{me}._{name}__gain = 0.9",), ("h = h * {me}.__gain",)),
)

_PRELUDE = '''
import functools
import random
import torch
import torch.nn.functional as F
from torch import nn

CALLS = []


class Tracker:
    def __init__(self):
        self.seen, self.values = 0, []

    def see(self, h):
        self.seen += 1
        self.values.append(h.mean())


class Remembering(nn.Module):
    """An activation that stores its output, and a loss of it."""

    def __init__(self):
        super().__init__()
        self.last, self.penalty, self.calls = None, None, 0

    def forward(self, x):
        y = F.relu(x)
        self.last, self.penalty, self.calls = y, y.mean(), self.calls + 1
        return y


def counted(function):
    calls = 0

    @functools.wraps(function)
    def inner(self, x):
        nonlocal calls
        calls += 1
        self.decorated = calls
        return function(self, x) + 0.01 * calls

    return inner
'''


@dataclass(frozen=True)
class Stateful:
    """A random network with state: its source, the shape of its input, and the seed that made it."""

    seed: int
    source: str
    shape: tuple[int, ...]

    def build(self, *, with_source: bool = True) -> nn.Module:
        """The network in float64 and eval mode; two of one seed are twins. Without a source nobody can read it."""
        name = f"<stateful network {self.seed} {with_source}>"
        space: dict[str, Any] = {"__name__": f"stateful_{self.seed}"}
        exec(compile(self.source, name, "exec"), space)  # noqa: S102 - our own source
        if with_source:
            linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        torch.manual_seed(self.seed)
        model: nn.Module = space["Net"]()
        return model.double().eval()


def stateful_network(seed: int) -> tuple[nn.Module, Tensor]:
    """The random network of a seed, with an input."""
    made = stateful(seed)
    generator = torch.Generator().manual_seed(seed)
    return made.build(), torch.randn(made.shape, generator=generator, dtype=torch.float64)


def stateful(seed: int) -> Stateful:
    """The random network of a seed as source."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    count = rng.choice((1, 1, 2, 3))
    blocks = [_block(rng, f"Block{number}") for number in range(count)]
    layers = ", ".join(f"Block{number}()" for number in range(count))
    net = [
        "class Net(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        f"        self.blocks = nn.ModuleList([{layers}])",
        f"        self.head = nn.Linear({WIDTH}, 3)",
        "    def forward(self, x):",
        "        for block in self.blocks:",
        "            x = block(x)",
        *(["            x = block(x)"] if rng.random() < 0.2 else []),
        "        return self.head(x)",
    ]
    shape = rng.choice(((3, WIDTH), (2, 4, WIDTH)))
    return Stateful(seed, "\n\n\n".join([_PRELUDE, *blocks, "\n".join(net)]) + "\n", shape)


@dataclass
class _Class:
    """Lines of a class under way."""

    me: str
    name: str
    made: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def fill(self, text: str, h: str = "h") -> str:
        return text.format(me=self.me, h=h, name=self.name)


def _block(rng: random.Random, name: str) -> str:
    """A linear map, an activation, a linear map and habits in between, added to the input."""
    block = _Class(rng.choice(("self", "self", "self", "this")), name)
    hidden = rng.choice((4, 8, 12))
    block.made = [f"{block.me}.a = nn.Linear({WIDTH}, {hidden})", f"{block.me}.b = nn.Linear({hidden}, {WIDTH})"]
    setup, call = rng.choice(CALLS)
    where = rng.choice(("inline", "inline", "method", "local"))
    block.made += [block.fill(setup)] if setup else []
    block.body = [f"h = {block.me}.a(x)"]
    extra: list[str] = []
    activated = block.fill(call)
    if where == "method":
        extra = [f"    def activated({block.me}, h):", f"        return {activated}"]
        activated = f"{block.me}.activated(h)"
    if where == "local" and call == "F.relu({h})":
        block.body.append("act = F.relu")
        activated = "act(h)"
    block.body.append(f"h = {activated}")
    for makes, does in rng.sample(HABITS, rng.choice((1, 2, 3))):
        block.made += [block.fill(line) for line in makes]
        block.body += [block.fill(line) for line in does]
    block.body.append(f"return x + {block.me}.b(h)")
    decorator = ["    @counted"] if rng.random() < 0.2 else []
    lines = [f"class {name}(nn.Module):", f"    def __init__({block.me}):", "        super().__init__()"]
    lines += [f"        {line}" for line in block.made]
    lines += [*decorator, f"    def forward({block.me}, x):", *(f"        {line}" for line in block.body), *extra]
    return "\n".join(lines)


def transcript(model: nn.Module, x: Tensor, *, calls: int = 3, move: bool = True) -> list[Any]:
    """All that can be seen of a network over several calls in both modes: outputs, gradients, and what it keeps.

    Args:
        model: is left in eval mode, with what the calls have left on it.
        x: its input.
        calls: in each mode.
        move: change what a schedule changes between the calls.
    """
    seen: list[Any] = []
    for training in (False, True, False):
        model.train(training)
        for call in range(calls):
            torch.manual_seed(call)
            random.seed(call)
            model.zero_grad()
            given = x.clone().requires_grad_()
            y = model(given)
            kept = [t for t in _kept(model) if isinstance(t, Tensor)]
            loss = y.square().mean() + sum((t.sum() for t in kept if t.requires_grad), torch.zeros(()))
            loss.backward(retain_graph=True)  # lists hold what earlier calls have left
            with torch.no_grad():
                served = model(x.clone())
            assert given.grad is not None
            gradients = {name: _grad(p) for name, p in model.named_parameters() if not name.endswith("alpha")}
            seen += [y, served, {"x": given.grad.clone(), **gradients}, _plain(_kept(model))]
            if move:
                _move(model)
    return seen


def _grad(parameter: nn.Parameter) -> Tensor | None:
    return None if parameter.grad is None else parameter.grad.clone()


_STATE = (
    "temperature p steps feature penalty log notes tracker count offset deep slope low kind last calls decorated"
).split()  # fmt: skip


def _kept(model: nn.Module) -> list[Any]:
    """What the modules keep, flat, gates looked through."""
    found: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                add(item)
        elif isinstance(value, list):
            for item in value:
                add(item)
        elif type(value).__name__ == "Tracker":
            add([value.seen, value.values])
        else:
            found.append(value)

    for module in model.modules():
        for name in _STATE:
            if name in vars(module):
                add(vars(module)[name])
        if "count" in module._buffers:
            add(module._buffers["count"])
    return found


def _plain(values: list[Any]) -> list[Any]:
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in values]


def _move(model: nn.Module) -> None:
    """What users change between calls."""
    moves: dict[str, Callable[[Any], Any]] = {
        "temperature": lambda t: t * 0.8,
        "p": lambda p: min(0.5, p + 0.1),
        "slope": lambda s: s + 0.05,
        "low": lambda s: s - 0.1,
        "deep": lambda d: not d,
        "kind": lambda k: "gelu" if k == "relu" else "relu",
    }
    for module in model.modules():
        for name, change in moves.items():
            if name in vars(module) and not isinstance(module, nn.Dropout):
                setattr(module, name, change(vars(module)[name]))
        if isinstance(module, nn.Dropout):
            module.p = min(0.6, module.p + 0.1)
        if isinstance(vars(module).get("acts"), list):
            vars(module)["acts"].reverse()


__all__ = ["F", "Stateful", "stateful", "stateful_network", "transcript"]

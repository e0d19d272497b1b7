"""One random network through the whole chain, in both modes, with and without gradients; what was compared is counted.

Eval mode: original = gated; gated with random linear channels = collapsed = saved and loaded. Training mode: original =
gated, by the same random numbers. Every comparison is over two calls in a row, so that state counts, and holds outputs,
what the calls left on the modules (features, losses, buffers), and gradients of the input and of all parameters.
"""

from __future__ import annotations

import copy
import functools
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import linearize
from linearize.surgery.form_choice import make_plan
from tests.chain import randomize
from tests.random_networks import Network, network

__all__ = ["Mismatch", "Outcome", "check", "stir"]

CLOSE = 1e-10
_TORCH = "gradients that torch gets wrong in the model without gates"
# A gate does not overwrite its input: its result may have another stride along an axis of size 1, and the next
# convolution then adds up in another order.
ROUNDING = 1e-13


class Mismatch(AssertionError):
    """Two programs that should be the same are not."""


@dataclass
class Outcome:
    """What one network came to.

    Attributes:
        reached: comparisons made, by name.
        forms: sites by what became of them when everything was collapsed that can be.
        refused: the step that said no, and the kind of its error; empty if none did.
    """

    reached: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    refused: str = ""


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def left_behind(model: nn.Module) -> list[tuple[str, Any]]:
    """What calls left on the modules that a user wrote, by place: numbers, features, losses, lists, buffers."""
    found: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        if hasattr(module, "written_here"):
            kept = {name: value for name, value in vars(module).items() if not callable(value)}  # those may get a gate
            names = [name for name in kept if not name.startswith("_") and name != "training"]
            found += [(f"{path}.{name}", vars(module)[name]) for name in sorted(names)]
            own: Any = module.written_here
            found += [(f"{path}.{name}", module._buffers[name]) for name in sorted(own & module._buffers.keys())]
    return found


def changed_by_calls(model: nn.Module, batches: list[Tensor]) -> set[str]:
    """The places where calls in eval mode leave something; what stands elsewhere may be folded into other tensors."""
    model = copy.deepcopy(model).eval()
    before = copy.deepcopy(dict(left_behind(model)))
    with torch.no_grad():
        for x in batches:
            model(x.clone())
    leaves = pytree.tree_leaves
    return {
        place
        for place, value in left_behind(model)
        if len(old := leaves(before.get(place))) != len(leaves(value)) or any(map(difference, old, leaves(value)))
    }


def mark(model: nn.Module) -> nn.Module:
    """Remember which modules are the network's own (those that its source defines), and their buffers."""
    for module in model.modules():
        if type(module).__name__ == "Net" or type(module).__name__.startswith("Block"):
            module.written_here = frozenset(module._buffers)  # type: ignore[assignment]
    return model


def run(
    model: nn.Module, batches: list[Tensor], *, train: bool, grad: bool, exactly: bool, places: set[str] | None = None
) -> dict[str, list[Any]]:
    """Everything that can be compared after calling a copy of the model on each batch.

    Of what calls leave on modules, only what stands in `places`, if these are given.
    """
    model = copy.deepcopy(model).train(train)
    batches = [x.clone().requires_grad_(grad) for x in batches]
    found: dict[str, list[Any]] = {"outputs": [], "left behind": [], "gradients": []}
    torch.manual_seed(7)
    with torch.set_grad_enabled(grad):
        for x in batches:
            out = model(x.clone() if grad else x)
            found["outputs"] += _tensors(out)
            left = [(place, value) for place, value in left_behind(model) if places is None or place in places]
            found["left behind"] += [leaf for leaf in pytree.tree_leaves(left) if not callable(leaf)]
            total = sum(
                (t.square().sum() for t in [*_tensors(out), *_tensors(left)] if t.requires_grad),
                torch.zeros((), dtype=torch.float64),
            )
            if grad and total.requires_grad:
                total.backward(retain_graph=True)
    if grad:
        found["gradients"] = [x.grad for x in batches]
        if exactly:  # the same parameters, as the original and the gated model have them
            found["gradients"] += [p.grad for name, p in sorted(model.named_parameters()) if not name.endswith("alpha")]
    found["outputs"], found["left behind"] = (_plain(found[name]) for name in ("outputs", "left behind"))
    return found


def _plain(values: list[Any]) -> list[Any]:
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in values]


def difference(expected: Any, found: Any, least: float = 1e-300) -> float:
    """Relative error of two values of at least the size `least`; infinite where kinds, types or shapes differ."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return 0.0 if type(expected) is type(found) and expected == found else float("inf")
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return float("inf")
    if not expected.numel() or torch.equal(expected, found):
        return 0.0
    if not bool(torch.isfinite(expected).all()):
        return 0.0 if torch.equal(expected.isfinite(), found.isfinite()) else float("inf")
    error = float((expected - found).abs().max() / expected.abs().max().clamp_min(least))
    return error if error == error else float("inf")  # noqa: PLR0124 - NaN is an error


def compare(name: str, expected: dict[str, list[Any]], found: dict[str, list[Any]], bound: float) -> None:
    """Raise a `Mismatch` that says in what and by how much two runs differ."""
    for what, values in expected.items():
        others = found[what]
        if len(values) != len(others):
            raise Mismatch(f"{name}: {len(values)} {what}, found {len(others)}")
        # Gradients are sums over many paths: two orders of summing differ by rounding of what is summed. That of
        # a bias in front of a norm is zero but for this.
        sizes = [float(t.abs().max()) for t in values if isinstance(t, Tensor) and t.numel()]
        least = max(1e-300, 1e-3 * max(sizes, default=0.0)) if what == "gradients" else 1e-300
        worst = max((difference(a, b, least) for a, b in zip(values, others, strict=True)), default=0.0)
        if worst > (bound if what != "gradients" and (what == "outputs" or bound) else CLOSE):
            raise Mismatch(f"{name}: {what} differ by {worst:.2g}")


def stir(model: nn.Module, rng: random.Random) -> None:
    """Make a share of the channels linear; some constant, some gates not at all, some channels on their way."""
    randomize(model, rng.choice((0.3, 0.5, 0.8, 1.0, 1.0)), seed=rng.randrange(99))
    for gate in linearize.gates(model).values():
        if rng.random() < 0.1:
            gate.slope.zero_()
            gate.intercept.mul_(rng.choice((0, 1)))
        if rng.random() < 0.15:
            gate.frozen.zero_()
            gate.alpha.data.zero_()
        if rng.random() < 0.15:
            gate.alpha.data[torch.rand(gate.channels) < 0.4] = 0.3


def batches_for(model: nn.Module, shape: tuple[int, ...], rng: random.Random) -> list[list[Tensor]]:
    """Two batches of the shape, and of others that the model takes: batch size, length, resolution."""
    size = rng.choice((1, 2, 4, 5))
    shapes = [shape, (size, *shape[1:])]
    shapes += [(size, shape[1] + 2, shape[2]), (size, shape[1], shape[2] + 3)] if len(shape) == 3 else []
    more = (rng.choice((1, 2, 3)), rng.choice((0, 1, 4)))
    shapes += [(size, shape[1], shape[2] + more[0], shape[3] + more[1])] if len(shape) == 4 else []
    found = []
    for each in shapes:
        pair = [torch.randn(each, dtype=torch.float64) for _ in range(2)]
        try:
            outputs = run(model, pair, train=False, grad=False, exactly=False)["outputs"]
        except (RuntimeError, ValueError):  # too small for its pools and kernels, or a width that it does not take
            continue
        if outputs and all(bool(torch.isfinite(t).all()) for t in outputs):
            found.append(pair)
    return found


def check(seed: int, made: Network | None = None, feature: Callable[..., str] | None = None) -> Outcome:
    """Take the network of a seed through the chain.

    Raises:
        Mismatch: with what differs.
    """
    made, rng, outcome = made or network(seed, feature), random.Random(seed), Outcome()  # noqa: S311 - not for secrets
    original = mark(made.build())
    torch.manual_seed(seed)
    runs = batches_for(original, made.shape, rng)
    if not runs or runs[0][0].shape != torch.Size(made.shape):
        outcome.refused = "the network does not run"
        return outcome
    before = (_plain([value for _, value in left_behind(original)]), copy.deepcopy(original.state_dict()))
    try:
        gated = linearize.convert(original, runs[0][0].clone())
    except linearize.LinearizeError as error:
        outcome.refused = f"convert: {type(error).__name__}"
        return outcome
    after = (_plain([value for _, value in left_behind(original)]), original.state_dict())
    if len(before[0]) != len(after[0]) or any(map(difference, before[0], after[0])):
        raise Mismatch("convert changed what the model keeps")
    if before[1].keys() != after[1].keys() or any(difference(v, after[1][k]) for k, v in before[1].items()):
        raise Mismatch("convert changed the model's tensors")
    outcome.reached["model left alone"] += 1
    _gated_is_original(original, gated, runs, made, outcome)
    stir(gated, rng)
    _collapsed_is_gated(original, gated, runs, made, rng, outcome)
    return outcome


def compare_or_excuse(
    name: str, expected: dict[str, Any], found: dict[str, Any], bound: float, excused: Callable[[], bool] | None
) -> bool:
    """As `compare`, unless there is an excuse, of which it tells."""
    try:
        compare(name, expected, found, bound)
    except Mismatch:
        if excused is None or not excused():
            raise
        return True
    return False


def wrong_in_torch(model: nn.Module, gated: nn.Module, batches: list[Tensor], *, train: bool) -> bool:
    """Whether plain torch layers get the gradients of a model wrong, and the gated model gets its own right."""
    return gradients_off(model, batches, train=train) > 1 > gradients_off(gated, batches, train=train)


def gradients_off(model: nn.Module, batches: list[Tensor], *, train: bool) -> float:
    """How far a model's derivative by autograd, along a random direction, is from the quotient of differences.

    In units of what the differences themselves may be off by. There are networks (batches of one, channels last) whose
    gradients torch itself gets wrong.
    """
    direction = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3)) for x in batches]

    def total(inputs: list[Tensor]) -> Tensor:
        torch.manual_seed(7)
        copied = copy.deepcopy(model).train(train)
        return torch.stack([t.square().sum() for x in inputs for t in _tensors(copied(x.clone()))]).sum()

    inputs = [x.clone().requires_grad_() for x in batches]
    slopes = torch.autograd.grad(total(inputs), inputs, allow_unused=True)
    by_autograd = sum(float((g * v).sum()) for g, v in zip(slopes, direction, strict=True) if g is not None)
    step = 1e-6
    with torch.no_grad():
        ends = [total([x + sign * step * v for x, v in zip(batches, direction, strict=True)]) for sign in (1, -1)]
    quotient = float(ends[0] - ends[1]) / (2 * step)
    return abs(by_autograd - quotient) / (1e-4 * (abs(quotient) + 1))


def _gated_is_original(
    original: nn.Module, gated: nn.Module, runs: list[list[Tensor]], made: Network, outcome: Outcome
) -> None:
    in_place = "inplace=True" in made.source or "_()" in made.source
    for number, pair in enumerate(runs):
        for train in (False, True):
            for grad in (False, True):
                how: dict[str, Any] = {"train": train, "grad": grad, "exactly": True}
                try:
                    expected = run(original, pair, **how)
                except (RuntimeError, ValueError):  # a leaf written in place, one value per channel in training
                    continue
                name = f"gated, {'train' if train else 'eval'}, {'with' if grad else 'without'} gradients"
                try:
                    found = run(gated, pair, **how)
                except Exception as error:
                    raise Mismatch(f"{name}: {type(error).__name__}: {str(error)[:200]}") from error
                excused = functools.partial(wrong_in_torch, original, gated, pair, train=train) if grad else None
                bound = ROUNDING if in_place or grad or train else 0.0
                outcome.reached.update([_TORCH] * compare_or_excuse(name, expected, found, bound, excused))
                outcome.reached[name] += 1
                outcome.reached["other shapes"] += number > 0
    if hasattr(original, "temperature"):
        changed = [copy.deepcopy(model) for model in (original, gated)]
        for model in changed:
            model.temperature = 3.0  # type: ignore[assignment]
        one, other = (run(model, runs[0], train=False, grad=False, exactly=True) for model in changed)
        compare("gated, another temperature", one, other, ROUNDING)
        outcome.reached["an attribute set afterwards"] += 1


def _collapsed_is_gated(
    original: nn.Module, gated: nn.Module, runs: list[list[Tensor]], made: Network, rng: random.Random, outcome: Outcome
) -> None:
    try:
        small = linearize.collapse(gated, when=rng.choice(("always", "always", "cheaper")))
        outcome.forms.update(site.form for site in make_plan(gated, when="always").sites)
    except linearize.LinearizeError as error:
        outcome.refused = f"collapse: {type(error).__name__}"
        return
    if linearize.gates(small):
        raise Mismatch("a gate is left in the collapsed model")
    others = {"collapsed": small}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("gated", gated), ("collapsed", small)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    linearize.save(model, Path(folder) / name)
                    loaded = linearize.load(Path(folder) / name, model=mark(made.build()))
            except linearize.LinearizeError as error:
                outcome.refused = f"save or load: {type(error).__name__}"
                continue
            state, again = model.state_dict(), loaded.state_dict()
            if state.keys() != again.keys() or any(difference(value, again[key]) for key, value in state.items()):
                raise Mismatch(f"{name}, loaded: other tensors")
            others[f"{name}, loaded"] = loaded
    for pair in runs:
        for grad in (False, True):
            try:
                places = changed_by_calls(gated, pair)
                expected = run(gated, pair, train=False, grad=grad, exactly=False, places=places)
            except RuntimeError:  # no gradients through what works in place; the original has none either
                continue
            if not all(bool(torch.isfinite(t).all()) for t in expected["outputs"]):
                continue
            for name, model in others.items():
                name = f"{name}, {'with' if grad else 'without'} gradients"  # noqa: PLW2901
                try:
                    found = run(model, pair, train=False, grad=grad, exactly=False, places=places)
                except Exception as error:
                    if grad and not _has_gradients(original, pair):  # its activation's output is overwritten, say
                        continue
                    raise Mismatch(f"{name}: {type(error).__name__}: {str(error)[:200]}") from error
                excused = functools.partial(wrong_in_torch, model, gated, pair, train=False) if grad else None
                outcome.reached.update([_TORCH] * compare_or_excuse(name, expected, found, CLOSE, excused))
                outcome.reached[name] += 1


def _has_gradients(model: nn.Module, pair: list[Tensor]) -> bool:
    try:
        run(model, pair, train=False, grad=True, exactly=False)
    except RuntimeError:
        return False
    return True

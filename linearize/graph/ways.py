"""Find modules around which code does other things in another run: in training mode, for a larger batch, next time.

A capture shows one run. What surgery does around an activation is right in every run only if the same ops lie between
the modules around it in every run, so that is looked at here, on fake tensors.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from linearize.graph.capture import Inputs
from linearize.graph.fakes import FakeRun, fake_runs
from linearize.graph.follow import Derivation, Follower, Ways

_log = logging.getLogger(__name__)

# Several kinds in one run, since runs take time; one by one where something differs, to name it.
_TOGETHER: tuple[dict[str, bool], ...] = ({"gradients": True, "twice": True}, {"gradients": True, "training": True}, {})
_COMPUTING: tuple[dict[str, bool], ...] = ({"gradients": True}, {})
_APART: tuple[tuple[str, dict[str, bool]], ...] = (
    ("with gradients", {"gradients": True}),
    ("in training mode", {"gradients": True, "training": True}),
    ("for a larger batch", {"twice": True}),
    ("at another call", {}),
)
_DRAWN = "numbers are drawn from Python's or NumPy's generator on the way to its input, which may depend on them"


class Seen(NamedTuple):
    """What several runs of a model show.

    Attributes:
        changing: the modules around which the code does other things in another run, each with the reason. Their inputs
            are computed in another way, or more is done with their outputs, or they do other things inside.
        called: paths of the modules that are called in eval mode, without gradients and with them.
        overwritten: paths of the modules of which no gradient can go through, since their input is written later.
    """

    changing: dict[str, str]
    called: tuple[set[str], set[str]]
    overwritten: set[str]


def seen_in_runs(
    model: nn.Module,
    inputs: Inputs,
    read: Collection[str],
    made: Collection[str],
    maps: Collection[str] = (),
    others: Collection[str] = (),
) -> Seen | None:
    """Run a model several times on fake tensors, and compare what it does around some modules. None if it cannot run.

    The runs: in eval mode without gradients, which is the one that others are compared with, the same again, with
    gradients, in training mode, and for a batch twice as large. A factor of noise, as dropout has it, is left out.
    Numbers that the code draws from Python's or NumPy's generators on the way count, too: what depends on them cannot
    be seen.

    Args:
        model: it stays as it was.
        inputs: of its forward.
        read: paths of the modules whose inputs are followed.
        made: paths of the modules of whose outputs it is known what reads them.
        maps: paths of the modules that shall do the same inside; those among `read` and `made`. Layers of torch's own
            are taken to do so, and so are those with parametrised weights, which are made plain.
        others: paths of further modules, of which it is only known whether their inputs are written later.

    Examples:
        >>> import torch
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.act, self.last = nn.ReLU(), nn.Linear(4, 1)
        ...     def forward(self, x):
        ...         h = self.act(x)
        ...         return self.last(h * 2 if self.training else h)
        >>> seen_in_runs(Net(), ((torch.ones(2, 4),), {}), ["act", "last"], []).changing
        {'last': 'in training mode its input is computed in another way (mul 2)'}
    """
    own = [path for path in maps if not _plain(model.get_submodule(path))]
    on_cpu = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    for real in (False, True):
        try:
            with fake_runs(model, inputs, real=real, on_cpu=on_cpu) as run:
                return _compared(Follower(model, read, (*made, *others)), run, made, own, computes=real)
        except Exception as error:  # whatever the model's own code raises
            _log.debug("no run to see the ways between modules: %s", error)
    return None


def _compared(
    follow: Follower, run: FakeRun, made: Collection[str], own: Collection[str], *, computes: bool
) -> Seen | None:
    """What the first run shows, and those of other kinds; runs that compute leave statistics and memory alone."""
    first = follow.ways(run)
    found = {path: _DRAWN for path, ways in first.inputs.items() if any(way.drawn for way in ways)}
    others = [_run(follow, run, kind) for kind in (_COMPUTING if computes else _TOGETHER)]
    same = all(other is not None and not _differing(first, other, made, own) for other in others)
    apart = [] if same else [(when, kind) for when, kind in _APART if not computes or kind in _COMPUTING]
    each = [(when, _run(follow, run, kind)) for when, kind in apart]
    for when, other in [*each, *(("at another call", other) for other in others)]:
        for path, why in (_differing(first, other, made, own) if other is not None else {}).items():
            found.setdefault(path, f"{when} {why}")
    with_gradients = dict(each).get("with gradients") or others[0]
    if with_gradients is None:
        return None
    runs = [first, *(other for other in (*others, *(other for _, other in each)) if other is not None)]
    return Seen(found, (first.called, with_gradients.called), set[str]().union(*(one.overwritten for one in runs)))


def _run(follow: Follower, run: FakeRun, kind: dict[str, bool]) -> Ways | None:
    """What a run shows; None if it does not work."""
    try:
        return follow.ways(run, **kind)
    except Exception as error:  # a batch of one in training mode, for example
        _log.debug("no run with %s: %s", kind, error)
        return None


def _differing(first: Ways, other: Ways, made: Collection[str], own: Collection[str]) -> dict[str, str]:
    """The modules that both runs call, and around which they do other things, with what these are."""
    found: dict[str, str] = {}
    for path, ways in first.inputs.items():
        if path in other.inputs and other.inputs[path] != ways:
            found[path] = f"its input is computed in another way ({_what(ways, other.inputs[path])})"
    for path in own:
        if path in first.works and path in other.works and other.works[path] != first.works[path]:
            found.setdefault(path, "it computes in another way")
    for path in made:
        more = other.uses.get(path, Counter()) - first.uses.get(path, Counter())
        if more and path in first.uses:
            found.setdefault(path, f"its output is also read by {next(iter(more))}")
    return found


def _plain(module: nn.Module) -> bool:
    return type(module).forward.__module__.partition(".")[0] == "torch" or is_parametrized(module)


def _what(first: list[Derivation], other: list[Derivation]) -> str:
    """The first op that one of two runs has and the other has not."""
    if len(first) != len(other):
        return f"{len(other)} calls, not {len(first)}"
    for a, b in zip(first, other, strict=True):
        odd = [op for op in b.ops if op not in a.ops] or [op for op in a.ops if op not in b.ops]
        if a != b:
            return " ".join(str(part) for part in (odd[0][0], *odd[0][1])) if odd else "other values"
    return "other values"

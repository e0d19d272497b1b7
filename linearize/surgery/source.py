"""Redirect activation calls in the source of a module's methods. Everything else stays as its author wrote it.

Control flow, attributes that are read and written, decorators and closures stay. Only the expression of a call changes,
from `F.gelu(x)` to `self.gelu_0(x)`. A run shows which call in the source makes which call in the captured graph
(`watch.py`). So the spelling of a call does not matter: `F.gelu`, `self.acts[0]`, `getattr(F, self.kind)`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from linearize.errors import ConvertError
from linearize.surgery.compiled import CallNumbering, CompiledMethod, compiled, refused
from linearize.surgery.layers import activate, pick

Watch = Callable[[str, int, Any], Any]
"""Given a method's name, the number of a call in it, and what is called: what is called instead."""

_WATCH, _ACTIVATE, _PICK = (f"_linearize_{name}" for name in ("watch", "activate", "pick"))
# They look at the frame that calls them.
_FRAMED = frozenset(("super", "locals", "vars", "globals", "dir", "eval", "exec"))


@dataclass(frozen=True)
class Place:
    """A call in the source of a module's class.

    Attributes:
        method: name of the method.
        index: number of the call in the body of the method, in order of evaluation.
        callee: the source of what is called, by which a file is refused whose source is another one.
        reads: what is activated: "0" for the first argument, "self" for the tensor whose method is called, or the
            name of a keyword argument.
        child: whether it is a child of the module that is called, not a function.
        arguments: of an activation function, the names of its arguments after the input, in order; "" for those that
            make no difference (`inplace`).
    """

    method: str
    index: int
    callee: str
    reads: str
    child: bool = False
    arguments: tuple[str, ...] = ()


def methods_with(module: nn.Module, places: Sequence[tuple[Place, str, str]]) -> dict[str, CompiledMethod]:
    """Methods of a module's class with some calls redirected to children.

    Args:
        module: whose class has the methods.
        places: for each call its place, what is called there (a torch function's name, or the path of a child), and
            the name of the child that is called instead.

    Raises:
        ConvertError: a method has no source, or not that call.
    """
    found: dict[str, CompiledMethod] = {}
    known = set(_methods(type(module)))
    for name in dict.fromkeys(place.method for place, _, _ in places):
        if name not in known:
            raise refused(module, f"it has no method {name!r:.80} of its own")
        redirect = _Redirect({entry[0].index: entry for entry in places if entry[0].method == name})
        found[name] = compiled(module, name, redirect, {_ACTIVATE: activate, _PICK: pick})
        if redirect.waiting:
            missing = next(iter(redirect.waiting.values()))[0].callee
            raise refused(module, f"its {name} does not call {missing} where it did")
    return found


def watched_methods(module: nn.Module, watch: Watch) -> dict[str, CompiledMethod]:
    """The methods of a module's class, made to ask `watch` at each of their calls what to call."""
    found: dict[str, CompiledMethod] = {}
    for name in _methods(type(module)):
        marking = _Mark(name)
        try:
            marked = compiled(module, name, marking, {_WATCH: watch})
        except ConvertError:  # no source to read, so nothing to redirect there
            continue
        if marking.count:
            found[name] = marked
    return found


def has_source(module: nn.Module, name: str = "forward") -> bool:
    """True if the source of a method can be read."""
    try:
        compiled(module, name, CallNumbering(), {})
    except ConvertError:
        return False
    return True


def callee_of(module: nn.Module, name: str, index: int) -> str | None:
    """The function that a method calls at a place, by its source; None if there is no such call."""
    asking = _Ask(index)
    compiled(module, name, asking, {})
    return asking.found


def _methods(cls: type) -> Iterator[str]:
    """Names of the methods of a module class that are its own, or of classes that it derives from, up to torch's."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.partition(".")[0] == "torch":
            continue
        names.update(dict.fromkeys(name for name, value in vars(base).items() if inspect.isfunction(value)))
    return iter(names)


class _Mark(CallNumbering):
    """Asks what to call at each call."""

    def __init__(self, method: str) -> None:
        self.method = method

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: N802 - the syntax tree's name
        self.generic_visit(node)
        index, self.count = self.count, self.count + 1
        if isinstance(node.func, ast.Name) and node.func.id in _FRAMED:
            return node
        given = [ast.Constant(self.method), ast.Constant(index), node.func]
        return ast.Call(ast.Call(ast.Name(_WATCH, ast.Load()), given, []), node.args, node.keywords)


class _Ask(CallNumbering):
    """Remembers what one call calls."""

    def __init__(self, index: int) -> None:
        self.index, self.found = index, None if index < 0 else ""

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: N802 - the syntax tree's name
        callee = ast.unparse(node.func)
        self.generic_visit(node)
        self.count += 1
        self.found = callee if self.count - 1 == self.index else self.found
        return node


class _Redirect(CallNumbering):
    """Turns some calls into calls of children."""

    def __init__(self, waiting: dict[int, tuple[Place, str, str]]) -> None:
        self.waiting = dict(waiting)

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: N802 - the syntax tree's name
        callee = ast.unparse(node.func)  # before calls inside of it are redirected
        self.generic_visit(node)
        self.count += 1
        place, target, child = self.waiting.get(self.count - 1, (None, "", ""))
        source = _source(node, place.reads) if place is not None and place.callee == callee and self.me else None
        if place is None or source is None:
            return node
        called: ast.expr = ast.Attribute(ast.Name(self.me, ast.Load()), child, ast.Load())
        live = _live(node, place)
        if not self._fixed(node.func, place, target):
            if len(node.args) + len(node.keywords) > 1:
                return node  # whatever else is called then would get other arguments
            called = ast.Call(ast.Name(_PICK, ast.Load()), [called, self._expected(place, target), node.func], [])
        del self.waiting[self.count - 1]
        if not live:
            return ast.Call(called, [source], [])
        return ast.Call(ast.Name(_ACTIVATE, ast.Load()), [called, source], live)

    def _fixed(self, func: ast.expr, place: Place, target: str) -> bool:
        """Whether the same is called each time: a child, a function by its global name, a method of the tensor."""
        if place.reads == "self" or place.callee == f"{self.me}.{target}":
            return True
        root = func
        while isinstance(root, ast.Attribute):
            root = root.value
        return isinstance(root, ast.Name) and root.id not in self.locals

    def _expected(self, place: Place, target: str) -> ast.expr:
        """The child of the module, or the name of the torch function, that is called at a place."""
        if not place.child:
            return ast.Constant(target)
        found: ast.expr = ast.Name(self.me, ast.Load())
        get = ast.Attribute(found, "get_submodule", ast.Load())
        return ast.Call(get, [ast.Constant(target)], [])


def _source(node: ast.Call, reads: str) -> ast.expr | None:
    """The expression that is activated; None if it cannot be told from the source."""
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(k.arg is None for k in node.keywords):
        return None
    if reads == "self":
        return node.func.value if isinstance(node.func, ast.Attribute) else None
    if reads == "0":
        return node.args[0] if node.args else None
    return next((keyword.value for keyword in node.keywords if keyword.arg == reads), None)


def _live(node: ast.Call, place: Place) -> list[ast.keyword]:
    """The arguments of an activation function that are not written out: their values may be others at each call."""
    rest = node.args[1:] if place.reads == "0" else node.args
    given = [ast.keyword(name, value) for name, value in zip(place.arguments, rest, strict=False) if name]
    given += [ast.keyword(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg in place.arguments]
    return [keyword for keyword in given if not _written_out(keyword.value)]


def _written_out(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return False
    return True

"""Redirect activation calls in the source of a module's methods, where symbolic tracing cannot follow its forward.

Control flow, loops and decorators stay as they are written: only the expression of a call changes, from `F.gelu(x)` to
`self.gelu_0(x)`. Which call of the source makes which call of the captured graph is seen in a run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

from torch import nn

from linearize.errors import ConvertError

Method = Callable[..., Any]
Place = tuple[str, int]
"""A method's name, and the position of a call among those of one target in its source, in order of evaluation."""

_NOTE, _FACTORY = "_linearize_note", "_linearize_factory"
_REMEDY = "Make the activation a module of its own, called once, and convert again."


def methods_with(module: nn.Module, places: Sequence[tuple[Place, str, str]]) -> dict[str, Method]:
    """Methods of a module's class with some calls redirected to children.

    Args:
        module: whose class has the methods.
        places: for each call its place, the ``target`` that is called (a function's name, or a child), and the name
            of the child that is called instead.

    Raises:
        ConvertError: a method has no source, or not that call.
    """
    found: dict[str, Method] = {}
    known = set(_methods(type(module)))
    for name in dict.fromkeys(place[0] for place, _, _ in places):
        if name not in known:
            raise _refused(module, f"it has no method {name!r:.80} of its own")
        redirect = _Redirect([(place[1], target, child) for place, target, child in places if place[0] == name])
        found[name] = _compiled(module, name, redirect, None)
        if redirect.waiting:
            raise _refused(module, f"its {name} does not call {redirect.waiting[0][1]} that often")
    return found


def noting_methods(module: nn.Module, target: str, note: Callable[[str, int], None]) -> dict[str, Method]:
    """The methods that call `target`, made to say so each time, once the call has returned."""
    found: dict[str, Method] = {}
    for name in _methods(type(module)):
        marking = _Mark(name, target)
        try:
            marked = _compiled(module, name, marking, note)
        except ConvertError:  # no source to read, so nothing to redirect there
            continue
        if marking.count:
            found[name] = marked
    return found


def _methods(cls: type) -> Iterator[str]:
    """Names of the methods of a module class that are its own, or of classes that it derives from, up to torch's."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.partition(".")[0] == "torch":
            continue
        names.update(dict.fromkeys(name for name, value in vars(base).items() if inspect.isfunction(value)))
    return iter(names)


def _compiled(module: nn.Module, name: str, change: ast.NodeTransformer, note: Any) -> Method:
    """One method of the module's class, its source changed and compiled where the original was."""
    cls = type(module)
    function = inspect.unwrap(getattr(cls, name))
    if not isinstance(function, FunctionType):
        raise _refused(module, f"its {name} is no plain function")
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines))), first - 1)
    except (OSError, TypeError, SyntaxError) as error:
        raise _refused(module, f"the source of its {name} cannot be read") from error
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef) or tree.body[0].name != function.__name__:
        raise _refused(module, f"the source of its {name} is no plain function")
    if any(_mangled(node) for node in ast.walk(tree)):
        raise _refused(module, f"its {name} uses names that are private to the class")
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    whole = ast.parse(f"def {_FACTORY}({', '.join([_NOTE, *cells])}): pass")
    factory = whole.body[0]
    assert isinstance(factory, ast.FunctionDef)  # noqa: S101 -- it was written just above
    definition = change.visit(tree.body[0])
    factory.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    made: dict[str, Any] = {}
    # With the file and the lines of the original, which decorators and tracebacks look at.
    code = compile(ast.fix_missing_locations(whole), inspect.getsourcefile(function) or "<unknown>", "exec")
    try:
        # The source is that of the installed class; only calls of activations in it were redirected.
        exec(code, function.__globals__, made)  # noqa: S102
        new: Method = made[_FACTORY](note, *(cell.cell_contents for cell in cells.values()))
    except Exception as error:  # the class's own decorators run again
        raise _refused(module, f"its {name} cannot be compiled again ({type(error).__name__}: {error})") from error
    return new


def _mangled(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.startswith("__") and not name.endswith("__")


class _Calls(ast.NodeTransformer):
    """Visits calls in the order in which they are evaluated: arguments first."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return self.seen(node)

    def seen(self, node: ast.Call) -> ast.AST:
        """What stands for the call from now on."""
        return node


class _Mark(_Calls):
    """Wraps each call of a target: it is noted when it has returned."""

    def __init__(self, method: str, target: str) -> None:
        self.method, self.target, self.count = method, target, 0

    def seen(self, node: ast.Call) -> ast.AST:
        if called(node) != self.target:
            return node
        note = ast.Call(ast.Name(_NOTE, ast.Load()), [ast.Constant(self.method), ast.Constant(self.count)], [])
        self.count += 1
        pair = ast.Tuple([node, note], ast.Load())
        return ast.Subscript(pair, ast.Constant(0), ast.Load())


class _Redirect(_Calls):
    """Turns some calls into calls of children."""

    def __init__(self, wanted: list[tuple[int, str, str]]) -> None:
        self.waiting = list(wanted)
        self.counts: dict[str, int] = {}

    def seen(self, node: ast.Call) -> ast.AST:
        target = called(node)
        index = self.counts.get(target, 0)
        self.counts[target] = index + 1
        child = next((child for at, name, child in self.waiting if (at, name) == (index, target)), None)
        source = _source(node)
        if child is None or source is None:
            return node
        self.waiting = [entry for entry in self.waiting if entry[2] != child]
        return ast.Call(ast.Attribute(ast.Name("self", ast.Load()), child, ast.Load()), [source], [])


def called(node: ast.Call) -> str:
    """What a call in the source calls: the path of a child, or a function's name without the in-place underscore.

    Example:
        >>> [called(ast.parse(code).body[0].value) for code in ("F.gelu(x)", "self.mlp.act(x)", "x.relu_()")]
        ['gelu', 'mlp.act', 'relu']
    """
    path = ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ""
    if path.startswith("self."):
        return path.removeprefix("self.")
    return path.rpartition(".")[2].rstrip("_")


def _source(node: ast.Call) -> ast.expr | None:
    """The expression that is activated; None if it cannot be told from the source."""
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(k.arg is None for k in node.keywords):
        return None
    if node.args and not isinstance(node.args[0], ast.Constant):
        return node.args[0]
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    named = given.get("input", given.get("x"))
    if named is None and isinstance(node.func, ast.Attribute):
        return node.func.value  # a method of the tensor
    return named


def _refused(module: nn.Module, found: str) -> ConvertError:
    return ConvertError(type(module).__name__, found, _REMEDY)

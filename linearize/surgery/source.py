"""Redirect activation calls in the source of a module's methods: everything else stays as its author wrote it.

Control flow, attributes that are read and written, decorators and closures stay: only the expression of a call changes,
from `F.gelu(x)` to `self.gelu_0(x)`. Which call of the source makes which call of the captured graph is seen in a run
(`watch.py`), so that it does not matter how a function is called: `F.gelu`, `self.acts[0]`, `getattr(F, self.kind)`.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from linearize.errors import ConvertError
from linearize.surgery.layers import activate, pick

Method = Callable[..., Any]
Watch = Callable[[str, int, Any], Any]
"""Given a method's name, the number of a call in it, and what is called: what is called instead."""

_WATCH, _ACTIVATE, _PICK, _FACTORY = (f"_linearize_{name}" for name in ("watch", "activate", "pick", "factory"))
_REMEDY = "Make the activation a module of its own, called once, and convert again."
# They look at the frame that calls them.
_FUTURES = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
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


def methods_with(module: nn.Module, places: Sequence[tuple[Place, str, str]]) -> dict[str, Method]:
    """Methods of a module's class with some calls redirected to children.

    Args:
        module: whose class has the methods.
        places: for each call its place, what is called there (a torch function's name, or the path of a child), and
            the name of the child that is called instead.

    Raises:
        ConvertError: a method has no source, or not that call.
    """
    found: dict[str, Method] = {}
    for name in dict.fromkeys(place.method for place, _, _ in places):
        redirect = _Redirect({entry[0].index: entry for entry in places if entry[0].method == name})
        found[name] = _compiled(module, name, redirect, {_ACTIVATE: activate, _PICK: pick})
        if redirect.waiting:
            missing = next(iter(redirect.waiting.values()))[0].callee
            raise _refused(module, f"its {name} does not call {missing} where it did")
    return found


def watched_methods(module: nn.Module, watch: Watch) -> dict[str, Method]:
    """The methods of a module's class, made to ask `watch` at each of their calls what to call."""
    found: dict[str, Method] = {}
    for name in _methods(type(module)):
        marking = _Mark(name)
        try:
            marked = _compiled(module, name, marking, {_WATCH: watch})
        except ConvertError:  # no source to read, so nothing to redirect there
            continue
        if marking.count:
            found[name] = marked
    return found


def has_source(module: nn.Module, name: str = "forward") -> bool:
    """Whether the source of a method can be read."""
    try:
        _compiled(module, name, _Calls(), {})
    except ConvertError:
        return False
    return True


def callee_of(module: nn.Module, name: str, index: int) -> str | None:
    """What a method calls at a place, as its source has it; None if there is no such call."""
    asking = _Ask(index)
    _compiled(module, name, asking, {})
    return asking.found


def _methods(cls: type) -> Iterator[str]:
    """Names of the methods of a module class that are its own, or of classes that it derives from, up to torch's."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.partition(".")[0] == "torch":
            continue
        names.update(dict.fromkeys(name for name, value in vars(base).items() if inspect.isfunction(value)))
    return iter(names)


def _compiled(module: nn.Module, name: str, change: ast.NodeTransformer, given: dict[str, Any]) -> Method:
    """One method of the module's class with its source changed: the same globals, closures, defaults, decorators.

    `given` are values that the changed source reads under names of our own.
    """
    method = getattr(type(module), name, None)
    function = inspect.unwrap(method) if callable(method) else None
    if not isinstance(method, FunctionType) or not isinstance(function, FunctionType):
        raise _refused(module, f"its {name} is no plain function")
    definition = _definition(module, function)
    _Unmangle(_class_of(module, name)).visit(definition)
    try:
        if not _words(_code(function, definition, ())) <= _words(function.__code__):
            raise _refused(module, f"the source of its {name} is not what runs")
        if isinstance(change, _Calls):
            change.me, change.locals = _first_parameter(definition), frozenset(function.__code__.co_varnames)
            change.locals |= {*function.__code__.co_cellvars, *function.__code__.co_freevars}
        definition.body = [change.visit(statement) for statement in definition.body]
        code = _code(function, definition, given)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise _refused(module, f"the source of its {name} cannot be compiled again ({error})") from error
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells.update({key: CellType(value) for key, value in given.items()})
    new = FunctionType(
        code.replace(co_qualname=function.__code__.co_qualname),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[free_name] for free_name in code.co_freevars),
    )
    return _rewrapped(module, name, method, function, _like(function, new))


def _code(function: FunctionType, definition: ast.FunctionDef, given: Iterable[str]) -> CodeType:
    """The code of a definition, compiled as that of the function was: with its file, its lines, its free names."""
    free = [*given, *function.__code__.co_freevars]
    factory = ast.parse(f"def {_FACTORY}({', '.join(free)}): pass")
    assert isinstance(factory.body[0], ast.FunctionDef)  # noqa: S101 -- it was written just above
    factory.body[0].body = [definition]
    flags = function.__code__.co_flags & _FUTURES
    ast.fix_missing_locations(factory)
    whole = compile(factory, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    return _inner(_inner(whole, _FACTORY), function.__name__)


def _words(code: CodeType) -> set[str]:
    """Names and constants of a code: more of them in a file than in what was loaded from it tell that it has changed."""
    constants = [repr(value) for value in code.co_consts if not isinstance(value, CodeType)]
    return {*code.co_names, *code.co_varnames, *constants}


def _definition(module: nn.Module, function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function, with the line numbers of its file."""
    name = function.__name__
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines))), first - 1)
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise _refused(module, f"the source of its {name} cannot be read") from error
    definition = tree.body[0] if len(tree.body) == 1 else None
    if not isinstance(definition, ast.FunctionDef) or definition.name != name:
        raise _refused(module, f"the source of its {name} is no plain function")
    definition.decorator_list = []
    return definition


def _class_of(module: nn.Module, name: str) -> str:
    return next(cls.__name__ for cls in type(module).__mro__ if name in vars(cls))


def _first_parameter(definition: ast.FunctionDef) -> str:
    """The name that the method gives to its object, mostly `self`; nothing if it is used for something else, too."""
    parameters = [*definition.args.posonlyargs, *definition.args.args]
    name = parameters[0].arg if parameters else ""
    for node in ast.walk(ast.Module(definition.body, [])):
        bound = (node.id if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) else None,)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            bound = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        if name in bound:
            return ""
    return name


def _inner(code: CodeType, name: str) -> CodeType:
    return next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)


def _like(old: FunctionType, new: FunctionType) -> FunctionType:
    """A function with everything that hangs on another one: its keyword defaults, annotations and attributes."""
    new.__kwdefaults__ = old.__kwdefaults__
    new.__annotations__ = old.__annotations__
    new.__doc__, new.__module__, new.__qualname__ = old.__doc__, old.__module__, old.__qualname__
    vars(new).update(vars(old))
    return new


def _rewrapped(module: nn.Module, name: str, outer: Any, old: FunctionType, new: FunctionType) -> FunctionType:
    """The decorated method around another function: the same decorators, with whatever they hold and count."""
    if outer is old:
        return new
    inner = _rewrapped(module, name, getattr(outer, "__wrapped__", None), old, new) if outer is not None else None
    held = getattr(outer, "__wrapped__", None)
    cells = list(getattr(outer, "__closure__", None) or ())
    found = [position for position, cell in enumerate(cells) if _content(cell) is held]
    if not isinstance(outer, FunctionType) or not found or inner is None:
        raise _refused(module, f"a decorator of its {name} hides the function that it wraps")
    for position in found:
        cells[position] = CellType(inner)
    made = FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, tuple(cells))
    made = _like(outer, made)
    made.__wrapped__ = inner  # type: ignore[attr-defined]
    return made


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


class _Unmangle(ast.NodeTransformer):
    """Writes names that are private to a class in full, since the changed method is compiled outside of it."""

    def __init__(self, cls: str) -> None:
        self.prefix = f"_{cls.lstrip('_')}"

    def _full(self, name: str) -> str:
        return f"{self.prefix}{name}" if name.startswith("__") and not name.endswith("__") else name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        node.attr = self._full(node.attr)
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._full(node.id)
        return node


class _Calls(ast.NodeTransformer):
    """Visits calls in the order in which they are evaluated, arguments first, and numbers them."""

    me = "self"
    locals: frozenset[str] = frozenset()
    count = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        self.count += 1
        return node


class _Mark(_Calls):
    """Asks what to call at each call."""

    def __init__(self, method: str) -> None:
        self.method = method

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        index, self.count = self.count, self.count + 1
        if isinstance(node.func, ast.Name) and node.func.id in _FRAMED:
            return node
        given = [ast.Constant(self.method), ast.Constant(index), node.func]
        return ast.Call(ast.Call(ast.Name(_WATCH, ast.Load()), given, []), node.args, node.keywords)


class _Ask(_Calls):
    """Remembers what one call calls."""

    def __init__(self, index: int) -> None:
        self.index, self.found = index, None if index < 0 else ""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        callee = ast.unparse(node.func)
        self.generic_visit(node)
        self.count += 1
        self.found = callee if self.count - 1 == self.index else self.found
        return node


class _Redirect(_Calls):
    """Turns some calls into calls of children."""

    def __init__(self, waiting: dict[int, tuple[Place, str, str]]) -> None:
        self.waiting = dict(waiting)

    def visit_Call(self, node: ast.Call) -> ast.AST:
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


def _refused(module: nn.Module, found: str) -> ConvertError:
    return ConvertError(type(module).__name__, found, _REMEDY)

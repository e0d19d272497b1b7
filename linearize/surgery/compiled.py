"""Compile a method of a module's class again, with its source changed and everything else kept.

The new method has the same globals, closure variables, defaults and decorators, and shares what they hold or count.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from linearize.errors import ConvertError

CompiledMethod = Callable[..., Any]

_FACTORY = "_linearize_factory"
_REMEDY = "Make the activation a module of its own, called once, and convert again."
_FUTURES = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


class CallNumbering(ast.NodeTransformer):
    """Visits calls in the order in which they are evaluated, arguments first, and numbers them.

    Attributes:
        me: the name that the method gives to its object; nothing if it is used for something else, too.
        locals: the method's own variables.
        count: the calls seen so far.
    """

    me = "self"
    locals: frozenset[str] = frozenset()
    count = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The expression that replaces a call: here the call itself."""
        self.generic_visit(node)
        self.count += 1
        return node


def compiled(module: nn.Module, name: str, change: ast.NodeTransformer, given: dict[str, Any]) -> CompiledMethod:
    """One method of the module's class with its source changed: the same globals, closures, defaults, decorators.

    `given` are values that the changed source reads under names of our own.
    """
    method = getattr(type(module), name, None)
    function = inspect.unwrap(method) if callable(method) else None
    if not isinstance(method, FunctionType) or not isinstance(function, FunctionType):
        raise refused(module, f"its {name} is no plain function")
    definition = _definition(module, function)
    _Unmangle(_class_of(module, name)).visit(definition)
    try:
        if not _words(_code(function, definition, ())) <= _words(function.__code__):
            raise refused(module, f"the source of its {name} is not what runs")
        if isinstance(change, CallNumbering):
            change.me, change.locals = _first_parameter(definition), frozenset(function.__code__.co_varnames)
            change.locals |= {*function.__code__.co_cellvars, *function.__code__.co_freevars}
        definition.body = [change.visit(statement) for statement in definition.body]
        code = _code(function, definition, given)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise refused(module, f"the source of its {name} cannot be compiled again ({error})") from error
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
    """Names and constants of a code. A file that has more than what was loaded from it has changed since."""
    constants = [repr(value) for value in code.co_consts if not isinstance(value, CodeType)]
    return {*code.co_names, *code.co_varnames, *constants}


def _definition(module: nn.Module, function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function, with the line numbers of its file."""
    name = function.__name__
    try:
        lines, first = inspect.getsourcelines(function)
        # A method stands in a block: with less indentation, its texts of several lines would be other texts.
        block = lines[0][:1].isspace()
        tree = ast.parse("".join(["if True:\n"] * block + lines))
        ast.increment_lineno(tree, first - 1 - block)
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise refused(module, f"the source of its {name} cannot be read") from error
    body = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    definition = body[0] if len(body) == 1 else None
    if not isinstance(definition, ast.FunctionDef) or definition.name != name:
        raise refused(module, f"the source of its {name} is no plain function")
    definition.decorator_list = []
    return definition


def _class_of(module: nn.Module, name: str) -> str:
    return next(cls.__name__ for cls in type(module).__mro__ if name in vars(cls))


def _first_parameter(definition: ast.FunctionDef) -> str:
    """The name that the method gives to its object, mostly `self`; nothing if it is used for something else, too."""
    parameters = [*definition.args.posonlyargs, *definition.args.args]
    name = parameters[0].arg if parameters else ""
    for node in ast.walk(ast.Module(definition.body, [])):
        bound: tuple[str, ...] = ()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound = (node.id,)
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
        raise refused(module, f"a decorator of its {name} hides the function that it wraps")
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


def refused(module: nn.Module, found: str) -> ConvertError:
    """The error of a method that cannot be changed."""
    return ConvertError(type(module).__name__, found, _REMEDY)

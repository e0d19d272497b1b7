"""Run a model's own code without leaving a trace: in its modules, in its caches, in random numbers, or between threads.

Attributes are compared by type only. Touching an attribute of an unknown object could import a library.
"""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from linearize.graph.state import interrupt_behind, same_modes, same_random_numbers, to_the_end
from linearize.tensors import noted_values, write_back

ALONE = threading.RLock()
"""Held by whoever captures, traces or dry-runs: torch.export keeps global state, and modules change for a while."""

_CONTAINERS = (dict, list, set, deque)
# Whose own methods are used, whatever a class derived from it makes of them. An OrderedDict keeps its order beside the
# dict that it is: what a dict's methods take out stays in that order.
_KINDS: tuple[Any, ...] = (OrderedDict, *_CONTAINERS)
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, FunctionType, BuiltinFunctionType)
_FOREIGN = (FakeTensor, FunctionalTensor, fx.Proxy, fx.Node)
_MOST = 50_000  # containers looked at, so that a huge structure in an attribute costs no minutes
_OF_THE_IMPORT = ("__builtins__", "__loader__", "__spec__")  # a loader may hold the whole program


@contextmanager
def untouched(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """A model in eval mode (or in training mode); afterwards its modules have the modes and attributes they had.

    Whatever a forward leaves on its module (a feature map, a counter, an entry in a list) would be a fake tensor here,
    or would count a call that nobody made; values that it writes into buffers and other tensors that the modules hold
    (parameters excepted) are taken back. Tensors that a function remembers (`functools.lru_cache`) are forgotten
    before and after; what lies in class attributes and globals is put back where a fake tensor got into it. Random
    numbers go on where they were. One thread at a time.

    Examples:
        >>> layer = nn.Dropout()
        >>> with untouched(layer):
        ...     layer.seen = layer.training
        >>> layer.training, hasattr(layer, "seen")
        (True, False)
    """
    with ALONE, same_random_numbers(), same_modes():
        modules = list(model.modules())
        held = [(module, module.training, dict(vars(module))) for module in modules]
        inside = _contents(vars(module) for module in modules)
        holders = [*(vars(module) for module in modules), *(container for container, _ in inside)]
        values = noted_values(value for holder in holders for value in _values(holder))
        kinds = {cls for module in modules for cls in type(module).__mro__ if cls is not object}
        own = [(cls, dict(vars(cls))) for cls in kinds if not _of_torch(cls)]
        outside = _contents([[attributes for _, attributes in own], _globals(attributes for _, attributes in own)])
        cells = [(cell, cell.cell_contents) for cell in _cells(own)]
        memories = _memories(modules)
        _forget_tensors(memories)

        def put_back() -> None:
            for module, mode, attributes in held:
                vars(module).clear()
                vars(module).update(attributes)
                module.training = mode  # a scripted module does not keep it among its attributes
            for container, content in inside:
                _put_back(container, content)
            write_back(values)
            for container, content in outside:
                _weed(container, content)
            for cell, content in cells:
                if not (_full(cell) and cell.cell_contents is content):
                    cell.cell_contents = content  # a decorator that counts calls
            for cls, attributes in own:
                for name in [name for name, value in vars(cls).items() if _is_foreign(value)]:
                    setattr(cls, name, attributes[name]) if name in attributes else delattr(cls, name)
            _forget_tensors(memories)

        try:
            for module in modules:
                module.training = training
            yield
        except Exception as error:
            if (stopped := interrupt_behind(error)) is not None:
                raise stopped from None
            raise
        finally:
            to_the_end(put_back)


def _functions(places: Iterable[Any]) -> list[FunctionType]:
    """The functions in some dicts, and those that they wrap."""
    found = [_plain_function(value) for place in places for value in list(place.values())]
    found = [value for value in found if type(value) is FunctionType]
    for function in found:  # grows on the way
        inner = vars(function).get("__wrapped__")
        found += [inner] if type(inner) is FunctionType and inner not in found else []
    return found


def _globals(attributes: Iterable[Any]) -> list[dict[str, Any]]:
    """The globals of the files in which classes stand, each once."""
    return list({id(f.__globals__): f.__globals__ for f in _functions(attributes)}.values())


def _cells(own: Iterable[tuple[type, Any]]) -> list[Any]:
    """The variables that methods share with the code around them."""
    cells = [cell for f in _functions(attributes for _, attributes in own) for cell in f.__closure__ or ()]
    return [cell for cell in {id(cell): cell for cell in cells}.values() if _full(cell)]


def _of_torch(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] == "torch"


def _contents(roots: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The containers that are held by others, nested ones and attributes of plain objects too, each with a copy."""
    found: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    plain: set[type] = set()  # a list of a million numbers is looked through by this alone
    waiting = deque(roots)
    while waiting and len(found) < _MOST:
        holder = waiting.popleft()
        leave = {id(dict.get(holder, name)) for name in _OF_THE_IMPORT} if issubclass(type(holder), dict) else set()
        for value in _values(holder):
            if type(value) in plain or id(value) in leave:
                continue
            if _is_plain(type(value)):
                plain.add(type(value))
                continue
            container = _container(value)
            if container is None or id(container) in seen:
                continue
            seen.add(id(container))
            waiting.append(container)
            if not issubclass(type(container), tuple):
                found.append((container, copy.copy(container)))
    return found


def _is_plain(kind: type) -> bool:
    """Whether values of this type hold nothing: numbers, texts, functions; modules have their own place."""
    held = issubclass(kind, (*_CONTAINERS, tuple))
    return not held and (issubclass(kind, (*_PLAIN, nn.Module, Tensor)) or _of_torch(kind))


def _container(value: Any) -> Any:
    """What a value that is not plain holds others in: itself, or the dict of its attributes, or None."""
    if issubclass(type(value), (*_CONTAINERS, tuple)):
        return value
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if type(attributes) is dict else None


def _values(container: Any) -> list[Any]:
    """What is in a container, whatever its class says about iterating over it."""
    kind = type(container)
    if issubclass(kind, dict):
        return list(dict.values(container))
    for base in (list, tuple, set, deque):
        if issubclass(kind, base):
            return list(base.__iter__(container))
    return []


def _put_back(container: Any, content: Any) -> None:
    if _same(container, content):
        return
    _refill(container, content)


def _weed(container: Any, content: Any) -> None:
    """Take fake tensors out again. Other threads may use the container: all else that has happened to it stays."""
    values = _values(container)
    if not any(_is_foreign(value) for value in values):
        return
    kind = _kind(container)
    if issubclass(kind, dict):
        for key in [key for key, value in kind.items(container) if _is_foreign(value)]:
            kind.__setitem__(container, key, content[key]) if key in content else kind.__delitem__(container, key)
        return
    kept = content if len(values) == len(content) else [value for value in values if not _is_foreign(value)]
    _refill(container, kept)


def _kind(container: Any) -> Any:
    return next(base for base in _KINDS if issubclass(type(container), base))


def _refill(container: Any, content: Any) -> None:
    kind = _kind(container)
    kind.clear(container)
    kind.extend(container, content) if kind in (list, deque) else kind.update(container, content)


def _same(container: Any, content: Any) -> bool:
    a, b = _values(container), _values(content)
    same_keys = not issubclass(type(container), dict) or list(dict.keys(container)) == list(dict.keys(content))
    return len(a) == len(b) and same_keys and all(x is y for x, y in zip(a, b, strict=True))


def _is_foreign(value: Any) -> bool:
    return issubclass(type(value), _FOREIGN) or (type(value) is Tensor and value.is_meta)


def _memories(modules: Iterable[nn.Module]) -> list[Any]:
    """What a model's methods, and functions beside its classes, remember results in; also inside a wrapper."""
    modules = list(modules)
    kinds = {cls for module in modules for cls in type(module).__mro__}
    places: list[Any] = [vars(holder) for holder in (*modules, *kinds)]
    places += _globals(map(vars, kinds))
    held = [_plain_function(value) for place in places for value in list(place.values())]
    held += [
        cell.cell_contents
        for value in held
        if type(value) is FunctionType
        for cell in value.__closure__ or ()
        if _full(cell)
    ]
    return [value for value in held if issubclass(type(value), functools._lru_cache_wrapper)]


def _plain_function(value: Any) -> Any:
    return value.__func__ if type(value) in (MethodType, staticmethod, classmethod) else value


def _forget_tensors(memories: list[Any]) -> None:
    """Clear the caches that hold a tensor; a tokenizer or a configuration that a function remembers stays."""
    for memory in memories:
        held, seen = gc.get_referents(memory), 0
        while seen < len(held):
            kind = type(held[seen])
            if issubclass(kind, Tensor):
                memory.cache_clear()
                break
            if issubclass(kind, (dict, list, tuple)) or "lru_list" in kind.__name__:
                held += gc.get_referents(held[seen])
            seen += 1


def _full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - only reading tells
    except ValueError:  # a name that has no value yet
        return False
    return True

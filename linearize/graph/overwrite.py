"""Find code that reads a tensor which an in-place module has overwritten, by a run without overwriting."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.graph.capture import Inputs, tensors_of
from linearize.graph.dryrun import run_once
from linearize.graph.memory import storage_of

_log = logging.getLogger(__name__)


def stale_inputs(model: nn.Module, inputs: Inputs, working: Mapping[str, Sequence[nn.Module]]) -> set[str]:
    """Names of the modules whose input is read again after they have run, in eval mode or in training mode.

    Code may take the input of a module that works in place for its result. In a captured graph both have one name; here
    the modules work out of place for a while, so that their inputs and their results are different tensors.

    Args:
        model: it stays as it was.
        inputs: of its forward.
        working: by name, modules with a true attribute ``inplace``.

    Examples:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.act = nn.ReLU(inplace=True)
        ...     def forward(self, x):
        ...         h = x + 1
        ...         self.act(h)
        ...         return h * 2
        >>> net = Net()
        >>> stale_inputs(net, ((torch.ones(2),), {}), {"act": [net.act]})
        {'act'}
    """
    if not working:
        return set()
    noter, found = _Noter(), set[str]()
    modules: list[Any] = [module for group in working.values() for module in group]
    hooks = [
        module.register_forward_hook(noter.hook(name), with_kwargs=True)
        for name, group in working.items()
        for module in group
    ]
    hooks.append(model.register_forward_hook(lambda _module, _args, out: noter.read(tensors_of(out))))
    try:
        for module in modules:
            module.inplace = False
        for training in (False, True):
            try:
                with noter:
                    run_once(model, inputs, training=training, before=noter.clear)
                found |= noter.found
            except Exception as error:  # a batch of one in training mode, for example
                _log.debug("no run: %s", error)
    finally:
        for module in modules:
            module.inplace = True
        for hook in hooks:
            hook.remove()
    return found


def overwritten_later(model: nn.Module, inputs: Inputs, paths: Iterable[str]) -> set[str]:
    """The modules whose input, or another part of the same memory, is written after they have run.

    No gradient can be computed with such an input: autograd refuses it, by its count of writes.

    Args:
        model: it stays as it was.
        inputs: of its forward.
        paths: of the modules.

    Examples:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.act = nn.ReLU()
        ...     def forward(self, x):
        ...         a, b = (2 * x).chunk(2, -1)
        ...         return b.mul_(self.act(a))
        >>> overwritten_later(Net(), ((torch.ones(1, 2),), {}), ["act"])
        {'act'}
    """
    seen: list[tuple[str, Tensor, int]] = []

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, _out: Any) -> None:
            given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            seen.extend((path, value, value._version) for value in given[:1] if not value.is_inference())

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    found: set[str] = set()
    try:
        for training in (False, True):
            run_once(model, inputs, training=training, before=seen.clear)
            found |= {path for path, value, version in seen if value._version != version}
    except Exception as error:  # a batch of one in training mode, for example
        _log.debug("no run: %s", error)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Noter(TorchDispatchMode):
    """Holds what would have been overwritten by now, and notes whose input an op reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.overwritten: dict[int, list[tuple[Tensor, str]]] = {}
        self.found: set[str] = set()

    def clear(self) -> None:
        """Delete the notes of an attempt."""
        self.overwritten.clear()
        self.found.clear()

    def hook(self, name: str) -> Any:
        def note(_module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            for value in given[:1]:
                if not (isinstance(out, Tensor) and storage_of(out) == storage_of(value)):
                    self.overwritten.setdefault(storage_of(value), []).append((value, name))

        return note

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Note that an operation, or the caller of the model, reads these tensors."""
        for tensor in tensors:
            held = self.overwritten.get(storage_of(tensor), ())
            self.found.update(name for older, name in held if _overlap(older, tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.read(value for value in pytree.tree_leaves((args, kwargs or {})) if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage have an element in common."""
    if (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset()):
        return True
    seen = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    seen.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(value=1)
    return bool(seen.as_strided(b.shape, b.stride(), b.storage_offset()).any())

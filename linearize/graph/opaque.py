"""Layers that torch.export cannot capture, such as quantised ones with packed weights. Each is one opaque operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.nest import copied
from linearize.tensors import is_wrapper

OPAQUE = "linearize.opaque"  # the name of the op that stands for such a layer
Shape = tuple[tuple[int, ...], torch.dtype]


@torch.library.custom_op("linearize::opaque", mutates_args=())
def _opaque(inputs: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    raise NotImplementedError("it stands for a layer in a captured graph, which is never run")


@_opaque.register_fake
def _(inputs: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    like = next((tensor for tensor in inputs), torch.empty(0))
    return like.new_empty(shape, dtype=dtype)


def packed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with packed or quantised weights: compiled objects, or tensors of another class.

    Examples:
        >>> packed_modules(nn.Linear(2, 2))
        {}
    """
    return {
        path: module
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and (
            any(issubclass(type(value), torch.ScriptObject) for value in vars(module).values())
            or any(map(is_wrapper, _own_tensors(module)))
        )
    }


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


@contextmanager
def opaque_layers(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[None]:
    """Inside this context, each layer with packed weights is one opaque operation with the right output shape.

    The model runs once, for real, to see the shapes; nothing happens to a model without such layers. What is changed
    are attributes of the modules, which the caller puts back.
    """
    packed = packed_modules(model)
    if not packed:
        yield
        return
    shapes = _shapes(model, inputs, packed)
    for path, seen in shapes.items():
        module = model.get_submodule(path)
        module.forward = _stand_in(seen)
        for part in module.modules():
            for name in [name for name, value in vars(part).items() if issubclass(type(value), torch.ScriptObject)]:
                del vars(part)[name]  # torch.export would look into it
            for held in (part._parameters, part._buffers):
                for name in [n for n, t in held.items() if t is not None and is_wrapper(t)]:
                    del held[name]
    yield


def _shapes(
    model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], packed: dict[str, nn.Module]
) -> dict[str, list[Shape]]:
    """Shapes of the outputs of the called modules that hold packed weights, themselves or in a part never called."""
    outputs: dict[str, list[Shape | None]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            outputs.setdefault(path, []).append((tuple(out.shape), out.dtype) if isinstance(out, Tensor) else None)

        return hook

    hooks = [module.register_forward_hook(note(path)) for path, module in model.named_modules() if path]
    try:
        with torch.no_grad():
            args, kwargs = copied(inputs)
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    owners = set()
    for path in packed:
        parts = path.split(".")
        candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        owners.add(next((owner for owner in candidates if owner in outputs), ""))
    return {path: [s for s in outputs[path] if s] for path in owners if path and all(outputs[path])}


def _stand_in(seen: list[Shape]) -> Callable[..., Tensor]:
    calls = iter(seen)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        shape, dtype = next(calls)
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        out: Tensor = torch.ops.linearize.opaque(tensors, shape, dtype)
        return out

    return forward

"""Build a model without its weights, and within limits, so that a file from a stranger cannot build for ever."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from linearize.errors import CaptureError, UsageError

__all__ = ["NO_LIMIT", "Limit", "affordable", "parameters_on_meta", "within_limit"]

# In-place functions that change values only, never shape, dtype or flags.
_FILLING = {
    "add_", "clamp_", "copy_", "div_", "erfinv_", "exponential_", "fill_", "kaiming_uniform_", "mul_", "normal_",
    "ones_", "sub_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "zero_", "zeros_",
}  # fmt: skip

_LARGEST_INPUT = 2**26
_TAKES_APART = {"aten::unbind", "aten::split", "aten::chunk", "aten::split_with_sizes", "aten::tensor_split"}
_OPS = 10  # computations for each part that is made
_SMALL = 2**14  # elements: what an op can make at most from its arguments, below which nobody counts


class _NoFilling(TorchFunctionMode):
    """Leaves out what only sets values of tensors that have none: a meta kernel for each adds up."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in _FILLING:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Limit:
    """Limits on what may be created while a model is built.

    Attributes:
        elements: of all parameters together.
        parts: modules, parameters and buffers together.
        size: bytes of all tensors with values: buffers, tables, and tensors that are computed meanwhile.
    """

    elements: float = math.inf
    parts: float = math.inf
    size: float = math.inf

    @classmethod
    def of_file(cls, tensors: int, elements: int, size: int) -> Limit:
        """The limit for the base model of a file with this number of tensors, elements and bytes.

        Merging makes a model smaller, but not by such factors. A recipe that needs more cannot belong to this file.

        Examples:
            >>> Limit.of_file(2, 100, 400).parts
            10100
        """
        return cls(100 * elements + 3 * 10**7, 50 * tensors + 10_000, 4 * size + 2**28)


NO_LIMIT = Limit()


class _Account:
    """What has been made so far in one thread."""

    def __init__(self, limit: Limit) -> None:
        self.limit, self.thread = limit, threading.get_ident()
        self.elements = self.parts = self.size = self.ops = 0

    def add(self, *, elements: int = 0, parts: int = 0, size: int = 0, ops: int = 0) -> None:
        self.ops += ops
        self.elements += elements
        self.parts += parts
        self.size += size
        limit, asked = self.limit, ""
        if self.elements > limit.elements:
            asked = "for far more weights than there are"
        elif self.parts > limit.parts or self.ops > _OPS * limit.parts:
            asked = "for far more layers than there are tensors"
        elif self.size > limit.size:
            asked = "for far more memory than there is in the file"
        if asked:
            raise UsageError("recipe", f"it asks {asked}", "Check where it came from.")

    @property
    def mine(self) -> bool:
        return threading.get_ident() == self.thread


class _Counting(TorchDispatchMode):
    """Finds out on the meta device what an op would make, before it is made."""

    def __init__(self, account: _Account, *, move: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.account, self.move = account, move

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        self.account.add(ops=1)
        if schema.name in _TAKES_APART:  # each piece is an object of its own
            self.account.add(ops=max(args[0].shape, default=1))
        if not func.is_view and not schema.is_mutable and _most(args, kwargs) > _SMALL:
            size = _would_make(func, args, kwargs)
            if self.move and schema.name.startswith("aten::empty"):
                # Memory that is never touched costs nothing; but what holds no values need not exist at all.
                if size > self.account.limit.size:
                    kwargs = {**kwargs, "device": torch.device("meta")}
            else:
                self.account.add(size=size)
        return func(*args, **kwargs)


def _most(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """More elements than an op with these arguments makes, at no cost."""
    most = 1.0
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            if leaf.is_meta:
                return 0
            most *= max(leaf.numel(), 1)
        elif isinstance(leaf, (int, float)):
            most *= max(abs(leaf), 1)
    return most


def _would_make(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of the results of an op; 0 where only the values tell."""
    if torch.device(kwargs.get("device") or "cpu").type == "meta":
        return 0
    try:
        moved, named = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if "device" in named or not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(args)):
            named["device"] = torch.device("meta")
        made = func(*moved, **named)
    except (RuntimeError, NotImplementedError, TypeError):
        return 0
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor))


def affordable(where: str, *shape: int) -> tuple[int, ...]:
    """Check the shape of an example input, because it comes from what a model says about itself.

    Raises:
        CaptureError: a tensor of that shape would take more than 256 MB, or there is none.

    Examples:
        >>> affordable("images", 2, 3, 224, 224)
        (2, 3, 224, 224)
    """
    if min(shape, default=1) < 0 or math.prod(shape) > _LARGEST_INPUT:
        found = f"its example inputs would be of shape {shape!s:.80}"
        raise CaptureError(where, found, "Pass example_inputs= of a size that you want.")
    return shape


@contextmanager
def within_limit(limit: Limit, *, move: bool = False) -> Iterator[_Account]:
    """Limit what is made inside this context: modules, buffers, tensors. Other threads are not affected.

    Raises:
        UsageError: something inside asks for more than the limit, or for more memory than there is.
    """
    account = _Account(limit)
    with ExitStack() as stack:
        if limit is not NO_LIMIT:
            stack.enter_context(_hooked(registration.register_module_module_registration_hook, _part(account)))
            stack.enter_context(_hooked(registration.register_module_buffer_registration_hook, _buffer(account)))
            stack.enter_context(_Counting(account, move=move))
        try:
            yield account
        except MemoryError as error:
            raise UsageError("recipe", "it asks for more memory than there is", "Check where it came from.") from error


@contextmanager
def _hooked(register: Callable[[Any], Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def _part(account: _Account) -> Callable[..., None]:
    def hook(_module: nn.Module, _name: str, part: nn.Module | None) -> None:
        if part is not None and account.mine:
            account.add(parts=1)

    return hook


def _buffer(account: _Account) -> Callable[..., None]:
    def hook(_module: nn.Module, _name: str, buffer: Tensor | None) -> None:
        if buffer is not None and account.mine:
            # Small ones have not been counted when they were made.
            small = buffer.numel() <= _SMALL and not buffer.is_meta
            account.add(parts=1, size=buffer.numel() * buffer.element_size() if small else 0)

    return hook


@contextmanager
def parameters_on_meta(limit: Limit = NO_LIMIT, *, move: bool = True) -> Iterator[None]:
    """Modules built inside get parameters without memory; their buffers and plain tensors are real.

    Building under ``torch.device("meta")`` would lose the tables that a constructor computes and puts in no
    state dict (rotary frequencies, position indices), and stops where a constructor reads a tensor's value.
    A parameter that is registered in several places stays one parameter. Other threads are not affected.

    Args:
        limit: how much may be made inside.
        move: False leaves the parameters where they are, and only counts.

    Raises:
        UsageError: a constructor inside asks for more.
    """
    moved = WeakIdKeyDictionary()
    with within_limit(limit, move=move) as account:

        def register(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
            if parameter is None or not account.mine:
                return None
            account.add(elements=parameter.numel(), parts=1)
            if parameter.is_meta or not move:
                return None
            if parameter not in moved:
                moved[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            found: nn.Parameter = moved[parameter]
            return found

        with ExitStack() as stack:
            stack.enter_context(_hooked(registration.register_module_parameter_registration_hook, register))
            if move:
                stack.enter_context(_NoFilling())
            yield

"""What a forward does to ordered dicts, hooks among them, is taken back without breaking them."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn, overrides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch

import linearize
from linearize.errors import CaptureError
from linearize.graph.protect import untouched
from linearize.graph.state import to_the_end

SEEN: OrderedDict[str, Any] = OrderedDict(a=1)


class Hooking(nn.Module):
    """Puts a hook on its child at the first forward, as libraries do that capture outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
        self.order: OrderedDict[str, int] = OrderedDict(z=0, a=1)
        self.hooked = False
        self.counted: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.hooked = True
            self.down.register_forward_hook(self._count)
        self.order["b"] = 2
        self.order.move_to_end("z")
        y: Tensor = self.down(self.act(self.up(x)))
        return y

    def _count(self, *_: Any) -> None:
        self.counted.append(1)


def test_hooks_that_a_forward_registers() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 4), Hooking().eval()
    gated: Any = linearize.convert(model, x)
    for each in (model, gated):
        assert not each.down._forward_hooks
        assert list(each.order.items()) == [("z", 0), ("a", 1)]
        copy.deepcopy(each)
        each(x)
        each(x)
        assert each.counted == [1, 1]
        assert list(each.down._forward_hooks.values())
        assert list(each.order.items()) == [("a", 1), ("b", 2), ("z", 0)]


def test_an_ordered_dict_among_globals() -> None:
    class Leaves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            SEEN["fake"] = x
            SEEN["a"] = x
            return x

    with untouched(Leaves()) as _:
        Leaves()(torch.ones(1, device="meta"))
    assert list(SEEN.items()) == [("a", 1)]
    SEEN["b"] = 2
    assert list(SEEN.items()) == [("a", 1), ("b", 2)]


def test_a_transformers_model_that_tells_its_states() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=50,
        output_hidden_states=True,
    )  # fmt: skip
    ids = {"input_ids": torch.arange(8)[None]}
    model = transformers.BertModel(config).eval()
    gated: Any = linearize.convert(model, ids)
    assert len(model(**ids).hidden_states) == len(gated(**ids).hidden_states) == 3


def test_a_model_that_another_thread_runs_is_not_read() -> None:
    class Busy(nn.Module):
        """Has another thread run it in the middle of its forward."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            if STARTED and threading.current_thread() is threading.main_thread():
                other = threading.Thread(target=run, args=(self,))
                other.start()
                other.join()
            y: Tensor = self.down(self.act(self.up(x)))
            return y

    def run(model: nn.Module) -> None:
        with suppress(Exception):  # a model that is being read runs nowhere else
            model(torch.randn(2, 4))

    model = Busy().eval()
    x = torch.randn(2, 4)
    STARTED.append(1)
    try:
        with pytest.raises(CaptureError, match="run by another thread"):
            linearize.convert(model, x)
    finally:
        STARTED.clear()
    assert not model._forward_pre_hooks
    assert torch.equal(linearize.convert(model, x)(x), model(x))


STARTED: list[int] = []


def test_an_interrupt_is_not_taken_for_an_error_of_the_model() -> None:
    """Where torch leaves its modes for an interrupt it may fail itself, and the interrupt is behind that error."""
    model = nn.Linear(2, 2)

    def fails(behind: BaseException) -> None:
        try:
            raise behind
        finally:
            raise AssertionError("Trying to pop empty mode stack")

    with pytest.raises(KeyboardInterrupt), untouched(model):
        fails(KeyboardInterrupt())
    with pytest.raises(AssertionError), untouched(model):
        fails(ValueError())


def test_modes_that_an_interrupt_has_left_on() -> None:
    class Mode(TorchFunctionMode):
        pass

    modes: list[Any] = [FakeTensorMode(), Mode()]

    def stopped_on_the_way() -> None:
        torch.set_grad_enabled(False)
        for mode in modes:
            mode.__enter__()
        raise KeyboardInterrupt

    with FakeTensorMode() as around:
        with pytest.raises(KeyboardInterrupt), untouched(nn.Linear(2, 2)):
            stopped_on_the_way()
        assert _python_dispatch._get_current_dispatch_mode_stack() == [around]  # no more than was put on inside
    assert type(torch.ones(1)) is Tensor
    assert torch.is_grad_enabled()
    assert overrides._get_current_function_mode_stack() == []


def test_what_is_put_back_is_put_back_to_the_end() -> None:
    done: list[int] = []

    def work() -> None:
        for number in range(3):
            if len(done) in (1, 4):
                done.append(-1)
                raise KeyboardInterrupt
            done.append(number)

    with pytest.raises(KeyboardInterrupt):
        to_the_end(work)
    assert done == [0, -1, 0, 1, -1, 0, 1, 2]
    to_the_end(work)
    assert done[-3:] == [0, 1, 2]

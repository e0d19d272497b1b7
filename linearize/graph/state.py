"""What torch and Python are like, put back: random generators, modes, and interrupts that were hidden."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch

__all__ = ["interrupt_behind", "muted", "same_modes", "same_random_numbers", "to_the_end"]


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt that an error has taken the place of: torch's own modes may fail while they are left by one."""
    seen: set[int] = set()
    behind: BaseException | None = error
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        if isinstance(behind, KeyboardInterrupt):
            return behind
        behind = behind.__cause__ or behind.__context__
    return None


def to_the_end(put_back: Callable[[], object]) -> None:
    """Put something back, from the beginning again after an interrupt, which comes behind it then."""
    stopped: KeyboardInterrupt | None = None
    while True:
        try:
            put_back()
        except KeyboardInterrupt as error:
            stopped = error
        else:
            break
    if stopped is not None:
        raise stopped


@contextmanager
def same_modes() -> Iterator[None]:
    """After an error, torch's modes are those that were: an interrupt may come between one and its own way out.

    Gradients are recorded, or not, as before.
    """
    gradients = torch.is_grad_enabled()
    before = _python_dispatch._get_current_dispatch_mode_stack(), overrides._get_current_function_mode_stack()
    try:
        yield
    except BaseException:
        while len(now := _python_dispatch._get_current_dispatch_mode_stack()) > _alike(now, before[0]):
            _python_dispatch._pop_mode(getattr(now[-1], "_mode_key", None))
        for mode in before[0][len(now) :]:
            _python_dispatch._push_mode(mode)
        while len(now := overrides._get_current_function_mode_stack()) > _alike(now, before[1]):
            overrides._pop_mode()
        for mode in before[1][len(now) :]:
            overrides._push_mode(mode)
        torch.set_grad_enabled(gradients)
        raise


def _alike(some: list[Any], others: list[Any]) -> int:
    """How many of the first of two lists are the same."""
    return next(
        (i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a is not b), min(len(some), len(others))
    )


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Python's, NumPy's and torch's generators of random numbers stay where they are."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


@contextmanager
def muted(*names: str) -> Iterator[None]:
    """Inside this context, some of torch's loggers are silent: what fails there is an answer, and told as such."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Distillation of inner layers: outputs of modules are compared with those of the teacher's modules of the same names.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import TrainingError, UsageError
from linearize.running.batches import Batch
from linearize.running.outputs import UNKNOWN, OutputPart
from linearize.training.divergence import counted, relative_error

__all__ = ["Features"]


class Features:
    """Stores the last outputs of modules of a model and of its teacher, and gives their distance.

    Args:
        model: in training.
        teacher: with modules of the same names.
        patterns: glob patterns of module paths, such as "blocks.*"; only modules that both have count.

    Raises:
        UsageError: a pattern names no module of both.

    Examples:
        >>> student, teacher = (nn.Sequential(nn.Linear(2, 3), nn.ReLU()) for _ in range(2))
        >>> Features(student, teacher, ["0"]).paths
        ('0',)
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, patterns: str | Sequence[str]) -> None:
        self.model, self.teacher = model, teacher
        known = set(dict(teacher.named_modules()))
        names = [name for name, _ in model.named_modules() if name and name in known]
        found: dict[str, None] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            some = fnmatch.filter(names, pattern)
            if not some:
                remedy = "Pass glob patterns of paths that named_modules() gives for both models."
                raise UsageError("features", f"found {pattern!r}, which names no module of model and teacher", remedy)
            found |= dict.fromkeys(some)
        self.paths = tuple(found)
        self._seen: dict[tuple[str, bool], list[OutputPart]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this context, outputs are stored."""
        handles = [
            model.get_submodule(path).register_forward_hook(self._note(path, taught=model is self.teacher))
            for model in (self.model, self.teacher)
            for path in self.paths
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def _note(self, path: str, *, taught: bool) -> Any:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            self._seen[path, taught] = UNKNOWN.parts(output)

        return see

    def loss(self, batch: Batch) -> Tensor:
        """Mean over modules of the squared error, relative to the mean square of the teacher's; padding left out.

        Of a module that gives several tensors, it is the mean over these.

        Raises:
            TrainingError: a module was not called, or gave another shape than the teacher's.
        """
        terms = []
        for path in self.paths:
            if (path, False) not in self._seen or (path, True) not in self._seen:
                raise TrainingError("features", f"{path} was not called", "Leave it out of features=.")
            students, teachers = ([part.tensor for part in self._seen[path, taught]] for taught in (False, True))
            shapes, wanted = ([tuple(z.shape) for z in some] for some in (students, teachers))
            if shapes != wanted:
                found = f"{path} gives {_told(shapes)}, the teacher's {_told(wanted)}"
                raise TrainingError("features", found, "Leave it out of features=.")
            keep = [counted(teacher, batch, path) for teacher in teachers]
            pairs = zip(students, teachers, keep, strict=True)
            errors = [relative_error(s, t) if k is None else relative_error(s[k], t[k]) for s, t, k in pairs]
            terms.append(torch.stack(errors).mean())
        return torch.stack(terms).mean()


def _told(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))

"""What is asked of a blockwise compression, and what that means for the blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from linearize import checks
from linearize.cost import flops_of_modules
from linearize.errors import LinearizeError, UsageError
from linearize.planning.request import Request
from linearize.storage import atomic

__all__ = ["Asked", "Costs", "Share"]

_OURS = re.compile(
    r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json|generation_config\.json|\.linearize-.*"
)


@dataclass(frozen=True)
class Asked:
    """The arguments of `linearize.compress_blockwise`, checked.

    Attributes:
        out: what to write.
        measure, fraction: the budget.
        folder: whether to write a folder for transformers.
        options: of `Request`, for each block.
        seed: of everything random.
    """

    out: Path
    measure: str
    fraction: float
    folder: bool
    options: dict[str, Any]
    seed: int

    @classmethod
    def of(
        cls, params: Any, flops: Any, out: Any, *, stock: bool | None, round_to: int | None, seed: int, source: Any
    ) -> Asked:
        """Check the arguments, and make the object.

        Raises:
            UsageError: one is out of range, or they do not go together.
        """
        given = {name: value for name, value in (("params", params), ("flops", flops)) if value is not None}
        if len(given) != 1:
            raise UsageError("compress_blockwise", f"found {len(given)} budgets", "Pass exactly one: params or flops.")
        ((measure, fraction),) = given.items()
        checks.share(measure, fraction, "fraction of the original's", positive=True)
        path = checks.path("out", out)
        folder = path.suffix != ".safetensors"
        if stock is not None:
            checks.boolean("stock", stock)
        if folder and stock is False:
            found = "found beside a folder for transformers, which needs stock layers"
            raise UsageError("stock", found, "Write to a file: out='small.safetensors'.")
        if folder and path.exists() and not _half_written(path, source):
            raise UsageError("out", f"found {path}, which exists already", "Pass a new name.")
        if not folder:
            atomic.destination(path)
        own = bool(stock) or folder
        options = {"search": 0, "families": ("channels",), "stock": own, "round_to": round_to, "rounds": 0}
        Request(**{**options, measure: fraction}, seed=seed)
        return cls(path, measure, float(fraction), folder, options, seed)

    @property
    def equal(self) -> bool:
        """Whether all blocks keep the same share."""
        return bool(self.options["stock"])

    @property
    def facts(self) -> str:
        """All that the result depends on, as text."""
        return repr((self.measure, self.fraction, sorted(self.options.items()), self.seed))


def _half_written(folder: Path, source: Any) -> bool:
    """Whether a folder is empty, or what a run that was killed has begun to write: `config.json` comes last."""
    if not folder.is_dir():
        return False
    given = isinstance(source, str | os.PathLike) and Path(source).is_dir()
    known = {path.name for path in Path(source).iterdir()} if given else set()
    names = {path.name for path in folder.iterdir() if _OURS.fullmatch(path.name) is None}
    return "config.json" not in names and names <= known


@dataclass(frozen=True)
class Share:
    """What may remain of the blocks.

    Attributes:
        measure: "params" or "flops".
        fraction: of the cost of all blocks together.
        equal: each block gets this very fraction; otherwise a block makes up for what those before it left over.
    """

    measure: str
    fraction: float
    equal: bool

    def of(self, costs: list[int], done: list[int]) -> float:
        """The fraction that the next block may keep.

        Args:
            costs: of all blocks as they were.
            done: of those that are compressed.

        Examples:
            >>> Share("params", 0.5, equal=False).of([10, 10, 10], [3])
            0.6
        """
        if self.equal:
            return self.fraction
        left = self.fraction * sum(costs) - sum(done)
        return min(1.0, max(1e-6, left / sum(costs[len(done) :])))


@dataclass(frozen=True)
class Costs:
    """Costs in the measure of the budget.

    Attributes:
        whole: of the model.
        blocks: of each block.
    """

    whole: int
    blocks: list[int]

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[str], batch: Any, measure: str) -> Costs:
        """Count the costs of all blocks, from shapes alone.

        Args:
            model: it needs no weights.
            blocks: their paths.
            batch: inputs, for FLOPs.
            measure: "params" or "flops".

        Raises:
            UsageError: FLOPs cannot be counted from shapes.

        Examples:
            >>> Costs.of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), ["1"], None, "params")
            Costs(whole=25, blocks=[16])
        """
        if measure == "params":
            return cls(_parameters(model), [_parameters(model.get_submodule(path)) for path in blocks])
        try:
            found = flops_of_modules(model, batch)
        except LinearizeError as error:
            why = f"cannot be counted without the weights ({error.found})"
            raise UsageError("flops", why, "Pass params= instead.") from error
        return cls(found.get("", 0), [found.get(path, 0) for path in blocks])

    def share(self, asked: Asked) -> Share:
        """What may remain of the blocks.

        Raises:
            UsageError: what is outside of them takes all of the budget.
        """
        inside = sum(self.blocks)
        fraction = (asked.fraction * self.whole - (self.whole - inside)) / max(1, inside)
        if fraction <= 0:
            outside = 1 - inside / max(1, self.whole)
            found = f"found {asked.fraction:.3g}, and {outside:.3g} of the cost is outside the blocks, where it stays"
            raise UsageError(asked.measure, found, f"Pass a fraction well above {outside:.3g}.")
        return Share(asked.measure, min(1.0, fraction), asked.equal)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

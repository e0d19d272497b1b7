"""Statistics of single places, without a survey around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from linearize.families.blocks.collect import BlockCollector
from linearize.families.blocks.find import Block
from linearize.families.modules.collect import ModuleCollector
from linearize.families.modules.place import Whole
from linearize.running.models import device_of
from linearize.running.passes import run_passes
from linearize.training.probes import projection


def observe_wholes(model: nn.Module, batches: Iterable[Any], wholes: Sequence[Whole]) -> None:
    """Gather the statistics of whole modules."""
    collectors = [ModuleCollector(whole, device_of(model)) for whole in wholes]
    run_passes(model, batches, collectors, probe=projection, seed=0, memory=2e9, progress=False)


def observe_blocks(model: nn.Module, batches: Iterable[Any], blocks: Sequence[Block]) -> None:
    """Gather statistics of blocks. A block whose shape differs from the expected one has no rows afterwards."""
    collectors = [BlockCollector(block, device_of(model)) for block in blocks]
    run_passes(model, batches, collectors, probe=projection, seed=0, memory=2e9, progress=False)

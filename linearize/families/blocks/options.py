"""The options of a block: its cost and its predicted loss as one convolution."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from linearize.families.blocks.find import Block
from linearize.families.blocks.fit import fit_block
from linearize.families.option import Group, Option, SiteChoice

__all__ = ["BLOCKS", "BORDERED", "with_block"]

BORDERED = "bordered block"
BLOCKS = ("block", BORDERED)


def with_block(group: Group, block: Block) -> Group:
    """The group with more options: one convolution for all of it, in each observed kernel size."""
    if not block.rows:
        return group
    more = []
    for kernel, form in product(block.rows, BLOCKS):
        bordered = form == BORDERED
        choices = tuple(SiteChoice(name, 0, kernel, form) for name in group.sites)
        weights = block.outputs * ((block.inputs + bordered) * kernel**2 + 1)
        fit = fit_block(block, kernel, bordered=bordered)
        more.append(Option(choices, fit.loss, block.flops(kernel, bordered=bordered), weights, 0.0))
    shape = group.shape or block.shape
    return replace(group, options=(*group.options, *more), reason=None, shape=shape)

"""What data tells about attentions: as for whole modules, with rows that are far longer than others weighed down."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearize.algebra.covariance import Covariance
from linearize.families.modules.collect import ModuleCollector
from linearize.running.passes import Moment
from linearize.running.rows import outliers_down

__all__ = ["AttentionCollector"]


@dataclass
class AttentionCollector(ModuleCollector):
    """Takes rows of an attention's input and output."""

    kind: str = field(default="attention", init=False)

    @torch.no_grad()
    def _count(self, output: Tensor, now: Moment) -> None:
        if self._seen is None:
            return
        inputs, chosen = self._seen
        whole = self._rows(output, now)
        rows = torch.cat((inputs, whole[chosen]), 1)
        self.whole.rows = self.whole.rows or Covariance(rows.shape[1], rows.device)
        self.whole.rows.update(rows, outliers_down(whole)[chosen])

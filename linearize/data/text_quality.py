"""How well a model predicts held-back text: its perplexity, and how often it agrees with the original.

Shape letters: B blocks in a batch, T tokens, V tokens that are known.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from linearize.data.text import TextBatches, TextSource
from linearize.errors import LinearizeError
from linearize.running.batches import read_batches
from linearize.running.models import evaluating
from linearize.running.outputs import main_part
from linearize.zoo.caches import generates
from linearize.zoo.inputs import unwrap
from linearize.zoo.transformers_models import is_transformers

__all__ = ["TextQuality", "quality_of"]


class TextQuality:
    """A function of a model, for `evaluate=`: "perplexity" and "next_token_agreement" on held-back text.

    The perplexity is that of each token after those before it in its block. The agreement is the share of positions at
    which the model thinks the same token most likely as the original does. A model that fills gaps, rather than to
    predict what comes next, has only the latter, as "token_agreement".

    Args:
        original: the model to compare with; it runs once.
        batches: the text.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> quality = TextQuality(model, TextBatches(torch.arange(8).view(2, 4), 2, named=False))
        >>> sorted(quality(model)), quality(model)["next_token_agreement"]
        (['next_token_agreement', 'perplexity'], 1.0)
    """

    def __init__(self, original: nn.Module, batches: TextBatches) -> None:
        self.original, self.batches = original, batches
        self.causal = not is_transformers(unwrap(original)) or generates(unwrap(original))
        self._likely: list[Tensor] | None = None

    @property
    def fits(self) -> bool:
        """Whether the original gives a score (B, T, V) to each token at each position."""
        with evaluating(self.original):
            batch = next(read_batches(self.original, self.batches))
            try:
                shape = main_part(batch.checked(self.original, 0)).tensor.shape
            except LinearizeError:
                return False
        known = int(self.batches.blocks.max()) + 1
        return len(shape) == 3 and tuple(shape[:2]) == tuple(_ids(batch).shape) and shape[2] >= known

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The scores of a model."""
        loss, tokens, same, positions = 0.0, 0, 0, 0
        likely = self._of_original()
        with evaluating(model):
            for index, batch in enumerate(read_batches(model, self.batches)):
                scores, ids = main_part(batch.checked(model, index)).tensor, _ids(batch)
                if self.causal:
                    rows = scores[:, :-1].flatten(0, 1)
                    loss += float(F.cross_entropy(rows, ids[:, 1:].flatten().to(rows.device), reduction="sum"))
                    tokens += len(rows)
                best = scores.argmax(-1).cpu()
                same += int((best == likely[index]).sum())
                positions += best.numel()
        agreement = same / positions
        if not self.causal:
            return {"token_agreement": agreement}
        mean = loss / max(1, tokens)
        return {"perplexity": math.exp(min(mean, 700.0)), "next_token_agreement": agreement}

    def _of_original(self) -> list[Tensor]:
        if self._likely is None:
            with evaluating(self.original):
                batches = enumerate(read_batches(self.original, self.batches))
                found = (main_part(batch.checked(self.original, index)).tensor for index, batch in batches)
                self._likely = [scores.argmax(-1).cpu() for scores in found]
        return self._likely


def quality_of(model: nn.Module, source: TextSource) -> TextQuality | None:
    """The quality on what is held back; None if the model does not score tokens."""
    quality = TextQuality(model, source.test)
    return quality if quality.fits else None


def _ids(batch: Any) -> Tensor:
    found: Tensor = batch.kwargs["input_ids"] if batch.kwargs else batch.args[0]
    return found

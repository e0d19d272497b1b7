"""How a model that writes text is measured: a thin layer, so that another way of generating can take its place.

Two calls are timed: one that stops after the first new token, and one that writes all. The time to the first token is
that of the first call; each further token takes its share of the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linearize.graph.capture import Inputs
from linearize.suite.ways import LeftOut

__all__ = ["ALL", "FIRST", "calls"]

FIRST, ALL = "first", "all"


def calls(model: nn.Module, batch: Inputs, new_tokens: int) -> dict[str, Callable[[], Any]]:
    """The two calls, by name. Every model writes as many tokens, whatever they are.

    Raises:
        LeftOut: the model does not generate text.
    """
    generate: Any = getattr(model, "generate", None)
    prompt = _prompt(batch)
    if not callable(generate) or prompt is None:
        raise LeftOut(f"a {type(model).__name__} does not generate text")
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    pad = end[0] if isinstance(end, list) else end

    def write(count: int) -> Any:
        return generate(
            **prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False, num_beams=1, pad_token_id=pad or 0
        )

    return {FIRST: lambda: write(1), ALL: lambda: write(new_tokens)}


def _prompt(batch: Inputs) -> dict[str, Tensor] | None:
    """The tokens of a batch, and their mask; all of them are read if there is none."""
    ids, mask = batch[1].get("input_ids"), batch[1].get("attention_mask")
    if not isinstance(ids, Tensor):
        return None
    return {"input_ids": ids, "attention_mask": mask if isinstance(mask, Tensor) else torch.ones_like(ids)}

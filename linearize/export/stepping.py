"""A model that generates as one step: tokens, and keys and values of those before, in; logits and all of these out.

Names are those that other programs expect: `past_key_values.0.key` in, `present.0.key` out.

Shape letters: B batch, P positions before, T new ones, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import ExportError
from linearize.export.face import Subject
from linearize.graph.capture import Inputs
from linearize.zoo.caches import generates
from linearize.zoo.past import argument_names, cache_keyword, cache_of, pairs_of
from linearize.zoo.unlike import Unlike

__all__ = ["Stepping", "decoded", "stepping"]

_NEW = 8  # tokens that are generated to prove a file
_LEAST = 4  # tokens of an example: two before, two new, so that no size is taken for the constant one


class Stepping(nn.Module):
    """One step of a model that generates."""

    dotted = True  # names of inputs and outputs keep their dots

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes = [name for name in ("position_ids",) if name in argument_names(model)]
        self.keyword = cache_keyword(model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Mapping[str, Mapping[str, Tensor]],
        position_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """Logits (B, T, V) and keys and values of P + T positions."""
        cache = cache_of([(layer["key"], layer["value"]) for layer in past_key_values.values()])
        more = {"position_ids": position_ids} if self.takes else {}
        given = {"input_ids": input_ids, "attention_mask": attention_mask, self.keyword: cache, **more}
        out = self.model(**given, use_cache=True)
        present = {str(i): {"key": k, "value": v} for i, (k, v) in enumerate(pairs_of(out, self.model))}
        return {"logits": out.logits, "present": present}


@torch.no_grad()
def stepping(subject: Subject) -> Subject:
    """One step of a subject's model, on batches with keys and values of its own: many before, none, and one new token.

    Raises:
        ExportError: it does not generate, or keeps something else than keys and values.
    """
    model: Any = subject.model
    name = type(model).__name__
    if not generates(model) or getattr(model.config, "is_encoder_decoder", False):
        raise ExportError(name, "is no decoder that generates", "Leave cache= out.")
    rows = [ids for batch in subject.batches if (ids := _ids(batch)).shape[1] >= _LEAST]
    if not rows:
        found = f"found fewer than {_LEAST} tokens in example_inputs"
        raise ExportError(name, found, "Pass example_inputs= with more tokens.")
    first, last = rows[0], rows[-1]
    cuts = [(first, first.shape[1] // 2), (last, 0), (first[:1], first.shape[1] - 1), (last[:, :3], 2)]
    try:
        batches = [_inputs(model, ids, before) for ids, before in cuts]
    except Unlike as error:
        raise ExportError(error.where, error.why, "Leave cache= out.") from error
    step = Stepping(model).eval()
    layers = len(batches[0][1]["past_key_values"])
    axes = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "total"}}
    axes |= {"position_ids": axes["input_ids"]} if step.takes else {}
    past = ({0: "batch", 2: "past"},) * 2 * layers
    ordered = [axes[key] for key in batches[0][1] if key in axes]
    return Subject(step, batches, subject.options, (*ordered, *past))


def _ids(batch: Inputs) -> Tensor:
    args, kwargs = batch
    ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    return ids


def _inputs(model: nn.Module, ids: Tensor, before: int) -> Inputs:
    """The step that adds tokens to those before."""
    total = ids.shape[1]
    pairs = pairs_of(model(input_ids=ids[:, : max(before, 1)], use_cache=True), model)
    past = {str(i): {"key": k[:, :, :before], "value": v[:, :, :before]} for i, (k, v) in enumerate(pairs)}
    return _step(model, ids[:, before:], torch.ones_like(ids), torch.arange(before, total, device=ids.device), past)


def _step(model: nn.Module, new: Tensor, mask: Tensor, positions: Tensor, past: Mapping[str, Any]) -> Inputs:
    given: dict[str, Any] = {"input_ids": new, "attention_mask": mask}
    if "position_ids" in argument_names(model):
        given["position_ids"] = positions.expand(new.shape[0], -1).clone()
    return (), {**given, "past_key_values": past}


@torch.no_grad()
def decoded(step: Stepping, start: Inputs, run: Callable[[Inputs], Sequence[Tensor]]) -> tuple[float, str]:
    """Generate greedily in the runtime, step by step, and compare with whole passes of the model, without a cache.

    Args:
        step: the step that was exported.
        start: a batch without anything before it.
        run: the runtime.

    Returns:
        The largest relative error of the logits that tokens were picked from, infinite if one is not the model's own
        choice; and what was seen, in words.
    """
    model: Any = step.model
    first, kwargs = int(start[1]["input_ids"].shape[1]), start[1]
    ids = kwargs["input_ids"][:1]
    past = {i: {name: t[:1] for name, t in layer.items()} for i, layer in kwargs["past_key_values"].items()}
    new, logits = ids, []
    for _ in range(_NEW):
        total = ids.shape[1]
        positions = torch.arange(total - new.shape[1], total)
        out = list(run(_step(model, new, torch.ones_like(ids), positions, past)))
        past = {str(i): {"key": out[1 + 2 * i], "value": out[2 + 2 * i]} for i in range(len(past))}
        logits.append(out[0][0, -1].double())
        new = logits[-1].argmax().view(1, 1)
        ids = torch.cat((ids, new), 1)
    own = model(input_ids=ids[:, :-1], use_cache=False).logits[0, first - 1 :].double()
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(own, logits, strict=True))
    for row, token in zip(own, ids[0, first:].tolist(), strict=True):
        if float(row.max() - row[token]) / float(row.abs().max()) > max(error, 1e-6):  # another's, and no tie
            error = math.inf
    return error, f"{_NEW} tokens generated step by step are those of the model"

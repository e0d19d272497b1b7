"""Small example inputs for transformers models, derived from the forward's signature and the configuration.

If more than one set of arguments is possible, the first one with which the model runs is taken.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import CaptureError
from linearize.zoo.transformers_arguments import TOKENS, Arguments

_log = logging.getLogger(__name__)

Kwargs = dict[str, Any]

# What a composed model takes besides text: the argument, what turns it into embeddings, and their token's names.
_MODALITIES = {
    "pixel_values": ("get_image_features", ("image_token_id", "image_token_index")),
    "input_features": ("get_audio_features", ("audio_token_id", "audio_token_index")),
    "input_values": ("get_audio_features", ("audio_token_id", "audio_token_index")),
}

# Arguments that some models insist on although the signature calls them optional.
_OPTIONAL = {
    "actions", "image_attention_mask", "image_sizes", "input_features_mask", "pixel_attention_mask", "returns_to_go",
    "rewards", "spatial_shapes", "states", "target_sizes", "timesteps", "visual_feats", "visual_pos",
}  # fmt: skip


def example_inputs(model: Any, *, batch: int, like: Tensor) -> tuple[tuple[Any, ...], Kwargs]:
    """Keyword arguments for ``model.forward``: its main input, what it requires, and what a decoder needs.

    A model that reads images or sound among its text gets both, if that runs; else text alone.

    Raises:
        CaptureError: the forward requires an argument that no rule here can make.
    """
    parameters = inspect.signature(model.forward).parameters
    make = Arguments(model, batch, like)
    tries = _tries(model, make, parameters)
    first: Kwargs | None = None
    reason = ""
    # Looking for inputs leaves no trace: neither in the random numbers nor in running statistics.
    with torch.random.fork_rng(devices=[]), _at_rest(model), torch.no_grad():
        for kwargs, last in _with_last(tries):
            if "use_cache" in parameters:
                kwargs["use_cache"] = False
            if first is None and last:
                return (), kwargs
            first = first if first is not None else kwargs
            try:
                model(**kwargs)
            except Exception as error:  # the next try may be right; the last word is the first one's
                reason = reason or f"{type(error).__name__}: {error}"
                continue
            return (), kwargs
    if first is None:
        missing = ", ".join(repr(name) for name in _required(parameters) if not _known(make, name))
        found = f"its forward requires {missing}, which cannot be derived from the configuration"
        raise CaptureError(type(model).__name__, found, "Pass example_inputs= as a dict of keyword arguments.")
    # None runs, or there is nothing to run with (the meta device): whoever uses them will say what is wrong.
    return (), first


def _with_last(items: Iterator[Kwargs]) -> Iterator[tuple[Kwargs, bool]]:
    """Each item, and whether it is the last one."""
    before = next(items, None)
    while before is not None:
        item = next(items, None)
        yield before, item is None
        before = item


class _at_rest:  # noqa: N801 -- reads as a statement
    """The model in eval mode for a while."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        for module, _ in self.modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes:
            module.training = training


def _tries(model: Any, make: Arguments, parameters: Mapping[str, Any]) -> Iterator[Kwargs]:
    names = _wanted(model, parameters)
    for argument, (encode, tokens) in _MODALITIES.items():
        token = make._setting(*tokens)
        if argument in parameters and "input_ids" in parameters and token is not None and hasattr(model, encode):
            yield from _interleaved(getattr(model, encode), make, parameters, argument, int(token))
            names = ["input_ids", *(name for name in names if name not in (*_MODALITIES, "input_ids"))]
    if "grid_thw" in parameters:
        yield from _patched(make, names)
    if not all(_known(make, name) for name in names):
        return
    base = {name: getattr(make, name)() for name in names if hasattr(Arguments, name)}
    if len(base) == len(names):
        yield dict(base)
    for name in names:
        for value in make.alternatives(name):
            if all(other in base for other in names if other != name):
                yield {**base, name: value}
    # Last, everything optional that there is a rule for.
    more = [name for name in parameters if name in _OPTIONAL and name not in names]
    if more and len(base) == len(names):
        yield {**base, **{name: getattr(make, name)() for name in more}}


def _known(make: Arguments, name: str) -> bool:
    return hasattr(Arguments, name) or next(make.alternatives(name), None) is not None


def _required(parameters: Mapping[str, Any]) -> list[str]:
    various = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in various
    ]


def _wanted(model: Any, parameters: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that the model cannot do without."""
    main = getattr(model, "main_input_name", "input_ids")
    wanted = [main] if main in parameters else []
    wanted += _required(parameters)
    if not wanted:
        wanted += [name for name in ("input_ids", *_MODALITIES) if name in parameters][:1]
    # Two towers side by side (CLIP and its kin) want one input each.
    towers = {"text": "input_ids", "vision": "pixel_values", "audio": "input_features", "speech": "input_features"}
    parts = [key for key, part in vars(model.config).items() if hasattr(part, "to_dict")]
    for word, name in towers.items():
        if name in parameters and any(word in key for key in parts):
            wanted.append(name)
    if "bbox" in parameters:
        wanted.append("bbox")
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    return list(dict.fromkeys(wanted))


def _patched(make: Arguments, names: list[str]) -> Iterator[Kwargs]:
    """Vision towers that take the patches of all images in one sequence."""
    source = "hidden_states" if "hidden_states" in names else "pixel_values"
    rest = [name for name in names if name not in (source, "grid_thw")]
    if all(hasattr(Arguments, name) for name in rest):
        more = {name: getattr(make, name)() for name in rest}
        yield {source: make.patches(), "grid_thw": make.grid_thw(), **more}


def _interleaved(
    encode: Any, make: Arguments, parameters: Mapping[str, Any], argument: str, token: int
) -> Iterator[Kwargs]:
    """Text with placeholder tokens, as many as the images or sounds have embeddings."""
    forms: list[Kwargs] = []
    if "image_grid_thw" in parameters and argument == "pixel_values":
        forms.append({argument: make.patches(), "image_grid_thw": make.image_grid_thw()})
    values = [getattr(make, argument)(), *make.alternatives(argument)]
    for value in values:
        form = {argument: value}
        if argument == "input_features" and "input_features_mask" in parameters:
            form["input_features_mask"] = torch.ones(value.shape[0], max(value.shape[1:]), device=value.device).long()
        if argument == "pixel_values" and "image_sizes" in parameters:
            sides = value.shape[-2:]
            sizes = torch.tensor([list(sides)] * make.batch, device=value.device)
            forms.append({**form, "image_sizes": sizes})
        forms.append(form)
    for form in forms:
        count = _count(encode, form, make.batch)
        if count:
            yield _with_placeholders(make, parameters, form, count, token)


def _count(encode: Any, form: Kwargs, batch: int) -> int:
    """Embeddings per sample that an encoder makes of its arguments; 0 if it cannot take them."""
    try:
        return _rows(encode(**form)) // batch
    except Exception as error:  # this form is not the model's
        _log.debug("no arguments of its encoder: %s", error)
        return 0


def _with_placeholders(make: Arguments, parameters: Mapping[str, Any], form: Kwargs, count: int, token: int) -> Kwargs:
    text = make.input_ids()
    places = torch.full((make.batch, count), token, dtype=text.dtype, device=text.device)
    start = make._setting("vision_start_token_id", "image_start_token_id", "boi_token_id")
    if start is not None and "pixel_values" in form:
        text[:, 1] = int(start)
    ids = torch.cat((text[:, :2], places, text[:, 2:]), dim=1)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **form}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in parameters:
            kwargs[name] = (ids == token).long()
    if "attention_mask" not in parameters:
        del kwargs["attention_mask"]
    return kwargs


def _rows(output: Any) -> int:
    """How many embeddings an encoder gave for the whole batch."""
    if getattr(output, "pooler_output", None) is not None:
        output = output.pooler_output
    elif getattr(output, "last_hidden_state", None) is not None:
        output = output.last_hidden_state
    if isinstance(output, Tensor):
        return output.numel() // output.shape[-1]
    if isinstance(output, (list, tuple)) and output:
        return sum(_rows(item) for item in output)
    return 0


__all__ = ["TOKENS", "example_inputs"]

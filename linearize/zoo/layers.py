"""Lists of layers that become shorter: the counts, numbers and lists that a library keeps along them are set, too.

A layer that is gone is a `Skipped` until then, so that paths stay what they were while a model has gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from linearize.sites.record import Record, Step, record_of, set_record
from linearize.surgery.attributes import ATTRIBUTES, SETTINGS, fewer_in, set_attributes
from linearize.surgery.skipped import SHORTENED, Skipped, shorten
from linearize.zoo import candidates
from linearize.zoo.caches import INDEX
from linearize.zoo.experts import retold, smaller_in

__all__ = ["close_up", "indices_in", "kinds_differ", "renumbered"]

# Settings that count layers.
_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip


def close_up(model: nn.Module) -> None:
    """Remove skipped layers from their lists, in place, and set the counts of layers in the configuration."""
    gone = {path: module for path, module in model.named_modules() if isinstance(module, Skipped)}
    record = record_of(model) or Record()
    known = vars(model).get("_linearize_recipe")
    found = [known] if known else candidates(model) if gone or smaller_in(record.steps) else []
    steps = list(retold(model, record.steps))
    if found and (gone or steps):
        vars(model)["_linearize_recipe"] = found[0]  # of the model with all layers, from which the steps start
    if gone:
        steps += _closed_up(model, gone)
    if steps:
        set_record(model, Record(record.sites, [*record.steps, *steps], record.inputs))


def _closed_up(model: nn.Module, gone: Mapping[str, Skipped]) -> list[Step]:
    """Take skipped layers out of their lists; what was done."""
    steps = renumbered(model, sorted({index for module in gone.values() for index in module.indices}))
    for path in dict.fromkeys(path.rpartition(".")[0] for path in gone):
        container = model.get_submodule(path)
        keep = [i for i, child in enumerate(container.children()) if not isinstance(child, Skipped)]
        count = len(container._modules)
        shorten(container, keep)
        steps.append({"path": path, "module": {"type": SHORTENED, "keep": keep}})
        for where, numbers, lists in _settings(model, path, count):
            fewer_in(model.get_submodule(where), "config", numbers, lists, keep)
            spec = {"type": SETTINGS, "attribute": "config", "numbers": numbers, "lists": lists, "keep": keep}
            steps.append({"path": where, "module": spec})
    return steps


def indices_in(model: nn.Module, path: str) -> tuple[int, ...]:
    """The numbers under which a module, and none beside it, keeps keys and values."""
    own, others = set[int](), set[int]()
    for name, module in model.named_modules():
        if type(vars(module).get(INDEX)) is int and not path.startswith(f"{name}."):
            (own if f"{name}.".startswith(f"{path}.") else others).add(vars(module)[INDEX])
    return tuple(sorted(own - others))


def renumbered(model: nn.Module, lost: Sequence[int], *, within: Sequence[str] = ()) -> list[Step]:
    """Close the gaps that some numbers leave, in place; what was done.

    Args:
        model: of which something that kept keys and values has gone.
        lost: its numbers.
        within: paths of what keeps them: the modules around these stay where they are, and so do their numbers.
    """
    steps: list[Step] = []
    for path, module in model.named_modules():
        if any(inner.startswith(f"{path}.") for inner in within):
            continue
        values: dict[str, int] = {}
        if isinstance(module, Skipped):
            values = {f"indices.{i}": _closed(index, lost) for i, index in enumerate(module.indices)}
        elif type(vars(module).get(INDEX)) is int:
            values = {INDEX: _closed(vars(module)[INDEX], lost)}
        values = {name: value for name, value in values.items() if value != _read(module, name)}
        if values:
            set_attributes(module, values)
            steps.append({"path": path, "module": {"type": ATTRIBUTES, "values": values}})
    return steps


def kinds_differ(model: nn.Module) -> bool:
    """Whether layers of a model keep keys and values in different ways, such as within a window or of all tokens."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    kinds = [getattr(config, "layer_types", None) for config in configs]
    return any(isinstance(some, (list, tuple)) and len(set(some)) > 1 for some in kinds)


def _closed(index: int, lost: Sequence[int]) -> int:
    """A number after some smaller ones have gone.

    Examples:
        >>> [_closed(i, [1, 3]) for i in range(5)]
        [0, 1, 1, 2, 2]
    """
    return index - sum(other < index for other in lost)


def _read(module: nn.Module, name: str) -> int:
    attribute, _, place = name.partition(".")
    value: Any = vars(module)[attribute]
    return int(value[int(place)]) if place else int(value)


def _settings(model: nn.Module, path: str, count: int) -> Iterator[tuple[str, list[str], list[str]]]:
    """The configuration that counts the layers of a list: the nearest around it that does, and which settings do."""
    parts = path.split(".")
    for size in range(len(parts) - 1, -1, -1):
        where = ".".join(parts[:size])
        config: Any = vars(model.get_submodule(where)).get("config")
        if not hasattr(config, "to_dict"):
            continue
        names = list(config.to_dict())
        numbers = [n for n in names if getattr(config, n, None) == count and _counts(n, path)]
        if numbers:
            lists = [n for n in names if isinstance(value := getattr(config, n, None), list) and len(value) == count]
            yield where, [n for n in numbers if type(getattr(config, n)) is int], lists
            return


def _counts(name: str, path: str) -> bool:
    """Whether a setting may count the layers of a list: in a model of two halves, those of the right one.

    Examples:
        >>> _counts("decoder_layers", "model.decoder.layers"), _counts("decoder_layers", "model.encoder.layers")
        (True, False)
    """
    half = next((half for half in ("encoder", "decoder") if half in name), None)
    return name in _COUNTS and (half is None or f".{half}." in f".{path}.")

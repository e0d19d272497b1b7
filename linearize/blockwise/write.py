"""Put the compressed blocks together in one file of ours, or in a folder of transformers, tensor by tensor."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from linearize.blockwise.chain import BlockChain
from linearize.blockwise.source import Source, hollowed
from linearize.blockwise.work import Work
from linearize.checkpoint import save_from
from linearize.graph.capture import fake_inputs, normalize_inputs
from linearize.sites.record import Record, Step, record_of, set_record
from linearize.storage.shards import Shards, write_shards
from linearize.surgery.specs import replace_module
from linearize.zoo.stock import check_stock, turned_weights
from linearize.zoo.structure import stored_tensors
from linearize.zoo.transformers_models import without_bars

__all__ = ["put_together", "write_file", "write_folder"]

_OWN = ("config.json", "generation_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def put_together(source: Source, model: nn.Module, chain: BlockChain, work: Work, example: Any) -> nn.Module:
    """The whole compressed model: everything but its blocks has values.

    Args:
        source: of the original.
        model: with everything but its blocks; it is changed.
        chain: of its blocks.
        work: where the compressed blocks are.
        example: inputs of the model, for its record.
    """
    steps: list[Step] = []
    for position, path in enumerate(chain.blocks):
        small = hollowed(work.read(position, source.model.get_submodule(path)))
        record = record_of(small) or Record()
        steps += [{**step, "path": f"{path}.{step['path']}" if step["path"] else path} for step in record.steps]
        vars(small).pop("_linearize", None)
        replace_module(model, path, small)
    set_record(model, Record((), steps, fake_inputs(normalize_inputs(example))))
    return model


class Values:
    """The values of a model's tensors by name: of a block from its file, of everything else from the model."""

    def __init__(self, model: nn.Module, chain: BlockChain, work: Work) -> None:
        self.work, self.own = work, stored_tensors(model)
        self.places = {f"{path}.": position for position, path in enumerate(chain.blocks)}

    def __call__(self, name: str) -> Tensor:
        prefix = self.block(name)
        if prefix is None:
            return self.own[name]
        return self.work.tensor(self.places[prefix], name.removeprefix(prefix))

    def block(self, name: str) -> str | None:
        """The path of the block that a tensor is in, with a dot; None outside of all."""
        return next((prefix for prefix in self.places if name.startswith(prefix)), None)


def write_file(path: Path, model: nn.Module, chain: BlockChain, work: Work) -> None:
    """Write one file, which `linearize.load` reads.

    Raises:
        CheckpointError: it cannot be written.
    """
    save_from(model, path, Values(model, chain, work))


def write_folder(folder: Path, model: Any, chain: BlockChain, work: Work, source: Path | None) -> None:
    """Write a folder that transformers loads as one of its own models, a file for each block and one for the rest.

    Args:
        folder: it exists.
        model: as `put_together` gives it.
        chain: of its blocks.
        work: where these are.
        source: a folder whose other files, such as a tokenizer's, are copied.

    Raises:
        CheckpointError: no config tells the widths of this model, or a file cannot be written.
    """
    kind, state, config = check_stock(model)
    turned, values = turned_weights(model), Values(model, chain, work)
    stored = _stored_once(model)
    parts: dict[str | None, dict[str, Tensor]] = {None: {}, **{prefix: {} for prefix in values.places}}
    for name in stored:
        parts[values.block(name)][name] = state[name]

    def value(name: str) -> Tensor:
        found = values(name)
        return found.t().contiguous() if name in turned else found

    def each() -> Iterator[tuple[Mapping[str, Tensor], Any]]:
        for tensors in parts.values():
            yield tensors, value

    write_shards(folder, each(), len(parts))
    config = copy.deepcopy(config)
    config.architectures = [kind.__name__]
    config.dtype = next(model.parameters()).dtype
    with without_bars():
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        for path in sorted(source.iterdir()) if source is not None else ():
            if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _OWN:
                shutil.copyfile(path, folder / path.name)
        Shards.open(folder)
        config.save_pretrained(folder)  # last: a folder with a config is complete


def _stored_once(model: nn.Module) -> list[str]:
    """Names of all tensors, those that are shared under the first only."""
    first: dict[int, str] = {}
    for name, tensor in stored_tensors(model).items():
        first.setdefault(id(tensor), name)
    return list(first.values())

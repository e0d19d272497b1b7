"""`linearize compress hf:FOLDER --data DATA --params 0.8 --engine blockwise --out DIR`: a block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from linearize.blockwise.verb import compress_blockwise
from linearize.cli import common
from linearize.cli.text import text_for
from linearize.data.documents import is_text
from linearize.errors import DataError, UsageError
from linearize.storage import tensorfile
from linearize.storage.folders import write_text
from linearize.zoo.hollow import hollow

__all__ = ["batches_of_tensors", "run"]

_BATCH = 64  # samples, where nothing is said


def run(
    spec: str,
    data: str,
    out: Path,
    budgets: Mapping[str, Any],
    *,
    stock: bool,
    batch: int | None,
    seed: int,
    json: bool,
    reading: Mapping[str, Any],
    refused: Iterable[str] = (),
    **images: Any,
) -> None:
    """Carry the command out.

    Args:
        spec: "hf:" and a folder.
        data: a .safetensors file with the inputs of the model by name, or text or images as for the whole engine.
        out: folder for the results.
        budgets: by name, those that were given.
        stock: write a folder for transformers.
        batch: samples in a batch; None takes what the kind of data has.
        seed: of everything random.
        json: print JSON.
        reading: of text: tokenizer, context and column.
        refused: options that were given, and that this engine does not have.
        images: size and number of images.

    Raises:
        UsageError: an option that only the whole engine has, or no folder of transformers.
    """
    others = [*(name for name in budgets if name not in ("params", "flops")), *refused]
    if others:
        found = f"found beside --engine blockwise, which has --params and --flops, and trains nothing: --{others[0]}"
        raise UsageError("--engine", found, "Leave that out, or use --engine whole.")
    folder = Path(spec.removeprefix("hf:")).expanduser()
    if not spec.startswith("hf:") or not folder.is_dir():
        raise UsageError("MODEL", f"found {spec!r:.120}", "Pass hf:FOLDER, a folder that save_pretrained wrote.")
    if data.endswith(".safetensors"):
        batches: Iterable[Any] = batches_of_tensors(Path(data), batch or _BATCH)
    elif is_text(data):
        batches = text_for(hollow(folder), spec, data, reading, batch=batch, seed=seed, **images).train
    else:
        batches = common.data_for(hollow(folder), data, seed=seed, batch=batch or _BATCH, **images).train
    target = out / ("stock" if stock else "compressed.safetensors")
    with common.named_as_typed():
        result = compress_blockwise(
            folder, batches, target, checkpoint_dir=out / "unfinished", seed=seed, progress=common.say, **budgets
        )
    write_text(out / "plan.json", result.plan.to_json() + "\n")
    result.report.save(out / "report.json")
    if json:
        common.print_json({"model": str(target), **result.report.to_dict()})
        return
    typer.echo(str(result.report))
    typer.echo(f"written to {out}: plan.json, report.json, {target.name}")


def batches_of_tensors(path: Path, size: int) -> list[dict[str, Tensor]]:
    """The tensors of a file, such as "input_ids" (samples, positions), as batches of keyword arguments.

    Raises:
        DataError: they are of different lengths, or there are none.
        CheckpointError: the file cannot be read.
    """
    tensorfile.read_header(path)
    found = tensorfile.read_tensors(path, "cpu")
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in found.values()}
    if len(lengths) != 1 or not min(lengths):
        remedy = "Save the inputs of the model by name, such as input_ids and attention_mask."
        raise DataError(str(path), f"found tensors of lengths {sorted(lengths)}", remedy)
    (count,) = lengths
    return [{name: t[i : i + size] for name, t in found.items()} for i in range(0, count, size)]

"""`linearize bench A B --suite FILE --out DIR`, and `linearize bench report DIR...`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from torch import nn

from linearize.cli import common
from linearize.errors import UsageError
from linearize.report.charts import in_seconds
from linearize.report.timing import write_result
from linearize.storage.atomic import file_checksum
from linearize.suite.matrix import Cell, read_suite
from linearize.suite.merge import flat_rows, machines_of, to_csv
from linearize.suite.page import suite_page
from linearize.suite.run import run_suite
from linearize.text_table import render

__all__ = ["merge", "suite", "take_only"]

_PAGE, _TABLE = "suite.html", "suite.csv"


def take_only(context: typer.Context, names: Collection[str], what: str) -> None:
    """Refuse options that were given and have no meaning beside another one.

    Raises:
        UsageError: one of them was given.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in names and source is not None and source.name == "COMMANDLINE":
            option = f"--{name.rstrip('_').replace('_', '-')}"
            raise UsageError(
                option, f"found beside {what}", "Leave it out; what is measured stands in the file of the suite."
            )


def suite(
    specs: Sequence[str],
    path: Path,
    out: Path | None,
    *,
    arguments: list[str] | None,
    pretrained: bool | None,
    device: str | None,
    retry: bool,
    json: bool,
) -> None:
    """Measure models in every cell of a suite.

    Raises:
        LinearizeError: the suite, a model or the folder cannot be used.
    """
    if out is None:
        raise UsageError("--out", "is missing", "Pass a folder for the results.")
    if len(specs) < 2:
        raise UsageError("bench", f"found {len(specs)} model", "Name the original first, and one or more others.")
    chosen = read_suite(path)
    if device is not None:
        chosen = replace(chosen, device=device)
    names = _names(specs)
    models = _opened(dict(zip(names, specs, strict=True)), arguments, pretrained, chosen.seed)
    first = models[names[0]]

    def inputs(batch: int, shape: str | None) -> Any:
        try:
            return common.inputs_for(first, batch=batch, shape=shape, seed=chosen.seed)
        except UsageError as error:
            if "--shape" not in error.remedy:
                raise
            raise UsageError(error.where, error.found, "Write shapes into the suite, such as [3x224x224].") from error

    inputs(1, next(iter(chosen.shapes), None))  # that they can be made at all is seen before anything is measured
    about = {
        name: {"model": Path(spec).name, "sha256": file_checksum(spec)}
        if _is_file(spec)
        else {"model": spec, "arguments": arguments}
        for name, spec in zip(names, specs, strict=True)
    }
    records = run_suite(models, chosen, out, inputs=inputs, about=about, retry=retry, say=common.say)
    _write(out, [out])
    if json:
        common.print_json(records)
    else:
        typer.echo(render(["cell", "model", "median", "ratio [quartiles]", ""], _rows(records)))
        typer.echo(f"written to {out}: results.jsonl, {_PAGE}, {_TABLE}")


def merge(folders: Sequence[str], out: Path | None, *, json: bool) -> None:
    """Put the results of several folders side by side.

    Raises:
        UsageError: a folder holds no results, or there is no place for the page.
    """
    if out is None and len(folders) != 1:
        raise UsageError("--out", "is missing", "Pass a folder for the page of several results.")
    paths = [Path(folder) for folder in folders]
    machines = machines_of(paths)
    place = paths[0] if out is None else out
    if json:
        common.print_json([row for machine in machines for row in flat_rows(machine)])
    _write(place, paths)
    common.say(f"written to {place}: {_PAGE}, {_TABLE}")


def _write(place: Path, folders: Sequence[Path]) -> None:
    machines = machines_of(folders)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", f"cannot make the folder {place} ({error.strerror})", "Pass another.") from error
    write_result(place / _TABLE, to_csv(machines))
    write_result(place / _PAGE, suite_page(machines))


def _opened(
    specs: dict[str, str], arguments: list[str] | None, pretrained: bool | None, seed: int
) -> dict[str, nn.Module]:
    """The models; arguments are for those that are no files."""
    if arguments and all(map(_is_file, specs.values())):
        raise UsageError("--model-arg", "found with files, which fix their models", "Leave it out.")
    return {
        name: common.open_model(spec)
        if _is_file(spec)
        else common.open_model(spec, arguments, pretrained=pretrained, seed=seed)
        for name, spec in specs.items()
    }


def _is_file(spec: str) -> bool:
    return spec.endswith(".safetensors")


def _names(specs: Sequence[str]) -> list[str]:
    """The first is the original; the others have the names of their files, or what was typed where these are alike."""
    short = [Path(spec).stem if _is_file(spec) else spec for spec in specs]
    counts = Counter(short)
    rest = [
        name if counts[name] == 1 and name != "original" else spec
        for name, spec in zip(short[1:], specs[1:], strict=True)
    ]
    if len(set(rest)) < len(rest):
        raise UsageError("bench", "found a model twice among those to compare", "Name each once.")
    return ["original", *rest]


def _rows(records: Sequence[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for record in records:
        for name, result in record["models"].items():
            spread, ratio = result.get("seconds"), result.get("ratio")
            shown = None if ratio is None else f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
            median = None if spread is None else in_seconds(spread["median"])
            why = result.get("left_out", "")
            rows.append([str(Cell(**record["cell"])), name, median, shown, why])
    return rows

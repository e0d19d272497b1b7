"""`linearize verify A B`."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from linearize.cli import common
from linearize.errors import UsageError
from linearize.storage.atomic import file_checksum
from linearize.verify import verify as verify_models

__all__ = ["verify"]


def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help="The reference model; with --sha256 a file.")],
    candidate: Annotated[
        str | None,
        typer.Argument(metavar="B", help="The model to compare with it; with --sha256 a file, a digest, or nothing."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Compare on real images instead of random inputs: digits, or a folder."),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Number of batches to compare on.")] = 4,
    batch: common.BatchOption = 8,
    shape: common.ShapeOption = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative error that is allowed. Default: by the dtype, 1e-5 for float32."),
    ] = None,
    model_arg: common.ModelArgument = None,
    pretrained: common.PretrainedOption = None,
    seed: common.SeedOption = 0,
    sha256: Annotated[
        bool,
        typer.Option(
            "--sha256", help="Print the SHA-256 digest of file A, and compare it with B if given. No model is loaded."
        ),
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Check that two models compute the same function. The exit code is 0 if they do, and 1 if not.

    Example: [bold]linearize verify original.safetensors small.safetensors[/bold]

    Example: [bold]linearize verify small.safetensors --sha256[/bold]
    """
    if sha256:
        _digests(reference, candidate, json=json)
        return
    if candidate is None:
        raise UsageError("B", "is missing", "Pass two models, or one file with --sha256.")
    a, b = common.open_pair(reference, candidate, model_arg, pretrained=pretrained, seed=seed)
    inputs: list[Any]
    if data is not None:
        inputs = common.test_inputs(common.data_for(a, data, batch=batch, seed=seed, limit=batch * batches))
    else:
        inputs = [common.inputs_for(a, batch=batch, shape=shape, seed=seed + i) for i in range(batches)]
    found = verify_models(a, b, inputs, tolerance=tolerance)
    if json:
        common.print_json(found.to_dict())
    else:
        typer.echo(str(found))
    if not found:
        raise typer.Exit(1)


_DIGEST = re.compile("[0-9a-fA-F]{64}")


def _digests(file: str, other: str | None, *, json: bool) -> None:
    """Print the digest of a file, and compare it with that of another file, or with a digest."""
    found = file_checksum(file)
    wanted = None if other is None else other.lower() if _DIGEST.fullmatch(other) else file_checksum(other)
    if json:
        common.print_json({"file": file, "sha256": found, **({} if wanted is None else {"same": found == wanted})})
    else:
        typer.echo(f"{found}  {file}")
        if wanted is not None:
            typer.echo("the same" if found == wanted else f"not the same: expected {wanted}")
    if wanted not in (None, found):
        raise typer.Exit(1)

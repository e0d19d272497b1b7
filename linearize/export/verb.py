"""The verb: one model for another program's runtime, proven there before the file is put in its place."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from linearize import checks
from linearize.errors import ExportError, UsageError
from linearize.export import registry
from linearize.export.batches import batches_for
from linearize.export.card import card_of
from linearize.export.face import Format, Proof, Subject
from linearize.export.fit import check_exportable
from linearize.export.plain import allowance
from linearize.export.registry import format_of
from linearize.report.compression import Report
from linearize.running.models import evaluating
from linearize.storage.folders import write_text
from linearize.zoo.inputs import unwrap

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """What `export` has written. Prints as a few lines.

    Attributes:
        format: its name.
        path: the file or folder.
        files: names of all files, of a folder's or beside the file.
        size: bytes of all of them.
        facts: what a reader should know, such as the opset and the names of inputs.
        proof: what the real runtime gave; None if it was not asked.
    """

    format: str
    path: Path
    files: tuple[str, ...]
    size: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    proof: Proof | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        proof = None if self.proof is None else vars(self.proof)
        told = {"format": self.format, "path": str(self.path), "files": list(self.files), "size": self.size}
        return {**told, "facts": dict(self.facts), "proof": proof}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}, {self.size / 1e6:.1f} MB in {', '.join(self.files)}"]
        lines += [f"  {name}: {value}" for name, value in self.facts.items()]
        if self.proof is None:
            return "\n".join([*lines, "  not run in its runtime"])
        shapes = f"{self.proof.shapes} batches of different shapes or values"
        lines.append(f"  run in {self.proof.runtime}: at most {self.proof.error:.1e} off, relative, on {shapes}")
        return "\n".join([*lines, *([f"  {self.proof.told}"] if self.proof.told else [])])


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str,  # noqa: A002 - the word that everybody says
    example_inputs: Any = None,
    check: bool = True,
    overwrite: bool = False,
    tolerance: float | None = None,
    opset: int | None = None,
    external_data: bool | None = None,
    cache: bool | None = None,
    tokenizer: Any = None,
    card: bool | Report = False,
) -> Exported:
    """Write a model for another program's runtime, run it there, and keep the file only if it is the same function.

    Args:
        model: a model without gates, as `linearize.collapse` and `linearize.compress` give it, or any other; it is left
            as it is.
        path: the file or the folder to write, by the format. Everything is written beside it first, and moved when it
            is proven.
        format: "stock", "remote", "gguf", "decilm", "onnx", "openvino", "pt2" or "pte"; docs/deploy.md says of each
            what fits and what does not.
        example_inputs: as for `linearize.convert`: what is traced and compared on. Other numbers of samples, and other
            lengths of sequences, are made from it. None asks timm and transformers models themselves.
        check: run the file in the real runtime, on three batches. False writes it unproven.
        overwrite: replace what is there.
        tolerance: the largest relative error that passes; None takes that of the format.
        opset: version of ONNX's operators; None takes that of torch's exporter.
        external_data: ONNX weights in a file beside; None does so where they are too large for one file.
        cache: True writes one step of a model that generates, with keys and values in and out (docs/deploy.md).
        tokenizer: of a GGUF file: a fast tokenizer of transformers, or its folder; None writes numbers for words.
        card: write a model card, too: README.md of a folder, or a file beside with .md behind its name. The report of
            `linearize.compress` in its place adds what was measured.

    Returns:
        An `Exported`: `.path`, `.files`, `.facts`, `.proof`; it prints as a few lines.

    Raises:
        ExportError: the format cannot hold the model (which layer, why, and the nearest format that can), or what was
            written differs from the model by more than the tolerance; nothing is left of it then.
        UsageError: something is there already, a package is missing, or an option is not one of the format's.
        CaptureError: the inputs are not known, or the model cannot be captured.

    Examples:
        >>> import tempfile, torch
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(net, f"{folder}/net.onnx", format="onnx", example_inputs=torch.randn(2, 8))
        >>> made.facts["open sizes"], made.proof.error < 1e-5
        ('input [batch]', True)
    """
    checks.module("model", model)
    target = checks.path("path", path)
    chosen = format_of(format)
    for name, value in (("check", check), ("overwrite", overwrite)):
        checks.boolean(name, value)
    if not isinstance(card, bool | Report):
        checks.refuse("card", card, "True, False, or the report of linearize.compress")
    if tolerance is not None:
        checks.number("tolerance", tolerance, least=0)
    options = _options(chosen, opset=opset, external_data=external_data, cache=cache, tokenizer=tokenizer)
    _check_place(target, chosen, overwrite=overwrite)
    model = unwrap(model)
    check_exportable(model, chosen.name)
    _check_installed(chosen, check=check)
    with evaluating(model):
        subject = Subject(model, batches_for(model, example_inputs, fixed=chosen.fixed), options)
        return _written(subject, chosen, target, check=check, tolerance=tolerance, card=card)


def _written(
    subject: Subject, chosen: Format, target: Path, *, check: bool, tolerance: float | None, card: bool | Report
) -> Exported:
    """Write beside the target, check, move."""
    try:
        place = tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix=".linearize-export-")
    except OSError as error:
        found = f"cannot write beside {target} ({error.strerror})"
        raise UsageError("path", found, "Pass a path in a folder that exists and can be written.") from error
    with place as folder:
        made = Path(folder) / target.name
        facts = chosen.write(subject, made)
        proof = chosen.check(subject, made) if check else None
        allowed = tolerance
        if allowed is None:
            allowed = max(allowance(chosen, subject.model), 0.0 if proof is None else proof.allowed)
        if proof is not None and not proof.error <= allowed:
            found = f"in {proof.runtime} it is {proof.error:.1e} off, relative, where {allowed:.0e} is allowed"
            remedy = (
                "Nothing was written. Compare in float32, or pass tolerance= if the runtime computes in other types."
            )
            raise ExportError(f"format {chosen.name}", found, remedy)
        if card is not False:
            report = card if isinstance(card, Report) else None
            text = card_of(subject.model, chosen, target.name, facts, proof, report)
            write_text(made / "README.md" if made.is_dir() else made.with_name(f"{made.name}.md"), text)
        names = _moved(Path(folder), target)
    files = [target / name for name in names] if target.is_dir() else [target.parent / name for name in names]
    return Exported(chosen.name, target, tuple(names), sum(file.stat().st_size for file in files), facts, proof)


def _moved(folder: Path, target: Path) -> list[str]:
    """Move what was written to its place; names of the files."""
    if (folder / target.name).is_dir():
        if target.exists():  # it goes with the folder around what was written, once the new one is there
            target.rename(folder / f"{target.name}.before")
        (folder / target.name).rename(target)
        return sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
    files = sorted(
        folder.iterdir(), key=lambda file: (file.name == target.name, file.name)
    )  # what it refers to comes first
    for file in files:
        file.replace(target.parent / file.name)
    return [file.name for file in reversed(files)]


def _options(chosen: Format, **given: Any) -> dict[str, Any]:
    """The options of a format; others must not be given."""
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        if name not in chosen.options:
            takers = ", ".join(f'"{other.name}"' for other in registry.FORMATS.values() if name in other.options)
            raise UsageError(name, f'found {value!r:.80}, which "{chosen.name}" does not take', f"It is for {takers}.")
    if "opset" in found:
        checks.whole("opset", found["opset"], 18)
    for name in {"external_data", "cache"} & found.keys():
        checks.boolean(name, found[name])
    return found


def _check_place(target: Path, chosen: Format, *, overwrite: bool) -> None:
    """Before any work: the name fits, and nothing is lost that nobody gave up."""
    try:
        there, folder = target.exists(), target.is_dir()
        empty = folder and not any(target.iterdir())
    except OSError as error:
        raise UsageError("path", f"cannot use {target} ({error.strerror})", "Pass another path.") from error
    if chosen.suffix and target.suffix != chosen.suffix:
        found = f"found {str(target)!r:.120}, and {chosen.name} writes a file {chosen.suffix}"
        raise UsageError("path", found, f"Pass a path that ends in {chosen.suffix}.")
    if chosen.suffix and folder:
        raise UsageError("path", f"found the folder {target}, and {chosen.name} writes a file", "Pass another path.")
    if not chosen.suffix and there and not folder:
        raise UsageError("path", f"found the file {target}, and {chosen.name} writes a folder", "Pass another path.")
    if there and not empty and not overwrite:
        raise UsageError("path", f"found {target}, which exists already", "Pass overwrite=True, or another path.")


def _check_installed(chosen: Format, *, check: bool) -> None:
    for module, extra in {**chosen.writes, **(chosen.runs if check else {})}.items():
        if importlib.util.find_spec(module) is None:
            remedy = f'Install it: pip install "linearize[{extra}]".'
            if module not in chosen.writes:
                remedy += " check=False (--no-check) writes the file unproven."
            raise UsageError(f"format {chosen.name}", f"{module} is not installed", remedy)

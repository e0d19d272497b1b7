"""What a suite measures: a file is read, checked, and spread out into cells."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from linearize import checks
from linearize.errors import UsageError

__all__ = ["DTYPES", "WAYS", "WORK", "Cell", "Suite", "read_suite", "suite_of"]

WORK = ("forward", "generate")
WAYS = ("eager", "compile", "cudagraphs", "onnxruntime", "openvino")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}

_SHAPE = re.compile(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){0,7}")


@dataclass(frozen=True)
class Cell:
    """One setting in which all models are measured.

    Attributes:
        work: "forward" or "generate".
        way: how it is run, such as "compile".
        dtype: floating type of weights and inputs.
        batch: number of samples.
        shape: of one sample, such as "3x224x224"; "" for what the model takes.
        length: tokens of each sequence; 0 for what the model takes.
        new_tokens: tokens to generate; 0 for a forward pass.
        threads: of the CPU; 0 for torch's own number.
    """

    work: str
    way: str
    dtype: str
    batch: int
    shape: str = ""
    length: int = 0
    new_tokens: int = 0
    threads: int = 0

    @property
    def key(self) -> str:
        """What tells it from other cells."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def without_batch(self) -> str:
        """The setting without the batch size, in words."""
        return str(self).replace(f", batch {self.batch}", "", 1)

    def __str__(self) -> str:
        parts = [self.work, self.way, self.dtype, f"batch {self.batch}", self.shape]
        parts += [f"length {self.length}"] * bool(self.length)
        parts += [f"{self.new_tokens} new tokens"] * bool(self.new_tokens)
        parts += [f"{self.threads} threads" if self.threads > 1 else "1 thread"] * bool(self.threads)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Suite:
    """A matrix of cells, and how each is measured.

    Attributes:
        work, ways, dtypes, batch_sizes, shapes, lengths, new_tokens, threads: the axes of the matrix.
        device: where, such as "cuda:0"; "" takes an accelerator if there is one.
        rounds: measurements of each model in each cell.
        steady: warm-up ends when three measurements in a row differ by no more than this share.
        warmup_seconds: but after this time at the latest.
        energy_seconds: how long each model runs while its energy is read; 0 reads none.
        seed: of random weights and inputs.
    """

    work: tuple[str, ...] = ("forward",)
    ways: tuple[str, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float32",)
    batch_sizes: tuple[int, ...] = (1,)
    shapes: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    new_tokens: tuple[int, ...] = (64,)
    threads: tuple[int, ...] = ()
    device: str = ""
    rounds: int = 15
    steady: float = 0.03
    warmup_seconds: float = 20.0
    energy_seconds: float = 2.0
    seed: int = 0

    def cells(self) -> list[Cell]:
        """All cells; those that share a copy of the models follow each other.

        Examples:
            >>> [str(cell) for cell in Suite(dtypes=("float32", "bfloat16"), batch_sizes=(1,)).cells()]
            ['forward, eager, float32, batch 1', 'forward, eager, bfloat16, batch 1']
        """
        sizes = [(shape, 0) for shape in self.shapes] + [("", length) for length in self.lengths] or [("", 0)]
        found = [
            Cell(work, way, dtype, batch, shape, length, new, threads)
            for dtype, threads, work, way, (shape, length), batch in itertools.product(
                self.dtypes, self.threads or (0,), self.work, self.ways, sizes, self.batch_sizes
            )
            for new in (self.new_tokens if work == "generate" else (0,))
        ]
        return list(dict.fromkeys(found))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in a file; axes that are left to the models are not in it.

        Examples:
            >>> suite_of(Suite().to_dict(), "suite.yaml") == Suite()
            True
        """
        said = {name: value for name, value in asdict(self).items() if value != ()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}


def read_suite(path: Path) -> Suite:
    """Read a suite from a YAML or JSON file.

    Raises:
        UsageError: there is no such file, it is no YAML, or a value in it is not allowed.
    """
    remedy = "Pass a .yaml file, such as those in benchmarks/suites."
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"cannot be read ({getattr(error, 'strerror', None) or 'it is no text'})"
        raise UsageError(str(path), found, remedy) from error
    try:
        data = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(str(path), f"cannot be understood ({' '.join(str(error).split())})", remedy) from error
    return suite_of(data, str(path))


def suite_of(data: Any, where: str) -> Suite:
    """A suite from plain data.

    Args:
        data: keys and values.
        where: what names the source in messages.

    Raises:
        UsageError: an unknown key, or a value that is not allowed.

    Examples:
        >>> suite_of({"batch_sizes": [1, 32], "ways": "eager"}, "suite.yaml").batch_sizes
        (1, 32)
    """
    known = [field.name for field in fields(Suite)]
    if not isinstance(data, Mapping):
        raise UsageError(where, f"found {'nothing' if data is None else 'no keys'}", f"Known are {', '.join(known)}.")
    unknown = [str(key) for key in data if key not in known]
    if unknown:
        found = f"found the unknown key {', '.join(map(repr, unknown))}"
        raise UsageError(where, found, f"Known are {', '.join(known)}.")
    made = Suite(**{name: _CHECKS[name](f"{where}: {name}", value) for name, value in data.items()})
    if made.shapes and made.lengths:
        raise UsageError(f"{where}: shapes", "found beside lengths", "Leave one of them out.")
    if "generate" in made.work and not made.lengths:
        raise UsageError(f"{where}: lengths", "is missing, and generate needs prompts", "Add lengths: [128].")
    return made


def _words(known: tuple[str, ...]) -> Callable[[str, Any], tuple[str, ...]]:
    def check(name: str, value: Any) -> tuple[str, ...]:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed or not all(isinstance(word, str) for word in listed):
            checks.refuse(name, value, f"one or more of {', '.join(known)}")
        return tuple(checks.choice(name, word, known) for word in listed)

    return check


def _shapes(name: str, value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    words = [str(shape) if checks.is_whole(shape) else shape for shape in listed]  # YAML takes 224 for a number
    if not words or not all(isinstance(shape, str) and _SHAPE.fullmatch(shape) for shape in words):
        checks.refuse(name, value, "shapes of one sample, such as [3x224x224]")
    return tuple(words)


def _device(name: str, value: Any) -> str:
    """The name of a device; whether it is here is seen when it is used, on the machine where it is."""
    if not isinstance(value, str):
        checks.refuse(name, value, "the name of a device, such as cuda:0")
    try:
        return str(torch.device(value)) if value else ""
    except RuntimeError:
        checks.refuse(name, value, "the name of a device, such as cuda:0")


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "work": _words(WORK),
    "ways": _words(WAYS),
    "dtypes": _words(tuple(DTYPES)),
    "batch_sizes": checks.wholes,
    "shapes": _shapes,
    "lengths": checks.wholes,
    "new_tokens": lambda name, value: checks.wholes(name, value, 2),
    "threads": checks.wholes,
    "device": _device,
    "rounds": lambda name, value: checks.whole(name, value, 1, most=10_000),
    "steady": lambda name, value: checks.number(name, value, above=0),
    "warmup_seconds": lambda name, value: checks.number(name, value, least=0),
    "energy_seconds": lambda name, value: checks.number(name, value, least=0),
    "seed": checks.seed,
}


def _yaml(text: str) -> Any:
    """YAML without tags that make objects, and without keys that are there twice."""
    try:
        import yaml
    except ImportError as error:
        remedy = 'Install it: pip install "linearize[suite]". Or write the suite as a .json file.'
        raise UsageError("--suite", "PyYAML is not installed", remedy) from error

    class Strict(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - as in the base
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"the key {twice!r} is there twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=Strict)  # noqa: S506 - it is a safe loader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error

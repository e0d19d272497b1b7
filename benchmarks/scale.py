"""Time and peak memory of `linearize.compress_blockwise` on Llama shapes with random weights, from disk to disk.

    python benchmarks/scale.py --shape llama-1.1b                     # 22 layers, 1.1 B parameters, 2.2 GB on the disk
    python benchmarks/scale.py --shape llama-3.1-8b --layers 2        # two layers of the true widths
    python benchmarks/scale.py --table benchmarks/results/scale-*.json    # what was measured, and counts for 8B and 70B

The model is written shard by shard, and compressed in a process of its own, whose peak of resident memory the system
tells (`VmHWM`, which counts mapped pages of files, too). One forward pass of the same blocks over the same hidden
states is timed for comparison. Random weights say nothing about quality, and nothing is said of it here.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.report.timing import environment
from linearize.storage.shards import write_shards
from linearize.text_table import render_markdown


@dataclass(frozen=True)
class Shape:
    """The widths of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    vocabulary: int

    def block(self) -> int:
        """Parameters of a block."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * head * self.groups
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden


SHAPES = {
    "tiny": Shape(64, 256, 3, 4, 2, 100),
    "llama-1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": Shape(8192, 28672, 80, 64, 8, 128256),
}


def make(folder: Path, shape: Shape) -> None:
    """Write a model of random weights in bfloat16, one block in memory at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, vocab_size=shape.vocabulary,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        key = ".".join(name.split(".")[:3]) if ".layers." in name else "rest"
        parts.setdefault(key, {})[name] = tensor

    def value(name: str) -> Tensor:
        like = state[name]
        if like.dim() == 1:
            return torch.ones_like(like, device="cpu")
        seed = torch.Generator().manual_seed(sorted(state).index(name))
        return torch.randn(like.shape, generator=seed).mul_(like.shape[-1] ** -0.5).to(like.dtype)

    def each() -> Iterator[tuple[Mapping[str, Tensor], Any]]:
        for tensors in parts.values():
            yield tensors, value

    write_shards(folder, each(), len(parts))


def compress(folder: Path, out: Path, shape: Shape, tokens: int, length: int, params: float) -> dict[str, Any]:
    """Compress a folder in this process, and say what it took."""
    import linearize

    before = _peak()
    data = [torch.randint(shape.vocabulary, (1, length)) for _ in range(tokens // length)]
    start = time.perf_counter()
    result = linearize.compress_blockwise(folder, data, out, params=params, progress=_say)
    seconds = time.perf_counter() - start
    report = result.report
    return {
        "seconds": seconds, "peak": _peak(), "before": before, "asked": params, "reached": report.reached,
        "blocks": [note.seconds for note in report.blocks], "engine": report.engine, "drift": report.drift,
        "parameters": report.parameters,
    }  # fmt: skip


def forward(folder: Path, shape: Shape, tokens: int, length: int) -> float:
    """Seconds of one forward pass of the model's blocks over as many tokens."""
    from linearize.blockwise.source import source_of_folder
    from linearize.zoo.hollow import without_cache

    source = source_of_folder(folder)
    block = source.block("model.layers.0")
    rotary = source.model.get_submodule("model.rotary_emb")
    state = torch.randn(1, length, shape.hidden, dtype=torch.bfloat16)
    with torch.no_grad(), without_cache(block):
        places = rotary(state, torch.arange(length)[None])
        block(state, position_embeddings=places)
        start = time.perf_counter()
        for _ in range(tokens // length):
            block(state, position_embeddings=places)
    return (time.perf_counter() - start) * shape.layers


@dataclass(frozen=True)
class Machine:
    """Rates that are assumed, in units per second.

    Attributes:
        half: operations in bfloat16.
        single: in float32.
        double: in float64.
        overhead: seconds that a block takes in Python, whatever its size.
    """

    half: float
    single: float
    double: float
    overhead: float


# One core: what products reached in processor time on the machine of the results. GPU: half of an H100's data sheet.
MACHINES = {"one core": Machine(4e11, 6e10, 3e10, 4.0), "one GPU": Machine(4e14, 2.5e13, 3e13, 4.0)}
ASSUMPTIONS = """Counts, not measurements; on a GPU nothing was run, and blocks do not go there yet.
C: width of the FFN, O: hidden width, T: tokens of calibration (1.5 C), W: parameters of a block, at 2 bytes each.
Memory: 0.9 GB for Python and its libraries, 4 W (the block, with gates, a copy at work, the result), 3 C^2 float64
(the covariance, its factor, its inverse), 4 O C float64 (weights as they are fitted), 2 T O (states before and behind).
Time of a block: 4 passes of 2 W T in bfloat16; C^2 T in float32; 4 C^3 in float64 (Cholesky, inverse, removal, fit);
and what Python takes. Reading and writing files is left out. Rates are those of MACHINES."""


def memory(shape: Shape, tokens: int) -> float:
    """Bytes at the peak, as counted."""
    c, o = shape.intermediate, shape.hidden
    return 0.9e9 + 4 * 2 * shape.block() + 8 * (3 * c * c + 4 * o * c) + 2 * tokens * o * 2


def seconds(shape: Shape, tokens: int, machine: Machine) -> float:
    """Time of all blocks, as counted."""
    c = shape.intermediate
    half, single, double = 8.0 * shape.block() * tokens, float(c) ** 2 * tokens, 4.0 * float(c) ** 3
    return shape.layers * (half / machine.half + single / machine.single + double / machine.double + machine.overhead)


def table(paths: Sequence[Path]) -> str:
    """What was measured, beside what is counted; and counts for larger shapes."""
    rows: list[list[object]] = []
    for path in paths:
        told = json.loads(path.read_text(encoding="utf-8"))
        shape = Shape(**{name: told[name] for name in Shape.__dataclass_fields__})
        block = sorted(told["blocks"])[len(told["blocks"]) // 2]
        rows.append([
            f"{told['shape']}, {shape.layers} layers", told["tokens"], f"{told['peak'] / 1e9:.2f}",
            f"{memory(shape, told['tokens']) / 1e9:.2f}", f"{block:.0f}", f"{told['forward'] / shape.layers:.1f}",
        ])  # fmt: skip
    head = ["measured", "tokens", "peak GB", "counted GB", "seconds a block", "its forward pass"]
    more = []
    for name in ("llama-1.1b", "llama-3.1-8b", "llama-3.1-70b"):
        shape = SHAPES[name]
        tokens = int(1.5 * shape.intermediate)
        hours = [f"{seconds(shape, tokens, machine) / 3600:.1f}" for machine in MACHINES.values()]
        more.append([f"{name}, {shape.layers} layers", tokens, f"{memory(shape, tokens) / 1e9:.1f}", *hours])
    counted = ["counted", "tokens", "peak GB", *(f"hours, {name}" for name in MACHINES)]
    return "\n\n".join([render_markdown(head, rows), render_markdown(counted, more), ASSUMPTIONS])


def _peak() -> int:
    """Peak of resident memory in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells may be the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {_peak() / 1e9:.2f} GB  {text}", file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One shape, made, compressed and timed, each in a process of its own."""
    shape = _shape(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.place) as name:
        folder, out = Path(name, "model"), Path(name, "small")
        folder.mkdir()
        make(folder, shape)
        size = sum(path.stat().st_size for path in folder.iterdir())
        found = {}
        for part in ("compress", "forward"):
            command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--at", name]
            found[part] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        after = sum(path.stat().st_size for path in out.iterdir())
    threads = torch.get_num_threads()
    return {
        "shape": arguments.shape, **asdict(shape), "tokens": arguments.tokens, "length": arguments.length,
        "bytes": size, "bytes after": after, **found["compress"], "forward": found["forward"], "threads": threads,
        **environment(torch.device("cpu"), torch.bfloat16),
        "command": f"python benchmarks/scale.py --shape {arguments.shape}"
        + (f" --layers {arguments.layers}" if arguments.layers else "")
        + f" --tokens {arguments.tokens} --length {arguments.length} --params {arguments.params}",
    }  # fmt: skip


def _shape(arguments: argparse.Namespace) -> Shape:
    shape = SHAPES[arguments.shape]
    return Shape(**{**asdict(shape), "layers": arguments.layers or shape.layers})


def main() -> None:
    """Measure one shape, or print the table of several results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens of a batch")
    parser.add_argument("--params", type=float, default=0.8, help="budget")
    parser.add_argument("--place", help="folder for the models")
    parser.add_argument("--table", type=Path, nargs="+", help="print a table of results instead of measuring")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--part", choices=["compress", "forward"], help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    shape = _shape(arguments)
    if arguments.part == "compress":
        folder, out = arguments.at / "model", arguments.at / "small"
        found: Any = compress(folder, out, shape, arguments.tokens, arguments.length, arguments.params)
        print(json.dumps(found))
        return
    if arguments.part == "forward":
        print(json.dumps(forward(arguments.at / "model", shape, arguments.tokens, arguments.length)))
        return
    found = measure(arguments)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

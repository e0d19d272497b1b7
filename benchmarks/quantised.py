"""Compression and quantisation together: all-MiniLM-L6-v2 as it is, compressed, quantised, and both, in three runtimes.

    python benchmarks/quantised.py [--flops 0.7] [--calibrate 256] [--test 128] [--rounds 7] [--json FILE]

Needs the extras "bench", "onnx", "gguf" and "interop", no network, and some minutes on one core. Quality is the cosine
between the embedding of a sentence and the original model's in PyTorch; sentences are those of minilm.py, none of which
calibration has seen. Latencies are of eight sentences of 32 tokens, all models in turns in one process, as ratios to
the original in the same runtime. llama.cpp's include what its server does around the model.

Of GGUF's kinds of numbers, those are measured that the gguf package writes: it reads Q4_K, and does not write it, and
MiniLM's rows of 384 numbers are no multiple of the 256 that a K-quant's block has. Q4_0 stands in its place.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minilm  # type: ignore[import-not-found]
import torch
from torch import Tensor, nn

import linearize
from linearize.bench import interleaved
from linearize.cost import cost
from linearize.report.timing import Ratio, environment, write_json
from linearize.text_table import render_markdown

HERE = Path(__file__).resolve().parent
LENGTH, SENTENCES = 32, 8
Batch = dict[str, Tensor]


class Way:
    """One model in one runtime: embeddings of batches, and its size in bytes."""

    def __init__(self, run: Callable[[Batch], Tensor], size: int) -> None:
        self.run, self.size = run, size

    def embed(self, batches: list[Batch]) -> Tensor:
        """Embeddings of length one."""
        return torch.cat([nn.functional.normalize(self.run(batch), dim=1) for batch in batches])


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def in_torch(model: nn.Module, config: Any = None) -> Way:
    """As it is, or quantised by torchao."""
    if config is not None:
        from torchao.quantization import quantize_

        model = copy.deepcopy(model)
        quantize_(model, config)

    @torch.no_grad()
    def run(batch: Batch) -> Tensor:
        return pooled(model(**batch).last_hidden_state, batch["attention_mask"])

    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/model.pt")
        return Way(run, Path(f"{folder}/model.pt").stat().st_size)


def in_onnxruntime(path: Path) -> Way:
    """A file in ONNX Runtime."""
    from linearize.export.onnx import OrtSession

    session = OrtSession(path).session
    names = [entry.name for entry in session.get_inputs()]

    def run(batch: Batch) -> Tensor:
        states = session.run(None, {name: batch[name].numpy() for name in names})[0]
        return pooled(torch.from_numpy(states), batch["attention_mask"])

    return Way(run, path.stat().st_size)


def in_llamacpp(path: Path) -> Way:
    """A file in llama.cpp, in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 4096, 4096, 4096, SENTENCES
    params.n_gpu_layers, params.warmup, params.embedding = 0, False, True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)

    def run(batch: Batch) -> Tensor:
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        said = server.handle_embeddings({"input": [ids[mask.bool()].tolist() for ids, mask in rows]})
        return torch.tensor([entry["embedding"] for entry in sorted(said["data"], key=lambda entry: entry["index"])])

    return Way(run, path.stat().st_size)


def requantised(path: Path, target: Path, kind: str) -> Path:
    """A GGUF file whose matrices are quantised, but for those that are looked up by position."""
    import gguf

    reader, wanted = gguf.GGUFReader(str(path)), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        plain = tensor.data.ndim < 2 or tensor.name.startswith(("position_embd", "token_types"))
        if plain:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def ways_of(name: str, model: nn.Module, batch: Batch, folder: Path) -> dict[tuple[str, str, str], Way]:
    """All ways of one model, by (runtime, model, numbers)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    found = {
        ("PyTorch", name, "float32"): in_torch(model),
        ("PyTorch", name, "torchao int8 weights"): in_torch(model, Int8WeightOnlyConfig()),
        ("PyTorch", name, "torchao int8 dynamic"): in_torch(model, Int8DynamicActivationInt8WeightConfig()),
    }
    file = folder / f"{name}.onnx"
    linearize.export(model, file, format="onnx", example_inputs=batch)
    quantize_dynamic(file, folder / f"{name}-int8.onnx", weight_type=QuantType.QInt8)
    found["ONNX Runtime", name, "float32"] = in_onnxruntime(file)
    found["ONNX Runtime", name, "int8 dynamic"] = in_onnxruntime(folder / f"{name}-int8.onnx")
    file = folder / f"{name}.gguf"
    linearize.export(model, file, format="gguf", example_inputs={"input_ids": batch["input_ids"]})
    found["llama.cpp", name, "float32"] = in_llamacpp(file)
    for kind in ("Q8_0", "Q4_0"):
        found["llama.cpp", name, kind] = in_llamacpp(requantised(file, folder / f"{name}-{kind}.gguf", kind))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A row per model, runtime and kind of numbers."""
    source, texts = minilm.sentences()
    tokenizer, original = minilm.load_original()
    known = minilm.batches(tokenizer, texts[: options.calibrate])
    test = minilm.batches(tokenizer, texts[options.calibrate : options.calibrate + options.test], size=SENTENCES)
    how: dict[str, Any] = {
        "target": "gguf",
        "uniform": True,
        "families": ("channels",),
        "search": 0,
        "exclude": "pooler.*",
    }
    made = linearize.compress(original, known, flops=options.flops, rounds=0, progress=False, cache=False, **how)
    with tempfile.TemporaryDirectory() as folder:
        batch = {name: tensor[:SENTENCES, :LENGTH].contiguous() for name, tensor in known[-1].items()}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        ways: dict[tuple[str, str, str], Way] = {}
        for name, model in {"original": original, "compressed": made.model}.items():
            ways |= ways_of(name, model, batch, Path(folder))
        reference = ways["PyTorch", "original", "float32"].embed(test)
        load = os.getloadavg()
        runs: dict[str, Callable[[], Any]] = {" | ".join(key): _call(way, batch) for key, way in ways.items()}
        samples = interleaved(runs, torch.device("cpu"), options.rounds, 1)
        rows = []
        for key, way in ways.items():
            base = samples[" | ".join((key[0], "original", "float32"))]
            ratios = [a / b for a, b in zip(samples[" | ".join(key)], base, strict=True)]
            ratio = Ratio.of(" | ".join(key), key[0], SENTENCES, ratios, compiled=False)
            cosines = (way.embed(test) * reference).sum(1)
            rows.append({
                "runtime": key[0], "model": key[1], "numbers": key[2], "bytes": way.size,
                "cosine_mean": float(cosines.mean()), "cosine_5th_percentile": float(cosines.quantile(0.05)),
                "latency_ratio": {"median": ratio.median, "q1": ratio.q1, "q3": ratio.q3},
            })  # fmt: skip
    flops = cost(made.model, batch).flops / cost(original, batch).flops
    told = {"sentences": source, "flops": flops, "load_average": [round(value, 1) for value in load]}
    facts = environment(torch.device("cpu"), torch.float32)
    return {**told, "environment": facts, "cpu_seconds": round(time.process_time()), "rows": rows}


def _call(way: Way, batch: Batch) -> Callable[[], Any]:
    return lambda: way.run(batch)


def table(found: dict[str, Any]) -> str:
    """A row per model, runtime and kind of numbers, in Markdown."""
    rows = []
    for row in found["rows"]:
        ratio = row["latency_ratio"]
        spread = f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
        cosines = (f"{row['cosine_mean']:.4f}", f"{row['cosine_5th_percentile']:.3f}")
        rows.append([row["runtime"], row["model"], row["numbers"], *cosines, f"{row['bytes'] / 1e6:.1f}", spread])
    return render_markdown(["runtime", "model", "numbers", "cosine", "5th pct", "MB", "latency [quartiles]"], rows)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=0.7, help="budget of the compressed model")
    parser.add_argument("--calibrate", type=int, default=256, help="sentences to calibrate on")
    parser.add_argument("--test", type=int, default=128, help="sentences to compare embeddings on")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "quantised.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    print(table(found))
    write_json(options.json, found)


if __name__ == "__main__":
    main()

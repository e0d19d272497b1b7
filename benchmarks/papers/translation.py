"""English to German by a small Marian model, from random weights, on short messages of real programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from benchmarks.papers.catalogues import Pair, split
from benchmarks.papers.networks import translator
from benchmarks.papers.training import Task
from linearize.running.models import evaluating

__all__ = ["Corpus", "corpus", "translation_task"]

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
_LONGEST = 40  # tokens of a sentence
_IGNORED = -100


@dataclass(frozen=True)
class Corpus:
    """Parallel text as tokens of one vocabulary.

    Attributes:
        tokenizer: of the tokenizers library, byte pairs learned on the training text of both languages.
        train: token ids of source and target, the end token last.
        test: pairs of text.
    """

    tokenizer: Any
    train: list[tuple[list[int], list[int]]]
    test: list[Pair]


def corpus(pairs: Sequence[Pair], vocabulary: int, test: int) -> Corpus:
    """Learn a vocabulary and encode."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    train, held_out = split(pairs, test)
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, END, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator([text for pair in train for text in pair], trainer)
    end: Any = tokenizer.token_to_id(END)

    def encode(text: str) -> list[int]:
        return [*tokenizer.encode(text).ids[: _LONGEST - 1], end]

    return Corpus(tokenizer, [(encode(source), encode(target)) for source, target in train], held_out)


def translation_task(text: Corpus, seed: int, *, lr: float, width: int = 64, batch: int = 64) -> Task:
    """Translation by a network whose weights and whose order of sentences the seed decides."""
    tokenizer = text.tokenizer
    pad, end = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
    torch.manual_seed(seed)
    plain = translator(tokenizer.get_vocab_size(), pad, end, width=width)

    def collate(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        sources, targets = padded([s for s, _ in pairs], pad), padded([t for _, t in pairs], pad)
        mask = targets != pad
        started = torch.cat((torch.full((len(pairs), 1), pad), targets[:, :-1]), 1)
        return {
            "input_ids": sources,
            "attention_mask": (sources != pad).long(),
            "decoder_input_ids": started,
            "decoder_attention_mask": mask.long(),
            "labels": targets.masked_fill(~mask, _IGNORED),
        }

    example = {name: value for name, value in collate(text.train[:2]).items() if name != "labels"}
    model = linearize.convert(plain, {**example, "use_cache": False})

    def pick(step: int) -> dict[str, Tensor]:
        each = len(text.train) // batch
        order = _order(len(text.train), seed, step // each)
        return collate([text.train[place] for place in order[step % each * batch :][:batch]])

    def loss(trained: nn.Module, held: dict[str, Tensor]) -> Tensor:
        return trained(**held, use_cache=False).loss  # type: ignore[no-any-return]

    def score(trained: nn.Module) -> dict[str, float]:
        return quality(translate(trained, text), [target for _, target in text.test])

    known = text.train[:512]
    calibration = [collate(known[start : start + 128]) for start in range(0, len(known), 128)]
    return Task(model, pick, loss, score, calibration, lr)


def padded(rows: Sequence[list[int]], pad: int) -> Tensor:
    """Token ids (N, T)."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


@cache
def _order(count: int, seed: int, epoch: int) -> list[int]:
    found: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist()
    return found


def translate(model: nn.Module, text: Corpus) -> list[str]:
    """Translations of the test text, word by word the likeliest."""
    tokenizer = text.tokenizer
    pad, end = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
    sources = padded([[*tokenizer.encode(s).ids[: _LONGEST - 1], end] for s, _ in text.test], pad)
    generate: Any = model.generate
    with evaluating(model):
        mask = (sources != pad).long()
        found = generate(input_ids=sources, attention_mask=mask, max_new_tokens=_LONGEST, num_beams=1, do_sample=False)
    return [str(tokenizer.decode(row)) for row in found.tolist()]


def quality(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Two measures, chrF and BLEU, as shares, 0 to 1 (Popović, 2015; Papineni et al., 2002), by sacrebleu."""
    import sacrebleu

    chrf = sacrebleu.corpus_chrf(list(translations), [list(references)]).score
    bleu = sacrebleu.corpus_bleu(list(translations), [list(references)]).score
    return {"chrF": chrf / 100, "BLEU": bleu / 100}

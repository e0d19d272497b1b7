"""Text as batches for a model: packed into blocks of tokens, with a part that is held back.

Shape letters: N blocks, B blocks in a batch, T tokens in a block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize import checks
from linearize.data.documents import is_text, pieces_of
from linearize.data.tokens import TextEncoder, packed
from linearize.errors import DataError, UsageError
from linearize.zoo.text import is_encoder_decoder, longest_context, open_tokenizer, takes_ids, tokenizer_of, vocabulary

__all__ = ["TextBatches", "TextSource", "is_text", "load_text", "read_if_text"]

_IGNORED = -100
_CONTEXT = 512  # tokens in a block, unless the model takes fewer
_BATCH = 8


class TextBatches:
    """Batches of blocks that can be read several times. If shuffled, (seed, epoch) decides the order of each pass.

    Args:
        blocks: token ids (N, T).
        batch_size: B.
        labels: with the tokens as labels, as training needs them.
        named: batches are dicts with `input_ids`; otherwise bare tensors (or pairs, with labels).
        shuffle: another order in each epoch.
        seed: of these orders.

    Examples:
        >>> batches = TextBatches(torch.arange(6).view(3, 2), 2)
        >>> [batch["input_ids"].tolist() for batch in batches]
        [[[0, 1], [2, 3]], [[4, 5]]]
    """

    def __init__(
        self,
        blocks: Tensor,
        batch_size: int,
        *,
        labels: bool = False,
        named: bool = True,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed
        self.labels, self.named, self.shuffle = labels, named, shuffle
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.blocks) / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = torch.arange(len(self.blocks))
        if self.shuffle:  # a prime keeps the seeds of all (seed, epoch) apart
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._epoch)
            self._epoch += 1
            order = torch.randperm(len(self.blocks), generator=generator)
        for chosen in order.split(self.batch_size):
            ids = self.blocks[chosen].long()
            if self.named:
                yield {"input_ids": ids, "labels": ids.clone()} if self.labels else {"input_ids": ids}
            else:  # whoever takes a bare tensor compares its output with what comes next
                yield (ids, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=_IGNORED)) if self.labels else ids


@dataclass(frozen=True)
class TextSource:
    """Text, ready for a model.

    Attributes:
        name: where it comes from.
        train: batches to calibrate on.
        test: batches that are held back; empty if nothing is.
        context: T.
    """

    name: str
    train: TextBatches
    test: TextBatches
    context: int


def load_text(
    data: Any,
    model: nn.Module,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    column: str | None = None,
    batch_size: int = _BATCH,
    limit: int | None = None,
    labels: bool = False,
    hold_back: bool = True,
    seed: int = 0,
) -> TextSource:
    """Open text as batches for a model.

    Args:
        data: a .txt, .jsonl or .parquet file, a folder of them, a data set with columns (or a dict of its parts), or a
            list of texts or rows.
        model: that will read it; it tells the form of the batches and the largest context.
        tokenizer: one of transformers or tokenizers, a function from a text to token ids, or the path of one. None
            takes the one in the model's folder.
        context: number of tokens in a block; None takes 512, or the model's largest if that is smaller.
        column: of the text; None takes "text", or the only column of strings.
        batch_size: number of blocks in a batch.
        limit: largest number of blocks to calibrate on; reading stops there.
        labels: with labels, for training.
        hold_back: hold back a tenth; False takes all to calibrate on.
        seed: of the order of the blocks in each epoch.

    Raises:
        DataError: the text is missing, empty, damaged or too short, or the tokenizer does not fit the model.
        UsageError: the context is longer than the model's, or a number is out of range.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(128, 4), nn.Linear(4, 128))
        >>> letters = lambda text: [ord(letter) for letter in text]
        >>> source = load_text(["hello world"] * 30, model, tokenizer=letters, context=16)
        >>> len(source.train.blocks), len(source.test.blocks), next(iter(source.test)).shape
        (18, 2, torch.Size([2, 16]))
    """
    size = context_for(model, context)
    checks.whole("batch_size", batch_size, 1)
    if limit is not None:
        checks.whole("limit", limit, 1)
    if column is not None and not isinstance(column, str):
        checks.refuse("column", column, "the name of a column")
    if is_encoder_decoder(model):
        wrong = "found text for a model with an encoder and a decoder, of which each has an input of its own"
        raise DataError("data", wrong, "Pass batches, as its processor makes them.")
    encoder = TextEncoder.of(_tokenizer(model, tokenizer))
    name = os.fspath(data) if isinstance(data, str | os.PathLike) else "data"
    found = packed(
        pieces_of(data, column),
        encoder,
        size,
        most=limit,
        known=vocabulary(model),
        hold_back=hold_back,
        where=str(name),
    )
    named = takes_ids(model)
    train = TextBatches(found.calibration, batch_size, labels=labels, named=named, shuffle=True, seed=seed)
    return TextSource(str(name), train, TextBatches(found.held, batch_size, named=named), size)


def context_for(model: nn.Module, context: int | None) -> int:
    """The number of tokens in a block.

    Raises:
        UsageError: it is longer than what the model was made for.
    """
    most = longest_context(model)
    if context is None:
        return min(_CONTEXT, most or _CONTEXT)
    checks.whole("context", context, 2)
    if most is not None and context > most:
        raise UsageError("context", f"found {context}, and the model was made for {most} tokens", "Pass a smaller one.")
    return int(context)


def _tokenizer(model: nn.Module, given: Any) -> Any:
    if given is None:
        return tokenizer_of(model)
    return open_tokenizer(given) if isinstance(given, str | Path) else given


def read_if_text(data: Any, model: Any, **options: Any) -> TextSource | None:
    """What `load_text` makes of text; None for anything else, which has no use for a tokenizer.

    Raises:
        LinearizeError: as for `load_text`; or there is a tokenizer, and no text.
    """
    if isinstance(model, nn.Module) and is_text(data):
        return load_text(data, model, **options)
    if isinstance(data, str | os.PathLike):
        for _ in pieces_of(data):  # its first file says what is wrong
            break
        raise DataError(os.fspath(data), "holds no text", "Pass batches, or a .txt, .jsonl or .parquet file.")
    for name in ("tokenizer", "context", "column"):
        if options.get(name) is not None:
            found = f"found beside data of type {type(data).__name__}, which are no text"
            raise UsageError(name, found, "Pass a .txt, .jsonl or .parquet file, a folder of them, or a list of texts.")
    return None

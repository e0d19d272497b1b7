"""From texts to blocks of tokens: one way to call tokenizers of several libraries, and the packing.

Shape letters: N blocks, T tokens in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linearize.data.documents import Passage
from linearize.errors import DataError

__all__ = ["Packed", "TextEncoder", "packed"]

_SAMPLE = "a"
_EVERY = 10  # of so many documents, or blocks, one is held back
_MANY = 20  # documents, from which on whole documents are held back


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer as a function, and the tokens that it puts around a text.

    Attributes:
        ids: of a text, without tokens around it.
        before: what the tokenizer puts before a text; every block begins with it.
        after: what ends a document.
    """

    ids: Callable[[str], list[int]]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> TextEncoder:
        """From a tokenizer of transformers or tokenizers, anything else with `encode`, or a function of a text.

        Raises:
            DataError: it is none of these, or gives no token ids.

        Examples:
            >>> TextEncoder.of(lambda text: [ord(letter) for letter in text]).ids("ab")
            [97, 98]
        """
        tokenizer = _unbounded(tokenizer)
        plain = _caller(tokenizer)
        bare, whole = plain(_SAMPLE), _with_all(tokenizer, plain)
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0) if bare else 0
        before, after = tuple(whole[:start]), tuple(whole[start + len(bare) :])
        ending = getattr(tokenizer, "eos_token_id", None)
        if not after and isinstance(ending, int):
            after = (ending,)
        return cls(plain, before, after)


def _unbounded(tokenizer: Any) -> Any:
    """The tokenizer; a copy of it, if it cuts off long texts or pads short ones."""
    if getattr(tokenizer, "truncation", None) is None and getattr(tokenizer, "padding", None) is None:
        return tokenizer
    if not hasattr(tokenizer, "to_str"):
        return tokenizer
    copied = type(tokenizer).from_str(tokenizer.to_str())
    copied.no_truncation()
    copied.no_padding()
    return copied


def _caller(tokenizer: Any) -> Callable[[str], list[int]]:
    encode = getattr(tokenizer, "encode", tokenizer)
    if not callable(encode):
        found = f"found a {type(tokenizer).__name__}"
        raise DataError("tokenizer", found, "Pass one of transformers or tokenizers, or a function of a text.")
    options: dict[str, Any] = {"add_special_tokens": False}
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        options["verbose"] = False  # it warns of texts longer than the model's context, which are cut into blocks here
    try:
        encode(_SAMPLE, **options)
    except TypeError:
        options = {}
    return lambda text: _ids(encode(text, **options))


def _with_all(tokenizer: Any, plain: Callable[[str], list[int]]) -> list[int]:
    encode = getattr(tokenizer, "encode", None)
    try:
        return plain(_SAMPLE) if encode is None else _ids(encode(_SAMPLE, add_special_tokens=True))
    except TypeError:
        return plain(_SAMPLE)


def _ids(found: Any) -> list[int]:
    """Token ids, in whatever a tokenizer gives them."""
    found = found["input_ids"] if isinstance(found, Mapping) or hasattr(found, "input_ids") else found
    found = getattr(found, "ids", found)
    found = found.tolist() if hasattr(found, "tolist") else found
    if isinstance(found, list | tuple) and all(type(one) is int for one in found):
        return list(found)
    raise DataError("tokenizer", f"gave a {type(found).__name__} of a text, and no list of token ids", "Pass another.")


@dataclass
class Packed:
    """Blocks (N, T) to calibrate on and to test on, int32."""

    calibration: Tensor
    held: Tensor


@dataclass
class _Stream:
    """Documents as tokens."""

    documents: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, ids: list[int]) -> None:
        self.documents.append(torch.tensor(ids, dtype=torch.int32))
        self.tokens += len(ids)

    def blocks(self, before: tuple[int, ...], context: int) -> Tensor:
        """Whole blocks of the documents in a row; the rest is left out."""
        return _blocks(self.documents, before, context)


def _blocks(documents: Iterable[Tensor], before: tuple[int, ...], context: int) -> Tensor:
    row = torch.cat([torch.zeros(0, dtype=torch.int32), *documents])
    body = context - len(before)
    count = len(row) // body
    start = torch.tensor(before, dtype=torch.int32).expand(count, len(before))
    return torch.cat((start, row[: count * body].view(count, body)), dim=1)


def packed(
    pieces: Iterable[Passage], encoder: TextEncoder, context: int, *, most: int | None = None, known: int | None = None,
    hold_back: bool = True, where: str = "data",
) -> Packed:  # fmt: skip
    """Documents one after the other, cut into blocks; a tenth is held back.

    Whole documents are held back if the source says which, or if there are at least 20; else the last blocks are.

    Args:
        pieces: of documents.
        encoder: the tokenizer.
        context: T.
        most: number of blocks to calibrate on, after which reading stops; None reads everything.
        known: number of tokens that the model knows; None does not check.
        hold_back: False holds nothing back, unless the source does.
        where: the source, for errors.

    Raises:
        DataError: the text is too short, or the tokenizer gives tokens that the model does not know.
    """
    body = context - len(encoder.before)
    if body < 2:
        found = f"found {context}, of which the tokenizer takes {len(encoder.before)} for itself"
        raise DataError("context", found, "Pass a larger one.")
    streams = _read(pieces, encoder, body, most, known)
    loose = streams[None].documents
    held, calibration = streams[True], streams[False]
    if hold_back and loose and not held.tokens:
        whole = [document for index, document in enumerate(loose) if index % _EVERY < _EVERY - 1]
        parts = whole, loose[_EVERY - 1 :: _EVERY]
        two = [_blocks(part, encoder.before, context) for part in parts]
        if len(loose) < _MANY or not all(map(len, two)):
            row = _blocks(loose, encoder.before, context)
            cut = max(1, len(row) // _EVERY)
            two = [row[:-cut], row[-cut:]]
    else:
        two = [_blocks([*calibration.documents, *loose], encoder.before, context), held.blocks(encoder.before, context)]
    _check_length(two, context, streams, hold_back=hold_back, where=where)
    return Packed(two[0][:most], two[1][: _to_hold(most)])


def _to_hold(most: int | None) -> int | None:
    return None if most is None else max(1, most // (_EVERY - 1))


def _read(
    pieces: Iterable[Passage], encoder: TextEncoder, body: int, most: int | None, known: int | None
) -> dict[bool | None, _Stream]:
    """Tokens of all documents, by what the source says of them, as many as are needed."""
    streams: dict[bool | None, _Stream] = {kind: _Stream() for kind in (None, False, True)}
    wanted: dict[bool | None, float] = dict.fromkeys(streams, float("inf"))
    if most is not None:
        kept = _to_hold(most) or 1
        # Where whole documents are held back, they are of any length: some more are read than are needed.
        wanted = {None: 2 * body * (most + kept), False: body * most, True: body * kept}
    document: list[int] = []
    for piece in pieces:
        stream = streams[piece.held]
        if stream.tokens >= wanted[piece.held]:
            if piece.held is None:
                break
            continue
        ids = encoder.ids(piece.text)
        _check_ids(ids, known)
        document += ids
        if piece.ends or len(document) >= wanted[piece.held]:
            stream.add([*document, *encoder.after])
            document = []
    return streams


def _check_ids(ids: list[int], known: int | None) -> None:
    if ids and known is not None and (max(ids) >= known or min(ids) < 0):
        found = f"gives the token {max(ids) if max(ids) >= known else min(ids)}, and the model knows 0 to {known - 1}"
        raise DataError("tokenizer", found, "Pass the tokenizer that the model was trained with.")


def _check_length(
    two: list[Tensor], context: int, streams: Mapping[bool | None, _Stream], *, hold_back: bool, where: str
) -> None:
    total = sum(stream.tokens for stream in streams.values())
    if not total:
        raise DataError(where, "found no text", "Pass files or rows with text.")
    if not len(two[0]) or (hold_back and not len(two[1])):
        kind = "one block to calibrate on" if not len(two[0]) else "one block to hold back"
        found = f"found {total} tokens in all, too few for {kind} of {context}"
        raise DataError(where, found, "Pass more text, or a smaller context.")

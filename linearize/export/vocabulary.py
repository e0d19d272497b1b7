"""The vocabulary of a .gguf file: from a tokenizer, or a list of numbers where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from linearize.errors import ExportError, UsageError

__all__ = ["add_vocabulary", "check_tokenizer", "vocabulary_tokenizer"]

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
# How texts are split before pairs of tokens are joined, as llama.cpp names the ways.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
_ROLES = {"bos": "cls", "eos": "sep"}  # what encoders put around a text
_TEXTS = ["Hello world", "It's 12345 o'clock,  isn't it?\n\nYes.", "Grüße 你好 ", "x = [1, 2]  # done\t!"]


def vocabulary_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer, or that of a folder.

    Raises:
        UsageError: it is none, or none that says what it does.
    """
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        except (OSError, ValueError) as error:
            line = str(error).partition("\n")[0]
            raise UsageError("tokenizer", f"cannot read it ({line})", "Pass a folder with tokenizer.json.") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        found = f"found a {type(tokenizer).__name__}, which has no backend_tokenizer"
        raise UsageError("tokenizer", found, "Pass a fast tokenizer of transformers, or its folder.")
    return tokenizer


def add_vocabulary(writer: Any, tokenizer: Any, words: int, config: Any, *, pieces: bool = False) -> str:
    """Write the vocabulary of a tokenizer, or one of numbers; what was written, in words.

    Args:
        writer: of the file.
        tokenizer: a fast tokenizer, or its folder; None for numbers.
        words: rows of the embedding.
        config: of the model.
        pieces: whether it is an encoder's, whose words are split into WordPieces.

    Raises:
        UsageError: llama.cpp is not known here to split texts as the tokenizer does.
    """
    if tokenizer is None:
        # llama.cpp's server needs tokens with a text; these say their own number, and no text is split into them.
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"[{i}]" for i in range(words)])
        writer.add_token_types([_USER] * words)
        writer.add_token_merges(["[ ]"])
        writer.add_add_bos_token(value=False)
        for name in ("bos", "eos"):
            number = getattr(config, f"{name}_token_id", None)
            if isinstance(number, int) and 0 <= number < words:
                getattr(writer, f"add_{name}_token_id")(number)
        return f"numbers from 0 to {words - 1}, as no tokenizer was given"
    known = vocabulary_tokenizer(tokenizer)
    data = json.loads(known.backend_tokenizer.to_str())
    if pieces:
        return _add_pieces(writer, known, data, words)
    split = _split(data)
    tokens, types = _tokens(data, words)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(known, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(_adds_bos(known))
    if isinstance(getattr(known, "chat_template", None), str):
        writer.add_chat_template(known.chat_template)
    return f"{len(known)} tokens, split as {split}"


def _add_pieces(writer: Any, tokenizer: Any, data: dict[str, Any], words: int) -> str:
    """A vocabulary of WordPieces, which llama.cpp keeps with a sign before what begins a word."""
    normal, kind = data.get("normalizer") or {}, data["model"]["type"]
    if kind != "WordPiece" or normal.get("type") != "BertNormalizer" or not normal.get("lowercase"):
        found = f"found a {kind} tokenizer" + (" that keeps capitals" if kind == "WordPiece" else "")
        remedy = "Leave it out: programs then take numbers of tokens. Encoders need WordPiece in small letters."
        raise UsageError("tokenizer", found, remedy)
    tokens, types = _tokens(data, words)
    prefix = data["model"]["continuing_subword_prefix"]
    for i, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ == _NORMAL and not (token.startswith("[") and token.endswith("]")):
            tokens[i] = token.removeprefix(prefix) if token.startswith(prefix) else f"\u2581{token}"
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "sep", "unk", "pad", "mask"):
        number = getattr(tokenizer, f"{_ROLES.get(name, name)}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    return f"{len(tokenizer)} WordPieces"


def check_tokenizer(path: Path, tokenizer: Any) -> None:
    """See that llama.cpp makes the same tokens of some texts.

    Raises:
        ExportError: it does not.
    """
    from linearize.export.llamacpp import ask

    if tokenizer is None:
        return
    known = vocabulary_tokenizer(tokenizer)
    special = known.cls_token_id is not None  # an encoder's, whose texts stand between two of them
    _, _, found = ask(path, [], text=_TEXTS, special=special)
    for text, ids in zip(_TEXTS, found, strict=True):
        wanted = known(text, add_special_tokens=special)["input_ids"]
        if ids != wanted:
            what = f"llama.cpp makes {ids} of {text!r}, the tokenizer {wanted}"
            raise ExportError("tokenizer", what, "Leave tokenizer= out, and give the program numbers of tokens.")


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _tokens(data: dict[str, Any], words: int) -> tuple[list[str], list[int]]:
    """Text and type of each number; numbers without a token are there, and unused."""
    tokens, types = [f"[unused{i}]" for i in range(words)], [_UNUSED] * words
    for token, number in data["model"]["vocab"].items():
        tokens[number], types[number] = token, _NORMAL
    for entry in data.get("added_tokens") or []:
        tokens[entry["id"]], types[entry["id"]] = entry["content"], _CONTROL if entry["special"] else _USER
    return tokens, types


def _split(data: dict[str, Any]) -> str:
    """The name of the way in which texts are split.

    Raises:
        UsageError: it has none.
    """
    kind = data["model"]["type"]
    steps = data.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    bytes_ = next((part for part in parts if part.get("type") == "ByteLevel"), None)
    if kind != "BPE" or bytes_ is None or data.get("normalizer") not in (None, {"type": "NFC"}):
        found = f"found a {kind} tokenizer that is not of bytes" if kind == "BPE" else f"found a {kind} tokenizer"
        raise UsageError("tokenizer", found, "Leave it out: programs then take numbers of tokens.")
    pattern = next((part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"), None)
    if pattern is None and bytes_.get("use_regex", True) and not bytes_.get("add_prefix_space"):
        return "gpt-2"
    if pattern not in _SPLITS:
        found = f"it splits texts in a way that is not known here ({pattern!r:.100})"
        raise UsageError("tokenizer", found, "Leave it out: programs then take numbers of tokens.")
    return _SPLITS[pattern]

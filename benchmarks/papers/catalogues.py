"""Real parallel text: what the translators of free software wrote into its gettext catalogues."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["PACKAGES", "parallel_text", "split"]

PACKAGES = ("django", "wagtail", "weblate")  # on PyPI; their wheels hold the catalogues as text
Pair = tuple[str, str]


def catalogues(language: str, folder: Path | None) -> list[Path]:
    """The .po files of a language in a folder, or in those of `PACKAGES` that are installed."""
    if folder is not None:
        return sorted(folder.glob(f"**/{language}/LC_MESSAGES/*.po"))
    specs = [importlib.util.find_spec(name) for name in PACKAGES]
    roots = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None]
    return [path for root in roots for path in sorted(root.glob(f"**/{language}/LC_MESSAGES/*.po"))]


def parallel_text(language: str, folder: Path | None = None, most_words: int = 5) -> list[Pair]:
    """English messages and their translations, each English one once, in an order that only its letters decide.

    Messages that differ in case and punctuation alone count as one; longer ones than `most_words` are left out.
    """
    found: dict[str, Pair] = {}
    for path in catalogues(language, folder):
        for source, target in _messages(path):
            fits = all(0 < len(text.split()) <= most_words for text in (source, target))
            key = "".join(letter for letter in source.lower() if letter.isalnum())
            if fits and key:
                found.setdefault(key, (source, target))
    return [found[key] for key in sorted(found, key=lambda key: hashlib.sha256(key.encode()).hexdigest())]


def _messages(path: Path) -> Iterator[Pair]:
    import polib

    for entry in polib.pofile(str(path)).translated_entries():
        pairs = [(entry.msgid, entry.msgstr)]
        if entry.msgid_plural:
            pairs = list(zip((entry.msgid, entry.msgid_plural), entry.msgstr_plural.values(), strict=False))
        for source, target in pairs:
            yield " ".join(source.split()), " ".join(target.split())


def split(pairs: Sequence[Pair], test: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and so many to test on."""
    return list(pairs[test:]), list(pairs[:test])

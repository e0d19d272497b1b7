"""What readers of models raise where a model is not what they know."""

from __future__ import annotations

__all__ = ["Unlike"]


class Unlike(Exception):
    """A model, or a part of it, is not what is expected there, or not what can be told.

    Args:
        where: path of the module.
        why: what was found there, as a part of a sentence.
    """

    def __init__(self, where: str, why: str) -> None:
        super().__init__(where, why)
        self.where, self.why = where, why

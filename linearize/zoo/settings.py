"""What a configuration says, and example tensors with the sizes and values that it names."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from linearize.zoo.building import affordable

_SPECIAL = re.compile(r".*(token_ids?|token_index|_pad_id|_bos_id|_eos_id)")


class Settings:
    """A model's configuration with its parts, and tensors of the model's kind.

    Args:
        model: the model.
        batch: B.
        like: a tensor of the model, for device and dtype.
    """

    def __init__(self, model: Any, batch: int, like: Tensor) -> None:
        self.model, self.config, self.batch = model, model.config, batch
        self.device, self.dtype = like.device, like.dtype

    def _configs(self, parts: tuple[str, ...] = ()) -> list[Any]:
        """The configuration and its parts, those whose key contains one of ``parts`` first."""
        preferred: list[Any] = []
        others: list[Any] = []
        for key, part in vars(self.config).items():
            if hasattr(part, "to_dict"):
                inner = [value for value in vars(part).values() if hasattr(value, "to_dict")]
                (preferred if any(word in key for word in parts) else others).extend([part, *inner])
        return [*preferred, self.config, *others]

    def _setting(self, *names: str, parts: tuple[str, ...] = (), default: Any = None) -> Any:
        """The first of ``names`` that is set anywhere."""
        for config in self._configs(parts):
            for name in names:
                try:
                    value = getattr(config, name, None)
                except Exception:  # settings that differ by layer refuse to be read
                    value = None
                if value is not None:
                    return value
        return default

    def _affordable(self, *shape: int) -> tuple[int, ...]:
        return affordable(type(self.model).__name__, *shape)

    def _floats(self, *shape: int) -> Tensor:
        return torch.randn(self._affordable(*shape), device=self.device, dtype=self.dtype)

    def _ones(self, *shape: int) -> Tensor:
        return torch.ones(self._affordable(*shape), dtype=torch.long, device=self.device)

    def _ids(self, high: int, *shape: int) -> Tensor:
        """Random indices that are no special tokens."""
        special: set[Any] = set()
        for config in self._configs():
            for name, value in vars(config).items():
                if _SPECIAL.fullmatch(name):
                    special.update(value if isinstance(value, (list, tuple)) else [value])
        shape = self._affordable(*shape)
        allowed = [i for i in range(min(high, 1000)) if i not in special and i > 3] or [0]
        return torch.tensor(allowed, device="cpu")[torch.randint(len(allowed), shape)].to(self.device)

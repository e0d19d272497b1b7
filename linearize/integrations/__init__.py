"""Gated and collapsed models in the training loops of other libraries: what each needs, by the hooks that it has.

Nothing here is imported by `import linearize`, and a library is imported when the name that needs it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from linearize.integrations.attach import Attached, attach
from linearize.integrations.groups import gates_apart

if TYPE_CHECKING:
    from linearize.integrations.lightning_callback import LightningPrior
    from linearize.integrations.sentences import sentence_module
    from linearize.integrations.sharded import whole_state
    from linearize.integrations.trainer import PriorCallback, gated_optimizer, gated_optimizer_groups

__all__ = [
    "Attached",
    "LightningPrior",
    "PriorCallback",
    "attach",
    "gated_optimizer",
    "gated_optimizer_groups",
    "gates_apart",
    "sentence_module",
    "whole_state",
]

_AT = {
    "LightningPrior": "lightning_callback",
    "PriorCallback": "trainer",
    "gated_optimizer": "trainer",
    "gated_optimizer_groups": "trainer",
    "sentence_module": "sentences",
    "whole_state": "sharded",
}


def __getattr__(name: str) -> Any:
    if name not in _AT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_AT[name]}"), name)

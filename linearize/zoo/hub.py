"""What model hubs read of a model: where it came from, and the front matter of its card."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["base_of", "front_matter"]


def base_of(model: nn.Module) -> str:
    """Name of the model that it was made from on a hub, "OWNER/NAME"; "" if it did not come from there.

    Examples:
        >>> base_of(nn.Linear(2, 2))
        ''
    """
    config: Any = getattr(model, "config", None)
    told = getattr(config, "_name_or_path", "") or (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id") or ""
    owner, slash, rest = str(told).partition("/")
    return str(told) if slash and owner and rest and "/" not in rest and not owner.startswith(".") else ""


def front_matter(model: nn.Module, library: str) -> str:
    """The head of a card: what loads the folder, and what it was made from.

    Args:
        model: any.
        library: what loads the folder, as hubs name it.

    Examples:
        >>> print(front_matter(nn.Linear(2, 2), "linearize"))
        ---
        library_name: linearize
        tags: [linearize]
        ---
    """
    base = base_of(model)
    made = [f"base_model: {base}"] if base else []
    return "\n".join(["---", f"library_name: {library}", *made, "tags: [linearize]", "---"])

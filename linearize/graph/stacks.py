"""Which module made the call of an operation in a captured graph."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

WRAPPED = "model"  # the path of the model inside the wrapper that is captured


@dataclass(frozen=True)
class Call:
    """One call of one module: its path in the model and which call of that module it is, from 0."""

    path: str
    index: int


def stack_of(node: fx.Node, kinds: dict[str, type]) -> list[tuple[str, str]]:
    """The module calls around an op, outermost first: torch.export's key of each call, and the module's path.

    Some calls are told by the path from their caller alone (a forward that was put on an object). A path that leads to
    no module of the class that was called is left out: its ops then belong to the caller, as a function's do.
    """
    found: list[tuple[str, str]] = []
    for key, (told, kind) in (node.meta.get("nn_module_stack") or {}).items():
        caller = found[-1][1] if found else ""
        below = re.sub(r"@\d+", "", told)
        places = [_strip(told)] if _is_whole(told) else []
        places += [f"{caller}.{below}" if caller else below]
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        path = next((p for p in places if p in kinds and _named(kinds[p]) == name), None)
        if path is None and not found:
            path = ""  # the outermost call, of the wrapper that `capture` puts around the model
        if path is not None:
            found.append((key, path))
    return found


def _is_whole(told: str) -> bool:
    return told in ("", WRAPPED) or told.startswith((f"{WRAPPED}.", f"{WRAPPED}@"))


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def call_of(key: str, path: str) -> Call:
    """The call that torch.export has given a key."""
    repeat = re.search(r"@(\d+)$", key)
    return Call(path, int(repeat.group(1)) if repeat else 0)


def _strip(path: str) -> str:
    path = re.sub(r"@\d+", "", path)
    return "" if path == WRAPPED else path.removeprefix(f"{WRAPPED}.")

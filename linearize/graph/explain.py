"""Why a model could not be captured: its inputs, its code or our own machinery. Only a plain run can tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.graph.opaque import packed_modules
from linearize.graph.protect import untouched
from linearize.nest import copied, leaves_of
from linearize.tensors import QUANTISE_LATER

__all__ = ["explain"]


def explain(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], error: Exception) -> tuple[str, str, str]:
    """Whether the inputs, the capture or our own machinery failed: only a plain run can tell."""
    name = type(model).__name__
    scripted = next((path for path, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        return scripted or name, "is a scripted module, which has no Python left to rewrite", "Put the eager one there."
    why = f"{type(error).__name__}: {_line(error) or type(error).__name__}"
    try:
        with untouched(model), torch.no_grad():
            args, kwargs = copied(inputs)
            model(*args, **kwargs)
    except Exception as failure:  # of the model, or of what protects it
        if not _runs(model, inputs):
            shapes = [tuple(leaf.shape) for _, leaf in leaves_of(inputs) if isinstance(leaf, Tensor)]
            found = (
                f"does not run on the example inputs of shapes {shapes} ({type(failure).__name__}: {_line(failure)})"
            )
            return name, found, "Pass example_inputs= that the model's forward takes."
        why = f"{type(failure).__name__}: {_line(failure)}"
        remedy = "Please report this model; convert the submodule that holds the activations until then."
        return name, f"runs by itself, but not where linearize watches it ({why})", remedy
    packed = next(iter(packed_modules(model)), None)
    if packed is not None:
        found = f"runs, but torch.export cannot capture it with quantised or packed layers such as {packed}"
        return name, found, f"{QUANTISE_LATER.capitalize()}."
    return (
        name,
        f"runs, but torch.export cannot capture it ({why})",
        "Make the control flow independent of the data, or convert the submodule that holds the activations.",
    )


def _line(error: Exception) -> str:
    return next((line for line in str(error).strip().splitlines() if line.strip()), "")


def _runs(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether a model runs without any of our protection, but for its modes and what it keeps on its modules."""
    held = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(*inputs[0], **inputs[1])
    except Exception:  # whatever the model's own code raises
        return False
    finally:
        for module, attributes in held:
            vars(module).clear()
            vars(module).update(attributes)
    return True

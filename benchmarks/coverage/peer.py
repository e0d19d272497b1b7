"""Torch-Pruning on the same models, with the recipe of its own documentation, for comparison."""

from __future__ import annotations

import time

from benchmarks.coverage.cases import timm_case
from benchmarks.coverage.pool import Record
from linearize.graph.capture import tensors_of

RATIO = 0.25
FIELDS = ("name", "family", "result", "parameters", "parameters_after", "flops", "flops_after", "seconds")


def pruned(name: str, family: str) -> Record:
    """Remove a quarter of all channels by magnitude, the classifier's outputs excepted, and run the result.

    Heads of attention are declared, as the library's examples for vision transformers do. The model may come out
    with another function: all that is asked is that it comes out smaller, runs, and gives outputs of the same shape.
    """
    import torch
    import torch_pruning as tp
    from torch import nn

    from linearize.cost import cost

    case = timm_case(name, float("inf"), shallow=False)
    model, (image,) = case.model.float(), case.inputs[0]
    image = image.float()
    record: Record = {"name": name, "family": family}
    start = time.perf_counter()
    try:
        before, shape = cost(model, image), [tuple(t.shape) for t in tensors_of(model(image))]
        classes = getattr(model, "num_classes", 1000)
        heads = {
            module.qkv: module.num_heads
            for module in model.modules()
            if isinstance(getattr(module, "qkv", None), nn.Linear)
            and isinstance(getattr(module, "num_heads", None), int)
        }
        last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
        pruner = tp.pruner.MagnitudePruner(
            model, image, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=RATIO,
            ignored_layers=last, num_heads=heads,
        )  # fmt: skip
        pruner.step()
        with torch.no_grad():
            after = [tuple(t.shape) for t in tensors_of(model(image))]
        smaller = cost(model, image)
    except Exception as error:  # whatever it raises is the result
        reason = " ".join(str(error).split())[:160]
        return {
            **record,
            "result": f"{type(error).__name__}: {reason}",
            "seconds": round(time.perf_counter() - start, 1),
        }
    result = "runs" if after == shape else f"other output shape: {after} instead of {shape}"
    if result == "runs" and smaller.parameters >= before.parameters:
        result = "nothing was removed"
    return {
        **record,
        "result": result,
        "parameters": before.parameters,
        "parameters_after": smaller.parameters,
        "flops": before.flops,
        "flops_after": smaller.flops,
        "seconds": round(time.perf_counter() - start, 1),
    }

"""Which parameters of a model are used in more than one place."""

from __future__ import annotations

from torch import Tensor, nn

from linearize.graph.capture import Capture, users
from linearize.tensors import has_memory


def shared_parameters(model: nn.Module, captured: Capture) -> dict[str, str]:
    """Name of each parameter or buffer that something else uses too, with the name of the other use."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shared = {name: names[names[0] == name] for names in _overlapping(tensors) if len(names) > 1 for name in names}
    for node, name in captured.parameters.items():
        readers = {captured.calls.get(user) for user in users(node)}
        if len(readers) > 1 and name not in shared:
            places = {call.path for call in readers if call is not None}
            shared[name] = "another use in " + (max(places, default="") or "the model itself")
    return shared


def _overlapping(tensors: list[tuple[str, Tensor]]) -> list[list[str]]:
    """Names of tensors grouped by common memory, where only a part is common, too."""
    spans: list[tuple[str, int, int, str]] = []
    for name, tensor in tensors:
        if tensor.device.type == "meta" or not tensor.numel() or not has_memory(tensor):
            spans.append(("object", id(tensor), id(tensor) + 1, name))
            continue
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), name))
    groups: list[list[str]] = []
    where, end = "", 0
    for device, start, stop, name in sorted(spans, key=lambda span: span[:2]):
        if device != where or start >= end:
            groups.append([])
            where, end = device, stop
        groups[-1].append(name)
        end = max(end, stop)
    return groups

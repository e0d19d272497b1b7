"""Networks of files that were written in format version 1; `tests/files` holds them, with what they put out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# --- nets


class Unit(nn.Module):
    """A gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.act, self.down = nn.Linear(4, 16), nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return out


def ramp(*sizes: int) -> Tensor:
    """Inputs that are the same on every machine."""
    count = torch.Size(sizes).numel()
    return (torch.arange(count, dtype=torch.float32) % 17 / 8 - 1).view(sizes)


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 24), nn.GELU(), nn.Linear(24, 5)), ramp(3, 4)),
    "unit": (Unit, ramp(3, 4)),
    "unit_all": (Unit, ramp(3, 4)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 4, 1, stride=2)),
        ramp(1, 3, 7, 7),
    ),
    "padded": (
        lambda: nn.Sequential(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 4, 3, padding=1)),
        ramp(1, 3, 7, 7),
    ),
    "padded_all": (
        lambda: nn.Sequential(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 4, 3, padding=1)),
        ramp(1, 3, 7, 7),
    ),
}

"""Make trained PyTorch models smaller and faster: find channels that need no nonlinearity, and remove them exactly."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from linearize._version import __version__ as __version__
from linearize.bench import benchmark
from linearize.calibrate import Calibration, calibrate
from linearize.checkpoint import load, save
from linearize.collapse import collapse
from linearize.compress import Result, compress
from linearize.convert import convert
from linearize.errors import (
    CaptureError,
    CheckpointError,
    CollapseError,
    ConvertError,
    DataError,
    ExportError,
    LinearizeError,
    TrainingError,
    UsageError,
)
from linearize.export.verb import Exported, export
from linearize.finetune import FinetuneResult, finetune
from linearize.gating.gate import ChannelGate, gates
from linearize.guard import guard_saving as _guard_saving  # noqa: F401 - with it, every record puts a guard on its model
from linearize.plan import Plan
from linearize.report.timing import BenchmarkResult
from linearize.report.verification import Verification
from linearize.summary import Summary, summary
from linearize.training.priors import SparsityPrior, param_groups
from linearize.verify import verify

if TYPE_CHECKING:
    from linearize.analysis.dimension import FunctionalDimension, functional_dimension
    from linearize.analysis.paths import PathLength, average_path_length
    from linearize.analysis.reduce import reduce
    from linearize.analysis.symmetries import hidden_symmetries
    from linearize.analysis.symmetry import Symmetry
    from linearize.blockwise.verb import BlockwiseResult, compress_blockwise

__all__ = [
    "BenchmarkResult",
    "BlockwiseResult",
    "Calibration",
    "CaptureError",
    "ChannelGate",
    "CheckpointError",
    "CollapseError",
    "ConvertError",
    "DataError",
    "ExportError",
    "Exported",
    "FinetuneResult",
    "FunctionalDimension",
    "LinearizeError",
    "PathLength",
    "Plan",
    "Result",
    "SparsityPrior",
    "Summary",
    "Symmetry",
    "TrainingError",
    "UsageError",
    "Verification",
    "average_path_length",
    "benchmark",
    "calibrate",
    "collapse",
    "compress",
    "compress_blockwise",
    "convert",
    "export",
    "finetune",
    "functional_dimension",
    "gates",
    "hidden_symmetries",
    "load",
    "param_groups",
    "reduce",
    "save",
    "summary",
    "verify",
]

# The laboratory and the engine for large models are loaded when they are first used: most programs never do.
_LATE = {
    "BlockwiseResult": "blockwise.verb",
    "FunctionalDimension": "analysis.dimension",
    "PathLength": "analysis.paths",
    "Symmetry": "analysis.symmetry",
    "average_path_length": "analysis.paths",
    "compress_blockwise": "blockwise.verb",
    "functional_dimension": "analysis.dimension",
    "hidden_symmetries": "analysis.symmetries",
    "reduce": "analysis.reduce",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'linearize' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"linearize.{_LATE[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

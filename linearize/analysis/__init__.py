"""What a network looks like inside: path lengths, core network, functional dimension, symmetries, separability."""

from __future__ import annotations

from linearize.analysis.core import Core, CoreRecorder, core_network
from linearize.analysis.dimension import FunctionalDimension, functional_dimension
from linearize.analysis.paths import PathGraph, PathLength, average_path_length
from linearize.analysis.tangent import TangentRecorder, kernel_distance, kernel_rank, tangent_kernel

__all__ = [
    "Core",
    "CoreRecorder",
    "FunctionalDimension",
    "PathGraph",
    "PathLength",
    "TangentRecorder",
    "average_path_length",
    "core_network",
    "functional_dimension",
    "kernel_distance",
    "kernel_rank",
    "tangent_kernel",
]

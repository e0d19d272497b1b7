"""What a network looks like inside: path lengths, core network, functional dimension, symmetries, separability."""

from __future__ import annotations

from linearize.analysis.canonical import canonical, canonical_distance
from linearize.analysis.core import Core, CoreRecorder, core_network
from linearize.analysis.dimension import FunctionalDimension, functional_dimension
from linearize.analysis.paths import PathGraph, PathLength, average_path_length
from linearize.analysis.reduce import reduce
from linearize.analysis.separability import Separability, class_separability
from linearize.analysis.symmetries import hidden_symmetries
from linearize.analysis.symmetry import Symmetry, draw_symmetries, symmetry_table
from linearize.analysis.tangent import TangentRecorder, effective_rank, kernel_distance, kernel_rank, tangent_kernel

__all__ = [
    "Core",
    "CoreRecorder",
    "FunctionalDimension",
    "PathGraph",
    "PathLength",
    "Separability",
    "Symmetry",
    "TangentRecorder",
    "average_path_length",
    "canonical",
    "canonical_distance",
    "class_separability",
    "core_network",
    "draw_symmetries",
    "effective_rank",
    "functional_dimension",
    "hidden_symmetries",
    "kernel_distance",
    "kernel_rank",
    "reduce",
    "symmetry_table",
    "tangent_kernel",
]

"""What a network looks like inside: path lengths, core network, functional dimension, symmetries, separability."""

from __future__ import annotations

from linearize.analysis.core import Core, CoreRecorder, core_network
from linearize.analysis.paths import PathGraph, PathLength, average_path_length

__all__ = ["Core", "CoreRecorder", "PathGraph", "PathLength", "average_path_length", "core_network"]

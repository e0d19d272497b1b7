"""What a network looks like inside: path lengths, core network, functional dimension, symmetries, separability."""

from __future__ import annotations

from linearize.analysis.paths import PathGraph, PathLength, average_path_length

__all__ = ["PathGraph", "PathLength", "average_path_length"]

"""The versions of what made a result."""

from __future__ import annotations

import platform
import sys

import torch

from linearize._version import __version__

__all__ = ["versions"]

_LIBRARIES = ("numpy", "timm", "transformers", "accelerate", "onnxruntime", "openvino")


def versions() -> dict[str, str]:
    """This package, torch, Python, and the libraries that are in use, by name.

    Examples:
        >>> list(versions())[:3]
        ['linearize', 'torch', 'python']
    """
    found = {"linearize": __version__, "torch": torch.__version__, "python": platform.python_version()}
    known = {name: getattr(sys.modules.get(name), "__version__", None) for name in _LIBRARIES}
    found |= {name: str(version) for name, version in known.items() if version}
    return found | {"system": f"{platform.system()} {platform.machine()}"}

"""docs/api.md has every public name, and every name that another page takes from a module of the package."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import linearize

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api.md"
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page != API)]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(linearize(?:\.\w+)+)")
SHOWN = re.compile(r"^::: (linearize(?:\.\w+)+)$", re.MULTILINE)


def shown(text: str) -> set[str]:
    return {path.rpartition(".")[2] for path in SHOWN.findall(text)}


def name_of(path: str) -> str | None:
    """The public name that a dotted path leads to: None for a module, and for what is none of ours (a file's name)."""
    here: ModuleType = linearize
    for part in path.split(".")[1:]:
        if part in getattr(here, "__all__", ()):
            return part
        try:
            here = import_module(f"{here.__name__}.{part}")
        except ImportError:
            return None
    return None


def used(page: str) -> set[str]:
    """Dotted paths of what a page takes from the package, in its code and between backticks."""
    found, modules = set(SPAN.findall(CODE.sub("", page))), {"linearize": "linearize"}
    for node in ast.walk(ast.parse("".join(CODE.findall(page)))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "linearize":
            paths = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            modules |= paths
            found |= set(paths.values())
    for node in ast.walk(ast.parse("".join(CODE.findall(page)))):
        parts = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
        if parts and parts[0] in modules and all(part.isidentifier() for part in parts):
            found.add(".".join([modules[parts[0]], *parts[1:]]))
    return found


def missing(page: str, api: str) -> set[str]:
    return {name for path in used(page) if (name := name_of(path)) is not None} - shown(api)


def test_every_public_name_is_shown() -> None:
    assert set(linearize.__all__) - shown(API.read_text()) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_uses_is_shown(page: Path) -> None:
    assert missing(page.read_text(), API.read_text()) == set()


def test_a_missing_name_is_found() -> None:
    page = (
        "See `linearize.cost.cost(model, x)` and `linearize.safetensors`.\n"
        "```python\nfrom linearize import zoo\nimport linearize\n"
        "linearize.Plan.from_json(zoo.create('timm:test_vit'))\n```\n"
    )
    assert missing(page, "::: linearize.Plan\n") == {"cost", "create"}


def test_what_is_shown_is_there() -> None:
    for path in SHOWN.findall(API.read_text()):
        module, _, name = path.rpartition(".")
        spec = find_spec(module)  # not imported: some want a library that may not be here
        assert spec is not None, path
        assert spec.origin is not None, path
        assert f'"{name}"' in Path(spec.origin).read_text(encoding="utf-8"), path

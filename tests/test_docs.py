"""The documents: their code runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from linearize.algebra.forms import FORMS
from linearize.cli import app
from linearize.families.registry import FAMILIES
from linearize.plan import MASKED, NARROWED, UNCHANGED

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LARGE = ("lightning", "sentence_transformers", "diffusers", "peft")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
@pytest.mark.slow
# What the libraries of docs/pipelines.md say of themselves.
@pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n_steps|pytree|isinstance|covariance has no full rank).*")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*", "ignore::DeprecationWarning:lightning.*")
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page run in one namespace, in an empty folder, but for those of a library that is not here."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    text, left = page.read_text(), []
    for code in blocks(page, "python"):
        line = text[: text.index(code)].count("\n")
        if gone := [
            name for name in LARGE if re.search(rf"^(from|import) {name}\b", code, re.MULTILINE) and not find_spec(name)
        ]:
            left += gone
            continue
        exec(compile("\n" * line + code, str(page), "exec"), namespace)  # noqa: S102 - our own pages
    if left:
        pytest.skip(f"all ran but the blocks of {', '.join(left)}, in the extra `pipelines` only")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for line in "".join(blocks(page, "console")).splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["linearize"]:
            command = group.commands[words[1]]
            assert command.make_context(words[1], words[2:]).params


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_listed() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - listed == {"index.md"}


def test_the_glossary_has_every_form_and_family() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    forms = {*FORMS, MASKED, NARROWED, UNCHANGED, *(form.name for family in FAMILIES for form in family.forms)}
    assert {form for form in forms if f"| {form} |" not in text and f"**{form}**" not in text} == set()
    assert {family.name for family in FAMILIES if f"`{family.name}`" not in text} == set()

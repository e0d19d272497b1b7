"""Pages that must stand alone: what they hold, and how a real browser shows them."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

from tests.browser import Browser

VOID = {"br", "img", "link", "meta", "rect", "line", "circle", "polyline"}
HOSTILE = """</code><script>alert('x')</script><img src="http://example.com/a.png" onerror=alert(1)>&"'"""


class Page(HTMLParser):
    """What a page holds; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] if tag not in VOID else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        elif data.strip():
            self.shown.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.shown)

    def saved(self, name: str) -> str:
        """What a link of the page saves under a name."""
        (url,) = [str(a["href"]) for tag, a in self.tags if tag == "a" and a.get("download") == name]
        return base64.b64decode(url.partition(";base64,")[2]).decode()


def check_alone(page: Page) -> None:
    """No script, nothing from elsewhere, a name for each picture."""
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster"):
            assert str(attributes.get(name) or "data:").startswith("data:"), attributes
        if tag == "svg":
            assert attributes["role"] == "img"
            assert (attributes["aria-label"] or "").strip()
        if tag == "img":
            assert attributes["alt"]
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert "prefers-color-scheme: dark" in page.style


def check_shown(window: Browser, path: Path, folder: Path, width: int, *, dark: bool) -> None:
    """No complaint, no request, nothing wider than the window, names for all pictures, colours as asked for."""
    window.open(path, width, dark=dark)
    assert window.complaints() == []
    assert window.requests() == [path.as_uri()]
    assert window.value("document.documentElement.scrollWidth") <= width
    names = window.pictures()
    assert len(names) == window.value("document.querySelectorAll('svg, img').length")
    assert all(names)
    colour = window.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour))) < 300) == dark
    assert window.value("parseFloat(getComputedStyle(document.body).fontSize)") >= 14
    window.photograph(folder / "page.png")
    assert (folder / "page.png").stat().st_size > 10_000

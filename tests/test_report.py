"""Tables."""

from __future__ import annotations

import pytest

from linearize.text_table import render, render_markdown


def test_numbers_right_and_text_left() -> None:
    table = render(["site", "share"], [["a", "0.5"], ["longer", "10.25"], ["none", None]])
    assert table.splitlines() == [
        "site    share",
        "------  -----",
        "a         0.5",
        "longer  10.25",
        "none        -",
    ]


def test_words_of_the_letters_of_numbers_are_still_words() -> None:
    assert render(["x"], [["fan"], ["a"]]).splitlines()[2] == "fan"
    assert render(["long header"], [["1e-05"], ["nan"]]).splitlines()[2].endswith("      1e-05")


def test_markdown_escapes_its_own_sign() -> None:
    assert render_markdown(["a"], [["x|y"]]).splitlines() == ["| a |", "|:--|", "| x\\|y |"]


def test_empty_and_uneven() -> None:
    assert render(["a", "b"], []).splitlines() == ["a  b", "-  -"]
    with pytest.raises(ValueError, match="1 cells"):
        render(["a", "b"], [["x"]])

"""Texts as a command reads them and shows them: every line has its answer, and is shown as it is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from parties.cli.asking import _lines
from parties.cli.console import ERR, OUT
from parties.cli.options import read_texts
from secure.errors import InvalidInput


def test_every_line_has_an_answer() -> None:
    """Blank lines were dropped, so that answers got out of step; a mark before the first text stayed in it."""
    assert _lines(io.StringIO("\ufeffone\n two \r\nthree\n\n\n")) == ["one", " two ", "three"]
    assert _lines(io.StringIO("")) == []
    assert _lines(io.StringIO("\n")) == []
    with pytest.raises(InvalidInput, match=r"line 2 of standard input is blank.*\nhint: leave it out"):
        _lines(io.StringIO("one\n \nthree\n"))


def test_files_of_texts_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text("one\n\ntwo\n", encoding="utf-8-sig")
    assert read_texts(path, "--calibration", "sentence") == ["one", "two"]


def test_texts_are_shown_as_they_are() -> None:
    for console in (OUT, ERR):
        with console.capture() as captured:
            console.print("':smile: [b]x[/b]'", markup=False)
        assert captured.get() == "':smile: [b]x[/b]'\n"

"""Documents from files, and their passages: parts that a model's length holds."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secure.errors import InvalidInput, printable
from secure.models.tokens import TextTokenizer, library_errors

TEXTS, MARKDOWN, LINES = (".txt", ".text"), (".md", ".markdown", ".rst"), (".jsonl",)
SUFFIXES = (*TEXTS, *MARKDOWN, *LINES)
"""The files of a directory that are read; all but .jsonl are one document each."""

OVERLAP = 16
"""Tokens that two neighbouring passages of a document have in common, by default."""

MAXIMUM_ID = 200  # bytes of the name of a document, in UTF-8
MAXIMUM_DOCUMENT = 1 << 25  # characters of a document, and bytes of a file of one
CHARACTERS = 8  # of a passage for each token of the length, at most, so that no passage is much wider than others

_ENDS = (re.compile(r"\n\s*\n"), re.compile(r"[.!?:;。！？][\"')\]]*\s+|\n"), re.compile(r"\s+"))
"""The ends of paragraphs, sentences and words, with the space behind them."""


@dataclass(frozen=True)
class TextDocument:
    """A document: its name, and its text."""

    id: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text, as hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Passage:
    """A part of a document: number ``number`` of it, from 0, its characters from ``start`` to ``end``."""

    id: str
    number: int
    start: int
    end: int
    text: str


def read_documents(path: Path) -> Iterator[TextDocument]:
    """Yield the documents of a file, or of all files of SUFFIXES in a directory and below it, in the order of names.

    A text or markdown file is one document, named by its path below the directory. A .jsonl file has one a line,
    {"id": "...", "text": "..."}; other keys are left alone. Hidden files are not read.
    Raises InvalidInput for what cannot be read, names that are no names or stand twice, and if there is no document.
    """
    seen, files = set[str](), list(_files(path))
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for document in _lines(file) if file.suffix.lower() in LINES else [TextDocument(name, _text(file))]:
            if document.id in seen:
                raise InvalidInput(f"two documents are called {document.id!r}", f"the second is in {file}")
            seen.add(document.id)
            yield document
    if not seen:
        known = ", ".join(SUFFIXES)
        raise InvalidInput(f"{path} has no documents", f"a file, or a directory with files, of the suffixes {known}")


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise InvalidInput(f"there is no file or directory {path}", "give one that is there")
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.suffix.lower() in SUFFIXES and file.is_file():
            yield file


def _text(file: Path) -> str:
    hint = "a text file in UTF-8"
    try:
        if (size := file.stat().st_size) > (MAXIMUM_DOCUMENT if file.suffix.lower() not in LINES else 1 << 34):
            raise InvalidInput(f"{file} has {size} bytes, {MAXIMUM_DOCUMENT} at most are read", "divide it")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidInput(f"{file} is not UTF-8", hint) from None
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read: {error.strerror}", hint) from None


def _lines(file: Path) -> Iterator[TextDocument]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        hint = '{"id": "...", "text": "..."} a line'
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidInput(f"{file}, line {number}: not JSON", hint) from None
        name, text = (found.get(key) if isinstance(found, dict) else None for key in ("id", "text"))
        if not isinstance(name, str) or not isinstance(text, str):
            raise InvalidInput(f"{file}, line {number}: no id or no text", hint)
        if not name or not name.isprintable() or len(name.encode()) > MAXIMUM_ID:  # surrogates cannot be printed
            shown = printable(name)[:80]
            raise InvalidInput(
                f"{file}, line {number}: {shown!r} is no name of a document",
                f"1 to {MAXIMUM_ID} bytes of printable text",
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidInput(f"{file}, line {number}: half a surrogate pair, which is no character", "write it again")
        if len(text) > MAXIMUM_DOCUMENT:
            raise InvalidInput(f"{file}, line {number}: more than {MAXIMUM_DOCUMENT} characters", "divide the document")
        yield TextDocument(name, text)


def checked_name(document: TextDocument) -> TextDocument:
    """Return a document whose name may stand in an index. Raises InvalidInput."""
    if not document.id.isprintable() or not 0 < len(document.id.encode("utf-8", "surrogateescape")) <= MAXIMUM_ID:
        shown = printable(document.id)[:80]
        raise InvalidInput(f"{shown!r} is no name of a document", f"1 to {MAXIMUM_ID} bytes of printable text")
    return document


def passages_of(
    document: TextDocument, tokenizer: TextTokenizer, length: int, overlap: int, prompt: str = ""
) -> list[Passage]:
    """Divide a document into passages of at most ``length`` tokens each, special ones and the prompt's included.

    A passage ends with a paragraph if one ends in its second half, else with a sentence there, else with a word. The
    next one begins up to ``overlap`` tokens before that end, at a word. A passage has at most CHARACTERS characters a
    token; of a single token that is longer, the rest is left out. Of a document without tokens there is no passage.
    Raises InvalidInput if the tokenizer fails, or if nothing fits beside the overlap.
    """
    room = length - sum(tokenizer.around) - len(_offsets(tokenizer, prompt))
    if room <= overlap:
        raise InvalidInput(f"passages of {length} tokens that overlap by {overlap}", f"less than {max(room, 0)}")
    text, most = document.text, CHARACTERS * length
    offsets = _offsets(tokenizer, text)
    ends = [[match.end() for match in kind.finditer(text)] for kind in _ENDS]
    found, at, new, covered = list[Passage](), 0, 0, 0  # the first token of the passage, and the first that is new
    while new < len(offsets):
        begin = offsets[at][0]
        stop = next((i for i in range(at, min(at + room, len(offsets))) if offsets[i][1] > begin + most), at + room)
        stop = max(min(stop, len(offsets)), at + 1)
        end = offsets[stop - 1][1] if stop < len(offsets) else len(text)
        if stop < len(offsets):
            end = _best_end(ends, begin, end, offsets[stop][0])
        piece = text[begin : min(end, begin + most)].rstrip()
        while len(_offsets(tokenizer, piece)) > room:  # tokens of a part may be others than the whole's
            piece = piece[: len(piece) * 7 // 8]
        if (end := begin + len(piece)) <= covered and at < new:
            at = new  # it has no room for more than the overlap
            continue
        if piece:
            found.append(Passage(document.id, len(found), begin, end, piece))
        covered = max(end, covered)
        new = next((i for i in range(max(at, new), len(offsets)) if offsets[i][0] >= end), len(offsets))
        new = max(new, at + 1)
        back = range(max(new - overlap, at + 1), new) if new < len(offsets) else ()
        at = next((i for i in back if _begins(text, offsets[i][0])), new)
    return found


def _best_end(ends: list[list[int]], begin: int, end: int, following: int) -> int:
    """Return where a passage ends at best: in its second half, with as large a unit as ends there."""
    for places in ends:
        last = bisect_right(places, max(end, following)) - 1
        if last >= 0 and places[last] > begin + (end - begin) // 2:
            return places[last]
    return end


def _begins(text: str, at: int) -> bool:
    """Tell whether a word begins at a place of a text."""
    return at == 0 or text[at - 1].isspace()


def _offsets(tokenizer: TextTokenizer, text: str) -> list[tuple[int, int]]:
    """Return the characters of each token of a text, without special tokens."""
    text = text.lower() if tokenizer.lowercase and len(text.lower()) == len(text) else text
    with library_errors():
        found: list[tuple[int, int]] = tokenizer.tokenizer.encode(text, add_special_tokens=False).offsets
        return found

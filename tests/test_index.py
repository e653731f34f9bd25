"""An index of documents: how they are divided, what is written and read again, and updates."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.cli import index as index_command
from secure.errors import InvalidInput
from secure.models import index as index_module
from secure.models.index import MANIFEST, Index, build_index, read_index, write_index
from secure.models.passages import CHARACTERS, TextDocument, passages_of, read_documents
from secure.models.text import load_text_model
from secure.models.tokens import TextTokenizer
from tests.test_cli import Run, in_words, run
from tests.tiny import WORDS, word_tokenizer, write_model

for module in ("transformers", "tokenizers"):
    pytest.importorskip(module)

__all__ = ["run"]  # the fixture

LENGTH, OVERLAP = 8, 2
TOKENIZER = TextTokenizer(word_tokenizer(), 0)


def words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def documents(count: int, seed: int = 0) -> list[TextDocument]:
    return [TextDocument(f"doc-{seed}-{i}", words(3 + 5 * (i % 4), seed * 1000 + i)) for i in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("index") / "tiny"))


def made(model: str, given: list[TextDocument], before: Index | None = None) -> Index:
    return build_index(model, load_text_model(model), given, length=LENGTH, overlap=OVERLAP, before=before)[0]


# passages


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS[:20], ".", "\n\n", "\n", "é", "x" * 35]), max_size=80).map(" ".join),
    st.integers(5, 14),
    st.integers(0, 2),
)
def test_passages_hold_the_whole_document(text: str, length: int, overlap: int) -> None:
    found = passages_of(TextDocument("a", text), TOKENIZER, length, overlap)
    covered = 0
    for number, each in enumerate(found):
        assert (each.id, each.number, each.text) == ("a", number, text[each.start : each.end])
        assert len(TOKENIZER.tokenizer.encode(each.text).ids) <= length
        assert 0 < len(each.text) <= CHARACTERS * length
        assert not text[covered : each.start].strip(), "nothing but space is left out"
        assert each.end > covered
        assert len(TOKENIZER.tokenizer.encode(text[each.start : covered]).ids) - 2 <= overlap or each.start >= covered
        covered = each.end
    assert not text[covered:].strip()


def test_passages_end_with_paragraphs_and_sentences() -> None:
    text = f"{words(4, 1)}.\n\n{words(5, 2)}. {words(9, 3)}"
    first, second, *_ = passages_of(TextDocument("a", text), TOKENIZER, LENGTH, 0)
    assert first.text == f"{words(4, 1)}."
    assert second.text == f"{words(5, 2)}."


def test_an_overlap_that_leaves_no_room() -> None:
    with pytest.raises(InvalidInput, match="passages of 8 tokens that overlap by 6\nhint: less than 6"):
        passages_of(TextDocument("a", "b"), TOKENIZER, 8, 6)


def test_a_long_document_takes_no_long_time() -> None:
    assert len(passages_of(TextDocument("a", words(60_000)), TOKENIZER, 128, 16)) > 400


# documents


def test_documents_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.md").write_text("b", encoding="utf-8")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / ".hidden.txt").write_text("c")
    (tmp_path / "image.png").write_bytes(b"\xff")
    lines = [{"id": "one", "text": "t", "more": 1}, {"id": "two", "text": ""}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    found = [(each.id, each.text) for each in read_documents(tmp_path)]
    assert found == [("a.txt", "a"), ("below/b.md", "b"), ("one", "t"), ("two", "")]
    assert [each.id for each in read_documents(tmp_path / "a.txt")] == ["a.txt"]


WRONG: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({}, "has no documents\nhint: a file, or a directory with files, of the suffixes .txt"),
    "twice": ({"a.jsonl": b'{"id": "b.txt", "text": "x"}', "b.txt": b"y"}, "two documents are called 'b.txt'"),
    "binary": ({"a.txt": b"\xff\xfe\xff"}, "is not UTF-8"),
    "no json": ({"a.jsonl": b"{"}, 'line 1: not JSON\nhint: {"id"'),
    "no text": ({"a.jsonl": b'{"id": "a", "text": 3}'}, "line 1: no id or no text"),
    "no name": ({"a.jsonl": b'{"id": "a\\u0000b", "text": ""}'}, "is no name of a document"),
    "half a character": ({"a.jsonl": b'{"id": "a", "text": "x\\ud800"}'}, "line 1: half a surrogate pair"),
    "half a name": ({"a.jsonl": b'{"id": "\\ud800", "text": "x"}'}, "is no name of a document"),
    "a long name": ({"a.jsonl": b'{"id": "' + b"a" * 201 + b'", "text": ""}'}, "is no name of a document"),
}


@pytest.mark.parametrize("case", WRONG)
def test_documents_that_are_none(case: str, tmp_path: Path) -> None:
    files, said = WRONG[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        list(read_documents(tmp_path))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_path_without_documents_is_noticed_before_the_model_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_command, "load_text_model", lambda *_: pytest.fail("the model was read"))
    with pytest.raises(InvalidInput, match=r"has no documents|there is no file or directory"):
        index_command.index(tmp_path / name, tmp_path / "index")


# files


def same(a: Index, b: Index) -> bool:
    return a.digest == b.digest and list(a.passages) == list(b.passages) and torch.equal(a.embeddings, b.embeddings)


def test_an_index_is_read_as_it_was_written(model: str, tmp_path: Path) -> None:
    index = made(model, documents(9))
    write_index(index, tmp_path / "index")
    assert same(read_index(tmp_path / "index", model), index)
    assert torch.allclose(index.embeddings.norm(dim=-1), torch.ones(1))
    mode = {path.stat().st_mode & 0o77 for path in (tmp_path / "index").iterdir()}
    assert mode == {0}, "nobody else may read it"
    module = load_text_model(model).module
    ids, mask = torch.tensor([TOKENIZER.tokenizer.encode(index.passages[0].text).ids]), None
    mask = torch.ones_like(ids)
    alone = torch.nn.functional.normalize(module(ids, mask), dim=-1)[0]
    assert torch.allclose(index.embeddings[0], alone, atol=1e-5)


def test_an_index_of_another_model(model: str, tmp_path: Path) -> None:
    write_index(made(model, documents(3)), tmp_path / "index")
    other = str(write_model(tmp_path / "other", 1))
    with pytest.raises(InvalidInput, match=r"is an index of another model than .*other: of tiny, with other files"):
        read_index(tmp_path / "index", other)


def spoilt(directory: Path, kind: str) -> None:
    (file,) = directory.glob(f"{kind}-*")
    file.write_bytes(file.read_bytes()[:-3])


def changed(directory: Path, kind: str) -> None:
    (file,) = directory.glob(f"{kind}-*")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def said(directory: Path, **other: Any) -> None:
    document = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(document | other))


DAMAGED: dict[str, tuple[Any, str]] = {
    "embeddings cut short": (lambda d: spoilt(d, "embeddings"), "it was cut short"),
    "passages cut short": (lambda d: spoilt(d, "passages"), "it was cut short"),
    "embeddings changed": (lambda d: changed(d, "embeddings"), "it was changed"),
    "passages changed": (lambda d: changed(d, "passages"), "it was changed"),
    "a file missing": (lambda d: next(d.glob("passages-*")).unlink(), "cannot be read"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "holds no index"),
    "manifest cut short": (lambda d: (d / MANIFEST).write_text("{"), "is no manifest of an index"),
    "another format": (lambda d: said(d, format=9), "has the format 9, this is 2"),
    "other segments": (lambda d: said(d, segments=[1, 1]), "passages and not the 2 of its manifest"),
    "huge segments": (lambda d: said(d, segments=[1 << 40]), "is no manifest of an index: segments.0"),
    "another width": (lambda d: said(d, width=33), "has no embeddings of the form"),
    "a path": (lambda d: said(d, passages={"name": "../x", "size": 1, "sha256": "0" * 64}), "passages.name"),
    "more keys": (lambda d: said(d, more=1), "is no manifest of an index: more"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_index_is_refused(case: str, model: str, tmp_path: Path) -> None:
    damage, words = DAMAGED[case]
    write_index(made(model, documents(3)), tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(InvalidInput) as caught:
        read_index(tmp_path / "index", model)
    assert words in str(caught.value)
    assert "hint: make it again: unseen index" in str(caught.value)


def test_nothing_else_is_overwritten(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InvalidInput, match="holds something else than an index"):
        write_index(made(model, documents(2)), tmp_path)


# updates


def by_name(index: Index) -> dict[tuple[str, int], tuple[str, list[float]]]:
    return {(p.id, p.number): (p.text, v.tolist()) for p, v in zip(index.passages, index.embeddings, strict=True)}


def segments(index: Index) -> list[tuple[tuple[str, int], ...]]:
    """The passages of each segment."""
    rows, ends = [(each.id, each.number) for each in index.passages], list(itertools.accumulate(index.segments))
    return [tuple(rows[end - size : end]) for end, size in zip(ends, index.segments, strict=True)]


def test_an_update_is_what_is_made_anew(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is added, changed and removed; only that is embedded, and segments without a change stay."""
    monkeypatch.setattr(index_module, "SEGMENT", 10)
    embedded = list[str]()
    embed = index_module.embed_passages

    def noted(loaded: Any, texts: Any, *rest: Any) -> Any:
        embedded.extend(texts)
        return embed(loaded, texts, *rest)

    loaded, generator, index = load_text_model(model), random.Random(5), made(model, documents(30))
    monkeypatch.setattr(index_module, "embed_passages", noted)
    collection = {each.id: each for each in documents(30)}
    for step in range(1, 7):
        gone, other = (generator.choice(sorted(collection)) for _ in range(2))
        del collection[gone]
        if other in collection:
            collection[other] = TextDocument(other, words(7, 100 + step))
        collection |= {each.id: each for each in documents(2, step)}
        embedded.clear()
        before = index
        index, change = build_index(model, loaded, collection.values(), length=LENGTH, overlap=OVERLAP, before=before)
        anew = made(model, list(collection.values()))
        assert {k: t for k, (t, _) in by_name(index).items()} == {k: t for k, (t, _) in by_name(anew).items()}
        for key, (_, vector) in by_name(index).items():
            assert vector == pytest.approx(by_name(anew)[key][1], abs=1e-5)
        assert (change.added, change.removed, change.changed) == (2, 1, int(other != gone))
        assert change.embedded == len(index.passages) - sum(
            k in by_name(before) and by_name(before)[k] == v for k, v in by_name(index).items()
        )
        assert sum(index.segments) == len(index.passages)
        assert max(index.segments) <= 10
        assert change.kept_segments >= len(before.segments) - 3
        assert change.kept_segments == len({*segments(before)} & {*segments(index)})


def test_segments_that_are_nearly_empty_are_joined(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SEGMENT", 4)
    given = [TextDocument(f"d{i}", words(3, i)) for i in range(40)]
    index = made(model, given)
    assert list(index.segments) == [4] * 10
    assert list(made(model, given[::4], index).segments) == [4, 4, 2]


def test_nothing_is_left(model: str) -> None:
    index = made(model, documents(2))
    with pytest.raises(InvalidInput, match="the documents have no text"):
        made(model, [TextDocument("a", "  \n ")], index)


# the command


def test_the_command(model: str, run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "texts", tmp_path / "index"
    source.mkdir()
    for each in documents(6):
        (source / f"{each.id}.txt").write_text(each.text)
    line = ["index", str(source), "--output", str(output), "--model", model]
    ended = run(*line, "--length", str(LENGTH))
    assert ended.code == 0, ended.err
    assert "6 documents in" in ended.err
    assert f"serve it with: unseen serve {model} --index {output}" in " ".join(ended.err.split())
    first = read_index(output, model)
    assert first.overlap == OVERLAP
    in_words(run(*line), "is there already", "--update brings it to these documents")
    (source / "new.md").write_text(words(4, 77))
    (source / "doc-0-0.txt").unlink()
    ended = run(*line, "--update")
    assert "1 documents added, 0 changed, 1 removed; 1 passages embedded" in " ".join(ended.err.split())
    assert {each.id for each in read_index(output).passages} == {*(p.id for p in first.passages), "new.md"} - {
        "doc-0-0.txt"
    }
    in_words(
        run(*line, "--update", "--length", "12"), "--length 12: the index has passages of length 8", "leave it out"
    )
    in_words(run("index", str(tmp_path / "none"), "--output", str(tmp_path / "x"), "--model", model), "there is no", "")
    (tmp_path / "empty").mkdir()
    in_words(
        run("index", str(tmp_path / "empty"), "--output", str(tmp_path / "x"), "--model", model), "no documents", ""
    )
    in_words(run(*line[:3], str(tmp_path / "y"), *line[4:], "--length", "99"), "passages of 99 tokens", "16 at most")

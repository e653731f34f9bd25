"""Bulk embedding: texts of a file to rows of another, in order, resumed wherever it was killed; long texts."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("tokenizers")

import secure
from parties import deployments
from parties.bulk.embedding import embedded, embedder_of, rows_of, vector_width
from parties.bulk.rows import FORMATS, RowFormat
from parties.bulk.texts import LINE, TextFile
from parties.bulk.unfinished import Texts, UnfinishedRows, beside, read_origin
from parties.cli import console
from secure.deployments.compiled import build
from secure.deployments.deployment import CompileOptions
from secure.errors import EmptyInput, Error, InputTooLong, InvalidInput, PeerLost
from secure.models import tokens
from secure.models.prompts import prompts_from
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import text_inputs
from secure.models.tokens import LONG, PIECES, TextTokenizer, tokenize
from secure.tasks.embed import Embed
from secure.tasks.task import Loaded, Served
from tests.hosts import TinyText
from tests.test_batches import compiled_for
from tests.test_cli import COMMAND, ROOT, Run, in_words, run
from tests.tiny import LENGTH, TEXT, WORDS, sentences, word_tokenizer, write_model
from tests.tiny import Served as Hosted

__all__ = ["run"]  # the fixture

BATCH, WIDTH = 3, 4
LONG_TEXT = " ".join(WORDS[:40])
SUFFIXES = sorted(FORMATS)


@pytest.fixture(scope="module")
def compiled(directory: Path) -> secure.Compiled:
    return compiled_for(secure.TwoParty, directory, BATCH)


@pytest.fixture
def connected(compiled: secure.Compiled, monkeypatch: pytest.MonkeyPatch) -> list[secure.Session]:
    """The command asks all parties in this process; the sessions that it opened."""
    opened = list[secure.Session]()

    def connect(*_: Any, **__: Any) -> secure.Session:
        opened.append(secure.insecure_in_process(compiled))
        return opened[-1]

    monkeypatch.setattr(deployments, "connect", connect)
    return opened


def expected(compiled: secure.Compiled, text: str) -> Tensor:
    assert compiled.tokenizer is not None
    with torch.no_grad():
        answer: Tensor = TinyText().eval()(**text_inputs(compiled.tokenizer, text, LENGTH))[0]
    return answer.double()


def read_rows(path: Path) -> list[Tensor | str]:
    """The rows of an output, whatever its format: a vector, or an error (npy: "NaN")."""
    if path.suffix == ".npy":
        matrix = np.load(path, allow_pickle=False)
        assert matrix.dtype == np.float32
        return ["NaN" if np.isnan(row).all() else torch.from_numpy(row).double() for row in matrix]
    if path.suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["index"] for row in found] == list(range(len(found)))
        return [
            row["error"] if "error" in row else torch.tensor(row["embedding"], dtype=torch.float64) for row in found
        ]
    names, *lines = csv.reader(io.StringIO(path.read_text()))
    assert names[:2] == ["index", "error"]
    assert [int(line[0]) for line in lines] == list(range(len(lines)))
    return [line[1] or torch.tensor([float(n) for n in line[2:]], dtype=torch.float64) for line in lines]


# the command


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_in_a_file_out(
    suffix: str, run: Run, connected: list[secure.Session], compiled: secure.Compiled, tmp_path: Path
) -> None:
    texts = [*sentences(5), LONG_TEXT, "", sentences(1)[0]]
    source, output = tmp_path / "texts.txt", tmp_path / f"out{suffix}"
    source.write_text("\n".join(texts) + "\n")
    ended = run("embed", "--input", str(source), "--output", str(output))
    assert (ended.code, ended.out) == (1, "")  # two have no embedding
    rows = read_rows(output)
    assert len(rows) == len(texts)
    for text, row in zip(texts, rows, strict=True):
        if text in ("", LONG_TEXT):
            assert isinstance(row, str)
        else:
            assert isinstance(row, Tensor)
            torch.testing.assert_close(row, expected(compiled, text), atol=2e-2, rtol=0)
    if suffix != ".npy":
        assert rows[5:7] == ["the text has 42 tokens (special tokens included), the limit is 8", rows[6]]
        assert str(rows[6]).startswith("the text is empty")
    assert len(connected[0].reports) == 3
    assert "8 texts in " in ended.err
    assert "8 rows in " in ended.err
    assert "2 of them have no embedding (texts are numbered from 1):\n  text 6: the text has 42 tokens" in ended.err
    assert "  text 7: the text is empty" in ended.err
    assert not any(path.exists() for path in beside(output))
    assert output.stat().st_mode & 0o777 == 0o600


def test_all_fine_is_code_0_and_a_second_run_is_refused(
    run: Run, connected: list[secure.Session], tmp_path: Path
) -> None:
    source, output = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("\n".join(sentences(4)))  # no line feed at the end
    arguments = ["embed", "--input", str(source), "--output", str(output)]
    assert run(*arguments).code == 0
    before = output.read_bytes()
    in_words(run(*arguments), f"--output: {output} is there already", "--overwrite to replace it")
    assert output.read_bytes() == before
    assert len(connected) == 1
    assert run(*arguments, "--overwrite").code == 0
    assert np.load(output).shape == (4, WIDTH)


def test_standard_input(
    run: Run, connected: list[secure.Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    raw = ("\ufeff" + TEXT + "\r\n" + WORDS[3]).encode() + b"\n\xff\xfe\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    ended = run("embed", "--input", "-", "--output", str(output))
    assert ended.code == 1
    first, second, third = read_rows(output)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert "bytes that are not UTF-8" in str(third)
    assert "text 3: the text holds bytes that are not UTF-8" in ended.err


def test_how_far_it_is_is_said(
    run: Run, connected: list[secure.Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(sentences(8)))
    run("embed", "--input", str(source), "--output", str(tmp_path / "quiet.npy"))
    monkeypatch.setattr(console, "EVERY", 0.0)
    ended = run("embed", "--input", str(source), "--output", str(tmp_path / "out.npy"))
    assert "unseen embed: 7 of 8 texts, " in ended.err
    assert " a second, 0 s left" in ended.err


def test_how_far_in_words() -> None:
    assert console.how_far("texts", 1234, 10_000, 4.3) == "1,234 of 10,000 texts, 4.3 a second, 34 min left"
    assert console.how_far("texts", 5, None, 0.25) == "5 texts, 0.25 a second"
    assert [console.in_time(s) for s in (3.2, 119, 121, 7199, 7300)] == [
        "3 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h 2 min",
    ]


def test_a_prompt_is_said_before_the_texts_of_a_file(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "model").mkdir()
    directory, prompts = write_model(tmp_path / "model"), {"query": f"{WORDS[40]}: ", "document": f"{WORDS[50]}\n"}
    settings = {"prompts": prompts, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings))
    made = secure.compile_text_model(str(directory), LENGTH, calibration=sentences(), embedding="client-table")
    monkeypatch.setattr(deployments, "connect", lambda *_, **__: secure.insecure_in_process(made))
    (tmp_path / "texts.txt").write_text(f"{WORDS[7]}\n")
    command = ["embed", "--input", str(tmp_path / "texts.txt"), "--overwrite", "--output", str(tmp_path / "out.jsonl")]
    for options, said in (
        ([], f'"{WORDS[40]}: " goes before each text'),
        (["--prompt", "document"], f'"{WORDS[50]}\\n" goes before each text'),
        (["--prompt", ""], "none is used"),
    ):
        ended = run(*command, *options)
        assert ended.code == 0, ended.err
        assert f"unseen embed: of the model's prompts (query, document) {said}" in ended.err


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_elsewhere(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    told = io.StringIO()
    monkeypatch.setattr(console, "ERR", Console(file=told, force_terminal=terminal, width=120, color_system=None))
    with console.counting("embed", "texts", 10, 4) as counted:
        counted(5)
        counted(10)
    assert ("10 of 10 texts, " in told.getvalue()) == terminal
    with console.progress("preparing") as late:
        pass
    late(1, 2, "too late")  # as a session does that reconnects
    assert "too late" not in told.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--output", "x.npy"], "--output means nothing without --input", "standard input"),
        (["--field", "x"], "--field means nothing without --input", "standard input"),
        (["--overwrite"], "--overwrite means nothing without --input", "standard input"),
        (["--retries", "3"], "--retries means nothing without --input", "standard input"),
        (["--input", "{tmp}/t.txt"], "--input without --output", ".jsonl, .npy, .csv"),
        (["a text", "--input", "{tmp}/t.txt"], "--input and texts exclude each other", "leave"),
        (["--json", "--input", "{tmp}/t.txt"], "--input and --json exclude each other", "leave"),
        (["--trace", "{tmp}/x", "--input", "{tmp}/t.txt"], "--input and --trace exclude each other", "leave"),
        (["x", "--trace", "{tmp}/x", "--long", "split"], "--trace and --long split exclude each other", "leave"),
        (["--compare-with", "m", "--input", "{tmp}/t.txt"], "--input and --compare-with exclude each other", "leave"),
        (["--input", "{tmp}/t.txt", "--output", "{tmp}/x.txt"], "x.txt has no known suffix", "jsonl"),
        (["--input", "{tmp}/t.txt", "--output", "{tmp}/no/x.npy"], "there is no directory", "make it"),
        (["--input", "{tmp}/t.txt", "--output", "{tmp}/dir.npy"], "dir.npy is no ordinary file", "another name"),
        (["--input", "{tmp}/t.txt", "--output", "{tmp}/link.npy"], "link.npy is no ordinary file", "another name"),
        (["--input", "{tmp}/no", "--output", "{tmp}/x.npy"], "--input: .* cannot be read: No such file", "a file"),
        (["--input", "{tmp}", "--output", "{tmp}/x.npy"], "--input: .* cannot be read: Is a directory", "a file"),
        (["--input", "{tmp}/t.txt", "--field", "x", "--output", "{tmp}/x.npy"], "--field means nothing", "jsonl"),
        (["--input", "{tmp}/bad.jsonl", "--output", "{tmp}/x.npy"], "bad.jsonl line 2 is not JSON", "object a line"),
    ],
)
def test_mistakes_before_anything_is_sent(
    arguments: list[str], message: str, hint: str, run: Run, connected: list[secure.Session], tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nsecret\n')
    (tmp_path / "dir.npy").mkdir()
    (tmp_path / "link.npy").symlink_to(tmp_path / "elsewhere")
    in_words(run("embed", *(a.replace("{tmp}", str(tmp_path)) for a in arguments)), message, hint)
    assert connected == []
    assert not list(tmp_path.glob("*.part*"))


def test_a_lost_party_ends_it_with_what_to_do(
    run: Run, connected: list[secure.Session], compiled: secure.Compiled, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, output = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(sentences(8)))
    link = type(secure.insecure_in_process(compiled).link)
    ask, asked = link.ask, list[int]()

    def lost(self: Any, values: Any, number: int, *, ahead: bool = False) -> Any:
        asked.append(number)
        if len(asked) == 3:
            raise PeerLost("the server is gone", "see its log")
        return ask(self, values, number, ahead=ahead)

    monkeypatch.setattr(link, "ask", lost)
    ended = run("embed", "--input", str(source), "--output", str(output), "--retries", "0")
    assert ended.code == 1
    again, error, hint = ended.err.splitlines()
    assert again == ("unseen embed: 6 texts are done and kept; run the same command again: it goes on at text 7")
    assert (error, hint) == ("unseen: error: texts 7 to 8: the server is gone", "hint: see its log")
    assert not output.exists()
    ended = run("embed", "--input", str(source), "--output", str(output))
    assert (ended.code, len(asked)) == (0, 4)  # one query more
    assert "6 texts are done, this run goes on at text 7" in ended.err
    for text, row in zip(sentences(8), read_rows(output), strict=True):
        torch.testing.assert_close(row, expected(compiled, text), atol=2e-2, rtol=0)


def test_lost_parties_are_asked_again(
    run: Run, compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--retries: how often; the text that failed is named."""
    monkeypatch.setattr("secure.session.session.PAUSE", 0.0)
    fails = 2

    class Failing(secure.Session):
        def _answers(self, *arguments: Any, **options: Any) -> Any:
            nonlocal fails
            if fails:
                fails -= 1
                raise PeerLost("the server is gone")
            return super()._answers(*arguments, **options)

    def link() -> Any:
        return compiled.deployment.insecure(compiled.model, compiled.tokenizer)

    monkeypatch.setattr(deployments, "connect", lambda *_, **__: Failing(link(), pace=0.0, open=lambda _: link()))
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(sentences(4)))
    arguments = ["embed", "--input", str(source), "--output", str(tmp_path / "out.npy")]
    ended = run(*arguments, "--retries", "1")
    assert ended.code == 1
    assert "texts 1 to 3: the server is gone" in ended.err
    fails = 2
    assert run(*arguments, "--retries", "2").code == 0


# long texts


@pytest.mark.parametrize("how", LONG)
def test_long_texts_of_the_command(
    how: str, run: Run, connected: list[secure.Session], compiled: secure.Compiled, tmp_path: Path
) -> None:
    texts = [WORDS[0], LONG_TEXT, TEXT]
    source, output = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(texts))
    ended = run("embed", "--input", str(source), "--output", str(output), "--long", how)
    assert ended.code == int(how == "refuse")
    first, long, last = read_rows(output)
    for text, row in ((texts[0], first), (TEXT, last)):
        torch.testing.assert_close(row, expected(compiled, text), atol=2e-2, rtol=0)
    inner, words = LENGTH - 2, WORDS[:40]
    parts = [" ".join(words[i : i + inner]) for i in range(0, 40, inner)]
    if how == "truncate":
        torch.testing.assert_close(long, expected(compiled, parts[0]), atol=2e-2, rtol=0)
    elif how == "split":
        mean = sum((len(p.split()) + 2) * expected(compiled, p) for p in parts) / (40 + 2 * len(parts))
        torch.testing.assert_close(long, mean, atol=2e-2, rtol=0)
    places = 3 if how != "split" else 2 + len(parts)
    assert len(connected[0].reports) == -(-places // BATCH)


def test_long_texts_as_arguments(run: Run, connected: list[secure.Session], directory: Path) -> None:
    in_words(run("embed", LONG_TEXT), "the text has 42 tokens", "shorten")
    ended = run("embed", LONG_TEXT, TEXT, "--long", "truncate", "--json")
    assert (ended.code, ended.err) == (0, "")
    first, second = json.loads(ended.out)
    assert first["query"] == second["query"] == 0
    assert "1 numbers" not in run("embed", *sentences(4), "--long", "split").out
    with secure.insecure_in_process(compiled_for(secure.TwoParty, directory, 1)) as session:
        assert len(session.embed([LONG_TEXT], long="split")) == 1
        assert len(session.reports) == 7
        assert session.embed([LONG_TEXT, TEXT], long="truncate")[1].shape == (WIDTH,)
        with pytest.raises(InvalidInput, match="not taken by 'cut'"):
            session.embed([TEXT], long="cut")


def test_a_report_for_people_names_a_query_once(run: Run, connected: list[secure.Session]) -> None:
    ended = run("embed", *sentences(4))
    assert ended.code == 0
    assert ended.out.count("online  ") == 2
    assert ended.out.count("embedding (4 numbers)") == 4


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 4, 256])
def test_pieces_keep_their_texts(directory: Path, batch: int, window: int) -> None:
    """Texts of all numbers of pieces, with errors between them, in queries that hold parts of several."""
    generator = random.Random(batch * window)
    texts = [" ".join(generator.choices(WORDS, k=k)) for k in (1, 13, 6, 7, 30, 2)]
    texts[3:3] = ["", " ".join(WORDS[:1]) + " a" * 6 * PIECES]
    compiled = compiled_for(secure.TwoParty, directory, batch)
    served = Served(compiled.tokenizer, LENGTH)
    with secure.insecure_in_process(compiled) as session:
        answers = list(session.stream(Embed("split"), texts, window=window))
        assert len(answers) == len(texts)
        for text, answer in zip(texts, answers, strict=True):
            if not text or len(text.split()) > 6 * PIECES:
                assert isinstance(answer, EmptyInput if not text else InputTooLong)
                continue
            pieces = Embed("split").pieces(text, served)
            assert len(pieces) == -(-len(text.split()) // (LENGTH - 2))
            with torch.no_grad():
                plain = [TinyText().eval()(**piece)[0].double() for piece in pieces]
            torch.testing.assert_close(answer, Embed().joined(plain, pieces, text, served), atol=2e-2, rtol=0)


def test_means_are_normalized_where_the_model_normalizes(directory: Path) -> None:
    tokenizer, raw = load_tokenizer(directory), (directory / "tokenizer.json").read_bytes()
    samples = [text_inputs(tokenizer, text, LENGTH) for text in sentences()]
    loaded = Loaded("tiny", TinyText().eval(), samples, tokenizer, raw, LENGTH)
    for made in (loaded, replace(loaded, normalized=True)):
        compiled = build(made, secure.TwoParty(), CompileOptions(embedding="client-table"), {})
        assert compiled.program.labels.get("normalized") == ("yes" if made.normalized else None)
        with secure.insecure_in_process(compiled) as session:
            one, mean = session.embed([TEXT, LONG_TEXT], long="split")
        torch.testing.assert_close(one, expected(compiled, TEXT), atol=2e-2, rtol=0)  # as the model gives it
        assert (abs(float(mean.norm()) - 1) < 1e-9) == made.normalized


def tokenizers() -> Iterator[Any]:
    """A word a token, and the tokenizer of a real encoder where it is installed."""
    yield word_tokenizer()
    from secure.models.sentence_encoder import find_packaged_model

    try:
        yield load_tokenizer(find_packaged_model()).tokenizer
    except Error:
        return


TOKENIZERS = list(tokenizers())


@settings(max_examples=100, deadline=None)
@given(
    which=st.sampled_from(range(len(TOKENIZERS))),
    text=st.one_of(st.text(max_size=400), st.lists(st.sampled_from([*WORDS, "[SEP]", "A,b!"])).map(" ".join)),
    length=st.integers(3, 40),
)
def test_pieces_are_all_tokens_in_order_and_the_first_is_what_truncation_keeps(
    which: int, text: str, length: int
) -> None:
    tokenizer = TOKENIZERS[which]
    loaded = TextTokenizer(tokenizer, 0)
    whole = tokenizer.encode(text).ids
    room = length - tokenizer.num_special_tokens_to_add(False)
    if len(whole) == 2 or len(whole) - 2 > PIECES * room:
        with pytest.raises(EmptyInput if len(whole) == 2 else InputTooLong):
            tokenize(loaded, text, length, "split")
        return
    ids, mask = tokenize(loaded, text, length, "split")
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert [token for row in rows for token in row[1:-1]] == whole[1:-1]
    assert len(rows) == -(-(len(whole) - 2) // room)
    assert all(row[:1] == whole[:1] and row[-1:] == whole[-1:] for row in rows)
    assert all(len(row) == length for row in rows[:-1])
    tokenizer.enable_truncation(length)  # as sentence-transformers does it
    try:
        assert rows[0] == tokenizer.encode(text).ids
    finally:
        tokenizer.no_truncation()
    first, _ = tokenize(loaded, text, length, "truncate")
    assert first.tolist() == ids[:1].tolist()
    if len(rows) == 1:
        assert tokenize(loaded, text, length)[0].tolist() == ids.tolist()
    else:
        with pytest.raises(InputTooLong, match=f"has {len(whole)} tokens"):
            tokenize(loaded, text, length)


def test_long_texts_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, inner = TextTokenizer(word_tokenizer(), 0), LENGTH - 2
    assert tokenize(loaded, "a " * inner * PIECES, LENGTH, "split")[0].shape == (PIECES, LENGTH)
    with pytest.raises(
        InputTooLong, match=f"the text has {PIECES + 1} pieces of {LENGTH} tokens, the limit is {PIECES}"
    ):
        tokenize(loaded, "a " * (inner * PIECES + 1), LENGTH, "split")
    monkeypatch.setattr(tokens, "LONGEST", 3000)
    with pytest.raises(InputTooLong, match="the text has 3001 characters, the limit is 3000"):
        tokenize(loaded, "x" * 3001, LENGTH, "split")
    assert tokenize(loaded, "x" * 3001, LENGTH, "truncate")[1].sum() == 3
    with pytest.raises(InputTooLong, match="the text has 3001 characters, the limit is 2048"):
        tokenize(loaded, "x" * 3001, LENGTH)


@pytest.mark.parametrize("how", LONG)
def test_special_tokens_that_leave_no_room(how: str) -> None:
    from tokenizers import processors

    crowded = word_tokenizer()
    crowded.post_processor = processors.TemplateProcessing(
        single="[CLS] [CLS] [CLS] [CLS] $A [SEP] [SEP] [SEP] [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with pytest.raises(InputTooLong, match=r"the text has 9 tokens \(special tokens included\), the limit is 8"):
        tokenize(TextTokenizer(crowded, 0), "a", LENGTH, how)


@pytest.mark.slow
def test_truncation_is_that_of_sentence_transformers() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from secure.models.sentence_encoder import find_packaged_model

    directory = find_packaged_model()
    model = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    model.max_seq_length = 32
    text = " ".join(f"Sentence {i} speaks of unbelievable things." for i in range(40))
    theirs = model.tokenize([text])["input_ids"]
    assert tokenize(load_tokenizer(directory), text, 32, "truncate")[0].tolist() == theirs.tolist()


# texts of files


def texts_of(path: Path, content: bytes, field: str | None = None) -> list[str]:
    path.write_bytes(content)
    return list(TextFile(str(path), field))


def test_lines(tmp_path: Path) -> None:
    assert texts_of(tmp_path / "a.txt", b"one\r\n\n  two \nthree") == ["one", "", "  two ", "three"]
    assert texts_of(tmp_path / "a", b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n") == ["one", "\ufefftwo"]
    assert texts_of(tmp_path / "a", b"") == []
    assert texts_of(tmp_path / "a", b"a\rb\x0bc\xe2\x80\xa8d\n") == ["a\rb\x0bc\u2028d"]  # one line, as wc counts
    with pytest.raises(InvalidInput, match=f"line 2 has more than {LINE} bytes"):
        texts_of(tmp_path / "a", b"\n" + b"x" * (LINE + 1))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.JSONL"
    assert texts_of(path, b'{"text": "one\\ntwo"}\n\n{"id": 1, "text": "\\u00e9"}') == ["one\ntwo", "é"]
    assert texts_of(path, b'{"body": ""}\n', "body") == [""]
    for content, message in (
        (b"secret", "line 1 is not JSON"),
        (b'{"text": "a"}\n' + b"[" * 100_000, "line 2 is not JSON"),
        (b'["secret"]', "line 1 has no text in the field 'text'"),
        (b'{"text": 5}', "line 1 has no text"),
        (b'{"secret": "x"}', "line 1 has no text"),
        (b'{"text": ' + b"9" * 10_000 + b"}", "line 1 is not JSON"),
        (b"\xff\n", "line 1 is not JSON"),
    ):
        with pytest.raises(InvalidInput, match=message) as caught:
            texts_of(path, content)
        assert "secret" not in str(caught.value)


def test_csv_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert texts_of(path, b'\xef\xbb\xbfid,text\r\n1,"one, ""two""\nthree"\r\n2,four') == ['one, "two"\nthree', "four"]
    assert texts_of(path, b"a,b\nx,y\n", "b") == ["y"]
    for content, message in (
        (b"", "has no column 'text'\nhint: .*none"),
        (b"a,b\n", "has no column 'text'\nhint: name one with --field; its columns: a, b"),
        (b"text,text\n", "has no column 'text'"),
        (b"a,text\nsecret\n", "line 2 has no column 'text'"),
        (b'a,text\n1,"secret', "line 2 is not CSV: unexpected end of data"),
        (b'a,text\n1,"x" y\n', "line 2 is not CSV"),
        (b"text\n" + b"x" * 200_000, r"line 2 is not CSV: field larger than field limit \(131072\)"),
    ):
        with pytest.raises(InvalidInput, match=message) as caught:
            texts_of(path, content)
        assert "secret" not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), suffix=st.sampled_from(["txt", "jsonl", "csv"]), header=st.booleans())
def test_any_bytes_are_texts_or_a_mistake_in_words(content: bytes, suffix: str, header: bool, tmp_path: Path) -> None:
    found = list[str]()
    with suppress(InvalidInput):
        found += texts_of(tmp_path / f"a.{suffix}", b"text\n" * header + content)
    assert all(isinstance(text, str) for text in found)


# rows


def forms(width: int = WIDTH) -> list[RowFormat]:
    return [form(width) for form in FORMATS.values()]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(-1e300, 1e300), min_size=WIDTH, max_size=WIDTH),
            st.one_of(st.none(), st.text(min_size=1).filter(lambda t: "\n" not in t and "\r" not in t)),
        ),
        max_size=6,
    ),
    st.data(),
)
def test_whole_rows_are_found_and_torn_ones_are_not(rows: list[tuple[list[float], str | None]], data: Any) -> None:
    for form in forms():
        with np.errstate(over="ignore"):
            made = [form.row(i, np.array(v), error) for i, (v, error) in enumerate(rows)]
        raw = b"".join(made)
        size = data.draw(st.integers(0, len(raw)))
        whole = 0
        while len(b"".join(made[: whole + 1])) <= size and whole < len(made):
            whole += 1
        found = list(form.whole(io.BytesIO(raw[:size])))
        assert found == [(len(row), error is None) for row, (_, error) in zip(made[:whole], rows, strict=False)]
        assert len(form.header(0)) == len(form.header(10**9))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_rows_or_not(raw: bytes) -> None:
    for form in forms():
        assert sum(size for size, _ in form.whole(io.BytesIO(raw))) <= len(raw)


def test_formats_are_what_others_read(tmp_path: Path) -> None:
    vectors = [np.arange(WIDTH) / 3, -np.arange(WIDTH) / 7]
    for form in forms():
        path = tmp_path / f"a{form.suffix}"
        body = [
            form.row(0, vectors[0], None),
            form.row(1, vectors[0], 'it is "no, text'),
            form.row(2, vectors[1], None),
        ]
        path.write_bytes(form.header(3) + b"".join(body))
        first, error, last = read_rows(path)
        assert error == ("NaN" if form.suffix == ".npy" else 'it is "no, text')
        tolerance = 1e-7 if form.suffix == ".npy" else 0.0
        for vector, row in zip(vectors, (first, last), strict=True):
            torch.testing.assert_close(row, torch.from_numpy(vector), atol=tolerance, rtol=tolerance)
    matrix = np.loadtxt(tmp_path / "a.csv", delimiter=",", skiprows=1, usecols=(0, 2, 3, 4, 5), max_rows=1)
    assert matrix.tolist() == [0.0, *vectors[0]]


# killed and resumed


class FakeSession:
    """Answers that follow from the texts, counted."""

    program = SimpleNamespace(digest="d" * 64, output_shapes={"y": (2, WIDTH)})
    link = SimpleNamespace(model="m")
    prompts = prompts_from({})
    sizes = ()
    window = 4

    def __init__(self) -> None:
        self.asked = list[str]()

    @staticmethod
    def answer(text: str) -> Tensor | Error:
        if text.startswith("bad"):
            return InputTooLong(f"{text} is too long", "shorten it")
        return torch.tensor(np.random.default_rng(abs(hash(text))).random(WIDTH))

    def stream(self, task: Embed, given: Iterable[str], *, retries: int, first: int) -> Iterator[Tensor | Error]:
        inputs = iter(given)
        while window := list(islice(inputs, self.window)):
            for text in window:
                self.asked.append(text)
                yield self.answer(text)


def texts_for(count: int) -> list[str]:
    return [f"{'bad' if i % 5 == 2 else 'text'} {i}" for i in range(count)]


def embed_some(
    texts: Iterable[str], output: Path, most: int | None = None, session: Any = None, overwrite: bool = False
) -> UnfinishedRows:
    """Embed as the command does; stop as a kill would after ``most`` rows."""
    session, task = session or FakeSession(), Embed()
    with rows_of(embedder_of(session), task, texts, output, overwrite=overwrite) as rows:  # type: ignore[arg-type]
        for _ in islice(embedded(embedder_of(session), task, rows, 0), most):
            pass
        if most is None:
            rows.finish()
    return rows


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_text_is_asked_twice(suffix: str, tmp_path: Path) -> None:
    texts, output, session = texts_for(23), tmp_path / f"out{suffix}", FakeSession()
    for most in (5, 0, 1, 9):
        rows = embed_some(iter(texts), output, most, session)
    assert rows.rows == 15
    rows = embed_some(iter(texts), output, None, session)
    assert session.asked == texts
    assert (rows.rows, rows.unusable) == (23, 5)
    embed_some(texts, tmp_path / f"other{suffix}")
    assert output.read_bytes() == (tmp_path / f"other{suffix}").read_bytes()
    assert not any(path.exists() for path in beside(output))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from(SUFFIXES), count=st.integers(0, 20))
def test_a_run_cut_anywhere_ends_as_one_that_was_not(data: Any, suffix: str, count: int, tmp_path: Path) -> None:
    """The rows are cut at any byte, as often as one likes; the output is the same, and what was kept is not asked."""
    texts, output = texts_for(count), tmp_path / f"out{suffix}"
    embed_some(texts, whole := tmp_path / f"whole{suffix}", overwrite=True)
    part, known = beside(output)
    for path in (output, part, known):
        path.unlink(missing_ok=True)
    for _ in range(data.draw(st.integers(0, 4))):
        embed_some(iter(texts), output, data.draw(st.integers(0, count)))
        size = data.draw(st.integers(0, part.stat().st_size))
        os.truncate(part, size)
    session = FakeSession()
    header = len(FORMATS[suffix](WIDTH).header(0))
    kept = 0
    if part.exists() and part.stat().st_size > header:
        with part.open("rb") as file:
            file.seek(header)
            kept = sum(1 for _ in FORMATS[suffix](WIDTH).whole(file))
    embed_some(iter(texts), output, None, session)
    assert session.asked == texts[kept:]
    assert output.read_bytes() == whole.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_beside_the_rows_is_said(data: Any, tmp_path: Path) -> None:
    """The file that says where rows come from, cut or changed: refused in words, or the same output."""
    texts, output = texts_for(9), tmp_path / "out.jsonl"
    embed_some(texts, whole := tmp_path / "whole.jsonl", overwrite=True)
    output.unlink(missing_ok=True)
    embed_some(texts, output, 6, overwrite=True)
    part, known = beside(output)
    raw, before = bytearray(known.read_bytes()), part.read_bytes()
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    known.write_bytes(raw)
    refused = list[str]()
    try:
        embed_some(texts, output)
    except InvalidInput as error:
        refused.append(str(error))
    if refused:
        assert "hint: --overwrite begins anew" in refused[0]
        assert part.read_bytes() == before
        assert not output.exists()
    else:
        assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_torn_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    """Answers have errors of rounding, so the row that is computed again may be shorter than what was torn."""

    class Shorter(FakeSession):
        @staticmethod
        def answer(text: str) -> Tensor | Error:
            return torch.zeros(WIDTH)

    output = tmp_path / f"out{suffix}"
    embed_some(["text"], output, 1)
    os.truncate(part := beside(output)[0], part.stat().st_size - 1)
    embed_some(["text"], output, None, Shorter())
    embed_some(["text"], tmp_path / f"whole{suffix}", None, Shorter())
    assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def other_program(session: FakeSession) -> None:
    session.program = SimpleNamespace(digest="e" * 64, output_shapes=session.program.output_shapes)


def other_model(session: FakeSession) -> None:
    session.link = SimpleNamespace(model="n")


@pytest.mark.parametrize(
    ("change", "texts", "message"),
    [
        (
            other_program,
            texts_for(9),
            r"out.npy.part was begun with another program: 'dddddddddddd', not 'eeeeeeeeeeee'",
        ),
        (other_model, texts_for(9), "begun with another model: 'm', not 'n'"),
        (None, ["other", *texts_for(9)[1:]], "the first 8 texts are not those of the run that is not finished"),
        (None, texts_for(7), "the first 8 texts are not those"),
        (None, [*texts_for(7), "changed", "x"], "the first 8 texts are not those"),
    ],
)
def test_another_run_is_not_continued(
    change: Callable[[FakeSession], None] | None, texts: list[str], message: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    embed_some(texts_for(9), output, 6)
    before = [path.read_bytes() for path in beside(output)]
    session = FakeSession()
    if change:
        change(session)
    with pytest.raises(InvalidInput, match=f"{message}.*\nhint: --overwrite begins anew"):
        embed_some(texts, output, None, session)
    assert session.asked == []
    assert [path.read_bytes() for path in beside(output)] == before
    embed_some(texts, output, None, session, overwrite=True)
    assert session.asked == texts


def test_other_options_are_not_continued(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    embed_some(texts_for(9), output, 6)
    with (
        pytest.raises(InvalidInput, match="begun with another long: 'refuse', not 'split'"),
        rows_of(embedder_of(FakeSession()), Embed("split"), texts_for(9), output, overwrite=False),  # type: ignore[arg-type]
    ):
        pass


def test_an_input_that_has_grown_is_continued(tmp_path: Path) -> None:
    output, session = tmp_path / "out.npy", FakeSession()
    embed_some(texts_for(9), output, 9, session)
    embed_some(texts_for(30), output, None, session)
    assert session.asked == texts_for(30)


def test_rows_of_unknown_origin_are_not_touched(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    part, known = beside(output)
    part.write_text("mine")
    with pytest.raises(InvalidInput, match=r"out.csv.part.json cannot be read: No such file"):
        embed_some(texts_for(3), output)
    assert part.read_text() == "mine"
    part.unlink()
    known.write_text("left behind by a run whose output was moved")
    embed_some(texts_for(3), output)
    assert len(read_rows(output)) == 3


def test_two_commands_do_not_write_one_output(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    with rows_of(embedder_of(FakeSession()), Embed(), texts_for(3), output, overwrite=False):  # type: ignore[arg-type]
        for overwrite in (True, False):
            with pytest.raises(InvalidInput, match=r"another command writes .*out.csv.part"):
                embed_some(texts_for(3), output, overwrite=overwrite)


def test_an_output_that_came_meanwhile_stays(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    with rows_of(embedder_of(FakeSession()), Embed(), texts_for(3), output, overwrite=False) as rows:  # type: ignore[arg-type]
        output.write_text("other")
        with pytest.raises(InvalidInput, match="came into being meanwhile\nhint: move it away: the rows are in"):
            rows.finish()
    assert output.read_text() == "other"


def test_texts_are_said_before_their_rows(tmp_path: Path) -> None:
    """At every instant the file beside the rows knows at least as many texts as there are rows."""
    output, session = tmp_path / "out.jsonl", FakeSession()
    part, known = beside(output)
    with rows_of(embedder_of(session), Embed(), texts_for(20), output, overwrite=False) as rows:  # type: ignore[arg-type]
        for done in embedded(embedder_of(session), Embed(), rows, 0):  # type: ignore[arg-type]
            assert part.read_bytes().count(b"\n") == done  # written as it came
            origin = read_origin(known)
            assert origin.texts >= done
            texts = Texts(texts_for(20))
            list(islice(texts, origin.texts))
            assert origin.sha256 == texts.sha256


def test_lengths_keep_texts_apart() -> None:
    one, other = Texts(["ab", "c"]), Texts(["a", "bc"])
    assert (len(list(one)), len(list(other))) == (2, 2)
    assert one.sha256 != other.sha256


def test_memory_is_flat(tmp_path: Path) -> None:
    class Brief(FakeSession):
        window = 256

        def stream(self, *arguments: Any, **options: Any) -> Iterator[Tensor | Error]:
            for answer in super().stream(*arguments, **options):
                self.asked.clear()
                yield answer

    source = tmp_path / "texts.txt"
    peaks = []
    for count in (1_000, 10_000):
        source.write_text("".join(f"{text}\n" for text in texts_for(count)))
        tracemalloc.start()
        rows = embed_some(TextFile(str(source)), tmp_path / f"{count}.jsonl", None, Brief())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows.rows == count
    assert peaks[1] < peaks[0] + 100_000


def test_a_session_keeps_its_newest_reports(compiled: secure.Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secure.session.session.REPORTS", 2)
    with secure.insecure_in_process(compiled) as session:
        assert len(list(session.stream(Embed(), sentences(4 * BATCH)))) == 4 * BATCH
        assert [report.query for report in session.reports] == [2, 3]


def test_a_model_without_vectors_is_refused() -> None:
    for shapes in ({"a": (1, 2), "b": (1, 2)}, {"a": (1, 2, 3)}):
        session: Any = SimpleNamespace(program=SimpleNamespace(output_shapes=shapes))
        with pytest.raises(InvalidInput, match="does not give a vector for each text"):
            vector_width(session)


@pytest.mark.parametrize("kind", [secure.TwoParty, secure.ThreeParty, secure.Ckks])
def test_programs_know_the_shapes_of_their_outputs(kind: Any, directory: Path) -> None:
    compiled = compiled_for(kind, directory, 1)
    with secure.insecure_in_process(compiled) as session:
        (vector,) = session.embed([TEXT])
        assert vector_width(session) == len(vector) == WIDTH


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_the_command_killed_again_and_again(
    suffix: str, server: Hosted, dealer: Hosted, directory: Path, tmp_path: Path
) -> None:
    """SIGKILL at any moment, four times; the server sees no more queries than texts, and those in flight."""
    texts = sentences(60)
    source, output = tmp_path / "texts.txt", tmp_path / f"out{suffix}"
    source.write_text("".join(f"{text}\n" for text in texts))
    arguments = [*COMMAND, "embed", "--server", server.address, "--dealer", dealer.address, "--input", str(source)]
    arguments += ["--output", str(output), "--pace", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    part, generator, sizes = beside(output)[0], random.Random(7), list[int]()
    for _ in range(4):
        child = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        before = part.stat().st_size if part.exists() else 0
        while child.poll() is None and (not part.exists() or part.stat().st_size <= before):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
        sizes.append(part.stat().st_size)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2
    ended = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "this run goes on at text" in ended.stderr
    rows = read_rows(output)
    with secure.connect(
        secure.TwoParty(server=server.address, dealer=dealer.address), cache=tmp_path / "cache", pace=0.0
    ) as session:
        for row, vector in zip(rows, session.embed(texts), strict=True):
            torch.testing.assert_close(row, vector, atol=5e-3, rtol=0)

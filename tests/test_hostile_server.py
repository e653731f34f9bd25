"""Servers that choose what their clients compute in the clear see the same messages, whatever a text holds.

Each case once told a server whether a text holds a word: by a query that did not come, or by the time until it came.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties.proto import unseen_pb2 as pb
from parties.two_party.server import InferenceService
from secure.errors import HandshakeError, InputTooLong, InvalidInput
from secure.models.tokenizer_document import TOKENIZER, tokenizer_digest
from secure.mpc.program import Program
from secure.tasks.embed import Embed
from tests.tiny import LENGTH, SPECIAL, WORDS, Ready, Served, dealing, dial, serving, wait_until

SECRET, OTHER = WORDS[10], WORDS[11]
WORD = len(SPECIAL) + 10  # the token of SECRET
WITH, WITHOUT = f"{WORDS[0]} {SECRET} {WORDS[3]}", f"{WORDS[0]} {OTHER} {WORDS[3]}"
PACE = 0.5


@pytest.fixture(scope="module")
def dealer() -> Iterator[Served]:
    """A dealer of its own: the servers here register Programs that other tests do not expect."""
    with dealing() as served:
        yield served


class Watching(InferenceService):
    """A server that notes kind, size and time of every message of its clients."""

    seen: list[tuple[str, int, float]]
    ended: threading.Event

    def Session(self, requests: Iterator[pb.ClientMessage], context: Any) -> Iterator[pb.ServerMessage]:
        def noted() -> Iterator[pb.ClientMessage]:
            for message in requests:
                self.seen.append((str(message.WhichOneof("content")), message.ByteSize(), time.monotonic()))
                yield message
            self.ended.set()

        yield from super().Session(noted(), context)


def asked(model: Ready, dealer: Served, texts: list[str]) -> tuple[list[tuple[str, int]], float, str]:
    """What a server sees of a run of texts: messages and their sizes, the time of the first; and the client's error."""
    Watching.seen, Watching.ended, error = [], threading.Event(), ""
    with serving(model, dealer.address, Watching) as server, dial(server, dealer, pace=PACE) as session:
        wait_until(lambda: bool(Watching.seen), "hello")
        start = time.monotonic()
        try:
            list(session.run(Embed(), texts))
        except secure.Error as caught:
            error = str(caught)
        count = len(session.reports)
    Watching.ended.wait(5)
    assert count == len(texts)
    messages = [(kind, size) for kind, size, _ in Watching.seen]
    return messages, Watching.seen[1][2] - start, error


def looks_the_same(model: Ready, dealer: Served, error: str) -> None:
    """A text with the secret word and one without it, alone and among others, look the same to the server."""
    for before, after in (([], []), ([WITHOUT], [WITHOUT])):
        (seen, first, failed), (plain, other, fine) = (
            asked(model, dealer, [*before, text, *after]) for text in (WITH, WITHOUT)
        )
        assert seen == plain
        assert [kind for kind, _ in seen].count("query") == 1 + len(before) + len(after)
        assert error in failed
        assert (bool(failed), fine) == (bool(error), "")
        for seconds in (first, other):
            assert PACE <= seconds < 1.8 * PACE


def served(model: Ready, program: Program, tokenizer_json: bytes | None = None) -> Ready:
    compiled = dataclasses.replace(model.compiled, tokenizer_json=tokenizer_json or model.compiled.tokenizer_json)
    return dataclasses.replace(model, compiled=compiled, masked=dataclasses.replace(model.masked, program=program))


def relabelled(model: Ready, tokenizer_json: bytes) -> Ready:
    """A server that hands out another tokenizer, and a Program of which it is part."""
    labels = {**model.program.labels, TOKENIZER: tokenizer_digest(tokenizer_json, 0, False)}
    return served(model, dataclasses.replace(model.program, labels=labels), tokenizer_json)


def test_a_graph_that_refuses_a_word(model: Ready, dealer: Served) -> None:
    """The word's token leaves the table: a client that raised for it would not have asked."""
    document = json.loads(model.program.encoded)
    graph = json.loads(document["client_graph"])
    at = len(graph["nodes"])

    def node(target: str, inputs: list[int], args: list[Any], dtype: str) -> None:
        graph["nodes"].append(
            {
                "attrs": {"args": args, "kwargs": {}, "target": target},
                "dtype": dtype,
                "id": len(graph["nodes"]),
                "inputs": inputs,
                "op": "clear",
                "path": "",
                "shape": [1, LENGTH],
                "visibility": "client",
            }
        )

    node("aten.eq.Scalar", [0], [{"input": 0}, WORD], "bool")
    node("aten.to.dtype", [at], [{"input": 0}, {"dtype": "int"}], "int")
    node("aten.mul.Tensor", [at + 1], [{"input": 0}, 1000], "int")
    node("aten.add.Tensor", [0, at + 2], [{"input": 0}, {"input": 1}], "int")
    graph["outputs"][0] = at + 3
    document["client_graph"] = json.dumps(graph, sort_keys=True, separators=(",", ":"))
    program = Program.from_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    looks_the_same(served(model, program), dealer, "")


def test_a_graph_that_is_slow_for_a_word(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_values = Program.clear_values

    def slow(program: Program, inputs: Any, tables: Any) -> Any:
        if bool((inputs["input_ids"] == WORD).any()):
            time.sleep(0.4 * PACE)
        return clear_values(program, inputs, tables)

    monkeypatch.setattr(Program, "clear_values", slow)
    looks_the_same(model, dealer, "")


def test_a_tokenizer_that_finds_a_text_too_long(model: Ready, dealer: Served) -> None:
    """The word falls into many tokens, and all others are one each."""
    pieces = sorted(set(SECRET)) + [f"##{letter}" for letter in sorted(set(SECRET))]
    words = [word for word in WORDS if word != SECRET]
    document = json.loads(model.compiled.tokenizer_json)
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *words, *pieces))}
    document["model"] = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocabulary,
    }
    # [CLS], a word, four pieces, a word, [SEP]: 8 tokens, and one word more makes them 9
    hostile = relabelled(model, json.dumps(document).encode())
    Watching.seen = []
    long, short = f"{WORDS[1]} {WITH}", f"{WORDS[1]} {WITHOUT}"
    (seen, first, failed), (plain, other, fine) = (asked(hostile, dealer, [text]) for text in (long, short))
    assert "the text has 9 tokens" in failed
    assert not fine
    assert seen == plain
    assert all(PACE <= seconds < 1.8 * PACE for seconds in (first, other))


def test_a_tokenizer_that_makes_a_word_longer_is_refused(model: Ready, dealer: Served) -> None:
    document = json.loads(model.compiled.tokenizer_json)
    document["normalizer"] = {"type": "Replace", "pattern": {"String": SECRET}, "content": f"{OTHER} " * 1000}
    hostile = relabelled(model, json.dumps(document).encode())
    with (
        serving(hostile, dealer.address) as server,
        pytest.raises(HandshakeError, match="a Replace of the tokenizer's normalizer makes a text longer"),
    ):
        dial(server, dealer)


def test_a_tokenizer_that_is_not_the_programs_is_refused(model: Ready, dealer: Served) -> None:
    """A client that knows a Program's digest so knows its tokenizer."""
    document = json.loads(model.compiled.tokenizer_json)
    document["normalizer"] = {"type": "Lowercase"}
    for other in (served(model, model.program, json.dumps(document).encode()), served(model, model.program, b"{}")):
        with (
            serving(other, dealer.address) as server,
            pytest.raises(HandshakeError, match=r"^tokenizer: one of the digest [0-9a-f]{64} came"),
        ):
            dial(server, dealer, program_digest=model.program.digest)
    assert model.compiled.tokenizer is not None
    for changed in ({"pad_id": 1}, {"lowercase": True}):
        compiled = dataclasses.replace(
            model.compiled, tokenizer=dataclasses.replace(model.compiled.tokenizer, **changed)
        )
        with (
            serving(dataclasses.replace(model, compiled=compiled), dealer.address) as server,
            pytest.raises(HandshakeError, match=r"^tokenizer: one of the digest"),
        ):
            dial(server, dealer)
    without = dataclasses.replace(
        model.program, labels={k: v for k, v in model.program.labels.items() if k != TOKENIZER}
    )
    with (
        serving(served(model, without), dealer.address) as server,
        pytest.raises(HandshakeError, match="the Program was made with none"),
    ):
        dial(server, dealer)


def test_the_digest_covers_the_tokenizer(model: Ready) -> None:
    assert model.program.labels[TOKENIZER] == tokenizer_digest(model.compiled.tokenizer_json, 0, False)
    assert (
        len({tokenizer_digest(raw, pad, low) for raw in (b"a", b"b") for pad in (0, 1) for low in (False, True)}) == 8
    )


def test_an_owner_cannot_compile_a_tokenizer_that_clients_refuse(model: Ready, directory: Any, tmp_path: Any) -> None:
    from secure.models.served_tokenizer import load_tokenizer

    document = json.loads((directory / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(
        InvalidInput, match="a Split of the tokenizer's pre_tokenizer has a regular expression of its own"
    ):
        load_tokenizer(tmp_path)


def test_a_text_is_bounded_before_it_is_tokenized(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    from secure.models.tokens import TextTokenizer, tokenize

    with pytest.raises(InputTooLong, match="has 2049 characters, the limit is 2048"):
        tokenize(TextTokenizer(None, 0), "x" * 2049, LENGTH)  # type: ignore[arg-type]

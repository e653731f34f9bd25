"""Tokenizers from outside: those of real encoders work, and all others are refused before they run."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from secure.errors import EmptyInput, Error, InputTooLong, InvalidInput
from secure.models import tokenizer_document as documents
from secure.models.tokenizer_document import read_tokenizer
from secure.models.tokens import TextTokenizer, tokenize
from tests.tiny import TEXT, WORDS, word_tokenizer

BASE: dict[str, Any] = json.loads(word_tokenizer().to_str())
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def document(**changed: Any) -> bytes:
    return json.dumps({**BASE, **changed}).encode()


def charsmap(pieces: bytes, trie: bytes = b"") -> str:
    return base64.b64encode(len(trie).to_bytes(4, "little") + trie + pieces).decode()


def test_bert_roberta_and_xlm_roberta() -> None:
    """The parts of their tokenizers, small."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = {letter: i for i, letter in enumerate(LETTERS)}
    bert = Tokenizer(models.WordPiece({"[UNK]": 26, **pieces, **{f"##{c}": 27 + i for i, c in enumerate(LETTERS)}}))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.BertProcessing(("b", 1), ("a", 0))
    bert.decoder = decoders.WordPiece()
    roberta = Tokenizer(models.BPE({**pieces, "ab": 26, "Ġ": 27}, [("a", "b")]))
    roberta.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    roberta.post_processor = processors.RobertaProcessing(("b", 1), ("a", 0))
    xlm = Tokenizer(models.Unigram([(c, -1.0) for c in ("<unk>", "▁", *LETTERS)], 0, False))
    xlm.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    xlm.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    xlm.post_processor = processors.TemplateProcessing("a $A b", "a $A b $B b", [("a", 2), ("b", 3)])
    for tokenizer in (bert, roberta, xlm):
        tokenizer.enable_padding(length=9)
        tokenizer.enable_truncation(4)
        read, found = read_tokenizer(tokenizer.to_str().encode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        text = "abc  def ghi\u00e9"
        assert read.encode(text).ids == tokenizer.encode(text).ids
        assert found["padding"]["strategy"] == {"Fixed": 9}


def test_the_packaged_tokenizer() -> None:
    from secure.models.sentence_encoder import find_packaged_model

    try:
        directory = find_packaged_model()
    except Error:
        pytest.skip("the model is not installed")
    raw = (directory / "tokenizer.json").read_bytes()
    assert read_tokenizer(raw)[0].encode("A sentence.").ids == [101, 1037, 6251, 1012, 102]


def test_a_model_without_its_kind() -> None:
    """Old versions of the library left it out."""
    model = {name: value for name, value in BASE["model"].items() if name != "type"}
    assert read_tokenizer(document(model=model))[0].encode(TEXT).ids == word_tokenizer().encode(TEXT).ids


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a Replace that expands": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b " * 1000}},
        "makes a text longer",
    ),
    "a Replace of nothing": (
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": ""}},
        "makes a text longer",
    ),
    "a regular expression": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|a)+$"}, "content": ""}},
        "a regular expression of its own",
    ),
    "a known regular expression that expands": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "x" * 99}},
        "makes a text longer",
    ),
    "a Replace in a sequence": (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "bb"}],
            }
        },
        "makes a text longer",
    ),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "x" * 41}}, "what a normalizer prepends"),
    "a precompiled map that expands": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 41 + b"\0")}},
        "makes more than 40 bytes of a character",
    ),
    "a precompiled map without an end": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x")}},
        "makes more than 40 bytes of a character",
    ),
    "a map that is none": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "%"}},
        "is malformed",
    ),
    "a map that the library refuses": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        "cannot be loaded",
    ),
    "a part twice": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFKD"}]}},
        "two parts of one kind",
    ),
    "a sequence in a sequence": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}},
        "a sequence within a sequence",
    ),
    "many parts": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 17}},
        "no sequence of at most 16 parts",
    ),
    "an unknown kind": ({"normalizer": {"type": "Script\x1b[2J"}}, r"the kind 'Script\?\[2J', which clients"),
    "no kind": ({"normalizer": {"lowercase": True}}, "the kind 'None'"),
    "an unknown field": ({"normalizer": {"type": "NFC", "more": 1}}, "has the field 'more'"),
    "a Split": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}},
        "a Split of the tokenizer's pre_tokenizer has a regular expression of its own",
    ),
    "a template without the text": (
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}},
        "does not hold the text once",
    ),
    "a template that repeats the text": (
        {
            "post_processor": {
                **BASE["post_processor"],
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
            }
        },
        "does not hold the text once",
    ),
    "a template of many tokens": (
        {
            "post_processor": {
                **BASE["post_processor"],
                "single": [
                    *[{"SpecialToken": {"id": "[CLS]", "type_id": 0}}] * 65,
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
            }
        },
        "does not hold the text once",
    ),
    "chance": (
        {"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}},
        "drops merges by chance",
    ),
    "long words": (
        {
            "model": {
                "type": "WordPiece",
                "unk_token": "a",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10**9,
                "vocab": {"a": 0},
            }
        },
        "max_input_chars_per_word is 1000000000",
    ),
    "a long affix": (
        {
            "model": {
                "type": "WordPiece",
                "unk_token": "a",
                "continuing_subword_prefix": "#" * 17,
                "max_input_chars_per_word": 9,
                "vocab": {"a": 0},
            }
        },
        "continuing_subword_prefix is no text of 0 to 16 characters",
    ),
    "a long token": (
        {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a" * 513: 0}}},
        "a token is no text of at most 512 characters",
    ),
    "a long token that is tried at every character": (
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 65, 0.0]], "byte_fallback": False}},
        "a token is no text of at most 64 characters",
    ),
    "tokens whose tree takes gigabytes": (
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 64, 0.0]] * 65537, "byte_fallback": False}},
        "the tokens of a Unigram model have 4194368 bytes together",
    ),
    "a large id": ({"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 1 << 32}}}, "cannot be loaded"),
    "an added token of nothing": ({"added_tokens": [{"id": 0, "content": ""}]}, "no text of 1 to 512 characters"),
    "added tokens that are none": ({"added_tokens": 3}, "is malformed"),
    "no model": ({"model": None}, "has no model"),
    "half a character": (
        {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"\ud800": 0}}},
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_client_runs(name: str) -> None:
    changed, message = REFUSED[name]
    with pytest.raises(InvalidInput, match=message) as caught:
        read_tokenizer(document(**changed))
    assert "\x1b" not in str(caught.value)
    assert "hint:" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "is malformed: KeyError"),
        (b'{"model": NaN}', "it holds NaN"),
        (b"9" * 5000, "is not JSON"),
        (b'{"model":' + b"[" * 100_000, "is not JSON"),
        (b"[" * (documents.MAXIMUM_VALUES + 1), "JSON values\nhint: 2097152 at most"),
        (b" " * (documents.MAXIMUM_BYTES + 1), "33554433 bytes\nhint: 33554432 at most"),
    ],
)
def test_bytes_that_are_no_tokenizer(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_tokenizer(raw)


def test_a_field_twice_counts_as_the_library_gets_it() -> None:
    """Two readers that take different ones of two equal keys would check one tokenizer and run another."""
    twice = document().replace(b'"normalizer": null', b'"normalizer": {"type": "Nope"}, "normalizer": null')
    assert read_tokenizer(twice)[0].normalizer is None
    twice = document().replace(b'"normalizer": null', b'"normalizer": null, "normalizer": {"type": "Lowercase"}')
    assert read_tokenizer(twice)[0].encode(WORDS[5].upper()).ids[1] != 1


def of_one_character(character: str) -> bytes:
    """The trie of a precompiled normalizer that changes this character alone."""
    units, code = np.zeros(1024, "<u4"), ord(character)
    at, value = 256 ^ code, 600
    units[0], units[at] = 256 << 10, code | 1 << 8 | (at ^ value) << 10
    return units.tobytes()


def test_a_word_that_a_normalizer_makes_long_takes_no_time() -> None:
    """Before, a word of five letters became 1,170 characters, and dividing them took 0.16 s: more than the pace.

    So the first message of a text with the word left 0.1 s later.
    """
    mark, ligature = "\x07", "\ufdfa"  # which NFKC writes as 18 characters
    parts = [
        {"type": "Replace", "pattern": {"String": "money"}, "content": mark * 5},
        {
            "type": "Precompiled",
            "precompiled_charsmap": charsmap(ligature.encode() * 13 + b"\0", of_one_character(mark)),
        },
        {"type": "NFKC"},
    ]
    sequence = {"type": "Sequence", "normalizers": parts}
    found, _ = read_tokenizer(document(normalizer=sequence, pre_tokenizer=None))
    assert found.normalizer is not None
    assert len(found.normalizer.normalize_str("money")) == 5 * 13 * 18
    tokenizer = TextTokenizer(found, 0)
    tokenize(tokenizer, "letter", 9)
    tokenize(tokenizer, ligature * 2, 9)  # a few are no reason to refuse a text
    with pytest.raises(InvalidInput, match="the tokenizer makes 1170 characters of the text's 5"):
        tokenize(tokenizer, "money", 9)


PANICS = (
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"abc\0", b"\xff" * 8)}},
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "B", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    {"model": {"type": "WordLevel", "unk_token": "missing", "vocab": {"a": 0}}},
)


@pytest.mark.parametrize("changed", PANICS)
def test_a_tokenizer_that_fails_on_a_text(changed: dict[str, Any]) -> None:
    """A panic of the library is no Exception in Python, and would end a client at the word that causes it."""
    tokenizer = TextTokenizer(read_tokenizer(document(**changed))[0], 0)
    with pytest.raises(InvalidInput, match="the tokenizer fails on this text"):
        tokenize(tokenizer, "b", 8)


# whatever a document holds, a client gets ids or an error of its own

KINDS = [
    *documents.NORMALIZERS,
    *documents.PRE_TOKENIZERS,
    *documents.POST_PROCESSORS,
    *documents.MODELS,
    "CharDelimiterSplit",
]
FIELDS = sorted(
    {field for known in (documents.NORMALIZERS, documents.PRE_TOKENIZERS, documents.POST_PROCESSORS, documents.MODELS)
     for fields in known.values() for field in fields}
)  # fmt: skip
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-1, 300)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "a", " ", "▁", "##", "[UNK]", "é"])
)
NAMES = st.sampled_from([*FIELDS, "type", "id", "ids", "String", "Regex", "Sequence", "A"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=3)
        | st.fixed_dictionaries({"type": st.sampled_from(KINDS)}, optional=dict.fromkeys(FIELDS, inner))
    ),
    max_leaves=8,
)


def part(known: Any) -> Any:
    """A part of a known kind with fields of any contents."""
    return st.one_of(
        [
            st.fixed_dictionaries({"type": st.just(kind)}, optional=dict.fromkeys(sorted(fields), VALUES))
            for kind, fields in known.items()
        ]
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "normalizer": part(documents.NORMALIZERS) | VALUES,
            "pre_tokenizer": part(documents.PRE_TOKENIZERS) | VALUES,
            "post_processor": part(documents.POST_PROCESSORS) | VALUES,
            "model": part(documents.MODELS),
            "added_tokens": VALUES,
        },
    ),
    st.text(max_size=20),
)
def test_any_document(changed: dict[str, Any], text: str) -> None:
    try:
        tokenizer = TextTokenizer(read_tokenizer(json.dumps({**BASE, **changed}).encode())[0], 0)
        ids, mask = tokenize(tokenizer, text, 16)
    except (InvalidInput, InputTooLong, EmptyInput):
        return
    assert ids.shape == mask.shape == (1, 16)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(document())), st.integers(0, 40))
def test_any_bytes(inserted: bytes, at: int, dropped: int) -> None:
    raw = document()
    with suppress(InvalidInput):
        read_tokenizer(raw[:at] + inserted + raw[at + dropped :])

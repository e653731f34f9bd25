"""The tokenizers that a client runs on its texts. They come from a server, so everything in them is checked first.

A tokenizer is a JSON document (``tokenizer.json``), which the ``tokenizers`` library runs. A client takes one only if
all its parts are of the kinds in the tables below, which real encoders use and which are total: each ends in time about
linear in the text, and makes it longer by a constant factor at most. There is no pattern of a server's choice, nothing
random, and each kind of part stands once in a sequence, so that factors do not multiply without end. They do multiply:
one character may become 700. So ``tokens.tokenize`` looks how long a text has become before it divides it.

The document is read as JSON here, and the library gets a new document with the checked parts alone: the two readers
cannot understand it differently.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from secure.errors import InvalidInput, MissingPackage, printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer"  # the label of a Program that holds the digest of its tokenizer
MAXIMUM_BYTES = 1 << 25  # of a document; multilingual ones of 250,000 tokens have 17 MB
MAXIMUM_VALUES = 1 << 21  # of JSON, which bounds the memory that its reader takes
MAXIMUM_TOKENS = 1 << 20
MAXIMUM_TOKEN = 512  # characters
MAXIMUM_UNIGRAM = 64  # the same for Unigram, which tries all tokens at every character; ours have 16
MAXIMUM_TREE = 1 << 22  # bytes of all tokens of Unigram, whose tree takes some 400 for each; those of XLM-R have 2 MB
MAXIMUM_ADDED = 64  # tokens that stand around a text
MAXIMUM_PARTS = 16  # of a sequence
MAXIMUM_AFFIX = 16  # characters that mark the inside or the end of a word
MAXIMUM_WORD = 256  # characters of a word that WordPiece divides, which takes the square of it
MAXIMUM_PIECE = 40  # bytes that a precompiled normalizer puts for a character; the largest that is used has 33
PATTERNS = (" {2,}", r"\s{2,}|[\n\r\t]")  # regular expressions that a Replace may hold, for one character
SPLITS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
)
"""The regular expressions that a Split may hold: those of Qwen and of Llama 3. They take a time linear in the text."""

Fields = frozenset[str]
_NONE: Fields = frozenset()

NORMALIZERS: Mapping[str, Fields] = {
    "BertNormalizer": frozenset({"clean_text", "handle_chinese_chars", "strip_accents", "lowercase"}),
    "Lowercase": _NONE,
    "NFC": _NONE,
    "NFD": _NONE,
    "NFKC": _NONE,
    "NFKD": _NONE,
    "Nmt": _NONE,
    "Precompiled": frozenset({"precompiled_charsmap"}),
    "Prepend": frozenset({"prepend"}),
    "Replace": frozenset({"pattern", "content"}),
    "Sequence": frozenset({"normalizers"}),
    "Strip": frozenset({"strip_left", "strip_right"}),
    "StripAccents": _NONE,
}
PRE_TOKENIZERS: Mapping[str, Fields] = {
    "BertPreTokenizer": _NONE,
    "ByteLevel": frozenset({"add_prefix_space", "trim_offsets", "use_regex"}),
    "Digits": frozenset({"individual_digits"}),
    "Metaspace": frozenset({"replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"}),
    "Punctuation": frozenset({"behavior"}),
    "Sequence": frozenset({"pretokenizers"}),
    "Split": frozenset({"pattern", "behavior", "invert"}),
    "Whitespace": _NONE,
    "WhitespaceSplit": _NONE,
}
POST_PROCESSORS: Mapping[str, Fields] = {
    "BertProcessing": frozenset({"sep", "cls"}),
    "ByteLevel": frozenset({"add_prefix_space", "trim_offsets", "use_regex"}),
    "RobertaProcessing": frozenset({"sep", "cls", "trim_offsets", "add_prefix_space"}),
    "Sequence": frozenset({"processors"}),
    "TemplateProcessing": frozenset({"single", "pair", "special_tokens"}),
}
DECODERS: Mapping[str, Fields] = {
    "ByteFallback": _NONE,
    "ByteLevel": frozenset({"add_prefix_space", "trim_offsets", "use_regex"}),
    "Fuse": _NONE,
    "Metaspace": frozenset({"replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"}),
    "Replace": frozenset({"pattern", "content"}),
    "Sequence": frozenset({"decoders"}),
    "Strip": frozenset({"content", "start", "stop"}),
}
"""Parts that make a text of tokens. What they make of the first tokens is the beginning of what they make of all."""
MODELS: Mapping[str, Fields] = {
    "BPE": frozenset(
        {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"}
        | {"fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"}
    ),
    "Unigram": frozenset({"unk_id", "vocab", "byte_fallback"}),
    "WordLevel": frozenset({"vocab", "unk_token"}),
    "WordPiece": frozenset({"unk_token", "continuing_subword_prefix", "max_input_chars_per_word", "vocab"}),
}
ADDED = frozenset({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"})


def tokenizer_digest(raw: bytes, pad_id: int, lowercase: bool) -> str:
    """Return what a Program's label TOKENIZER holds: SHA-256 over the document, the padding id and lower-casing."""
    return hashlib.sha256(f"{hashlib.sha256(raw).hexdigest()}/{pad_id}/{int(lowercase)}".encode()).hexdigest()


def read_tokenizer(raw: bytes) -> tuple[Tokenizer, Mapping[str, Any]]:
    """Check a document and load it; return the tokenizer, which neither truncates nor pads, and the document.

    Raises InvalidInput for a document that is not JSON, is too large, or has a part that clients do not run.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingPackage("the tokenizers library is not installed\nhint: pip install tokenizers") from None
    document = _document(raw)
    try:
        checked = _checked(document)
    except InvalidInput:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InvalidInput(f"the tokenizer is malformed: {type(error).__name__}", _HINT) from None
    try:
        return Tokenizer.from_str(json.dumps(checked)), document
    except BaseException as error:  # the library raises Exception itself, and a BaseException where Rust panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = printable(str(error))[:200]
        raise InvalidInput(f"the tokenizer cannot be loaded: {reason}", _HINT) from None


_HINT = "use the tokenizer.json of an encoder such as BERT, RoBERTa, MPNet or XLM-R"


def _document(raw: bytes) -> Mapping[str, Any]:
    if len(raw) > MAXIMUM_BYTES:
        raise InvalidInput(f"the tokenizer has {len(raw)} bytes", f"{MAXIMUM_BYTES} at most")
    if (values := sum(raw.count(c) for c in (b",", b"[", b"{"))) > MAXIMUM_VALUES:
        raise InvalidInput(f"the tokenizer has {values} JSON values", f"{MAXIMUM_VALUES} at most")
    try:
        document = json.loads(raw.decode(), parse_constant=_no_constant)
    except InvalidInput:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the tokenizer is not JSON: {type(error).__name__}", _HINT) from None
    if not isinstance(document, dict):
        raise InvalidInput("the tokenizer is not a JSON object", _HINT)
    return document


def _no_constant(name: str) -> Any:
    raise InvalidInput(f"the tokenizer is not JSON: it holds {name}", _HINT)


def _checked(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with the parts alone that matter for the ids of one text, all of them checked."""
    added = [dict(token) for token in document.get("added_tokens") or []]
    for token in added:
        _only("an added token", token, ADDED)
        _length("an added token", token["content"], MAXIMUM_TOKEN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _part("normalizer", document.get("normalizer"), NORMALIZERS, _normalizer),
        "pre_tokenizer": _part("pre_tokenizer", document.get("pre_tokenizer"), PRE_TOKENIZERS, _pre_tokenizer),
        "post_processor": _part("post_processor", document.get("post_processor"), POST_PROCESSORS, _post_processor),
        "decoder": _known_decoder(document.get("decoder")),
        "model": _model(document["model"]),
    }


Check = Callable[[str, Mapping[str, Any]], None]


def _part(place: str, part: Any, known: Mapping[str, Fields], check: Check, *, inner: bool = False) -> Any:
    """Check a part of a known kind, or a sequence of such parts in which each kind stands once (but for Replace)."""
    if part is None:
        return None
    kind = _kind(place, part, known)
    if kind != "Sequence":
        check(kind, part)
        return dict(part)
    if inner:
        raise InvalidInput(f"the tokenizer's {place} is a sequence within a sequence", _HINT)
    (field,) = known[kind]
    parts = part[field]
    if not isinstance(parts, list) or len(parts) > MAXIMUM_PARTS:
        raise InvalidInput(f"the tokenizer's {place} is no sequence of at most {MAXIMUM_PARTS} parts", _HINT)
    kinds = [each["type"] for each in parts if each["type"] != "Replace"]
    if len(set(kinds)) != len(kinds):
        raise InvalidInput(f"the tokenizer's {place} has two parts of one kind", _HINT)
    return {"type": kind, field: [_part(place, each, known, check, inner=True) for each in parts]}


def _kind(place: str, part: Any, known: Mapping[str, Fields]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in known:
        raise InvalidInput(
            f"the tokenizer's {place} is of the kind {printable(str(kind))[:40]!r}, which clients do not run",
            f"one of {', '.join(known)}",
        )
    _only(f"the tokenizer's {place} {kind}", part, known[kind] | {"type"})
    return kind


def _only(what: str, part: Mapping[str, Any], fields: Fields) -> None:
    if unknown := sorted(set(part) - fields):
        raise InvalidInput(f"{what} has the field {printable(unknown[0])[:40]!r}", _HINT)


def _length(what: str, text: Any, most: int, least: int = 1) -> None:
    if not isinstance(text, str) or not least <= len(text) <= most:
        raise InvalidInput(f"{what} is no text of {least} to {most} characters", _HINT)


def _nothing_more(kind: str, part: Mapping[str, Any]) -> None:
    """The fields of this kind have no sizes; the library checks their types."""


def _normalizer(kind: str, part: Mapping[str, Any]) -> None:
    if kind == "Prepend":
        _length("what a normalizer prepends", part["prepend"], MAXIMUM_PIECE)
    elif kind == "Precompiled":
        data = base64.b64decode(part["precompiled_charsmap"], validate=True)
        pieces = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")  # behind the size of a trie, and the trie
        if pieces[-1] or max(map(len, pieces)) > MAXIMUM_PIECE:
            raise InvalidInput(f"a precompiled normalizer makes more than {MAXIMUM_PIECE} bytes of a character", _HINT)
    elif kind == "Replace":
        content, pattern = part["content"], part["pattern"]
        match list(pattern.items()):
            case [("String", str(text))] if 0 < len(text) <= MAXIMUM_TOKEN and len(content) <= len(text):
                return
            case [("Regex", str(text))] if text in PATTERNS and len(content) <= 1:
                return
        raise InvalidInput(
            "a Replace of the tokenizer's normalizer makes a text longer, or has a regular expression of its own",
            f"replace texts by texts that are not longer, or one of {', '.join(map(repr, PATTERNS))}",
        )


def _pre_tokenizer(kind: str, part: Mapping[str, Any]) -> None:
    if kind != "Split":
        return
    match list(part["pattern"].items()):
        case [("String", str(text))] if 0 < len(text) <= MAXIMUM_TOKEN:
            return
        case [("Regex", str(text))] if text in SPLITS:
            return
    raise InvalidInput(
        "a Split of the tokenizer's pre_tokenizer has a regular expression of its own",
        "divide at a text, or as Qwen and Llama do",
    )


def _post_processor(kind: str, part: Mapping[str, Any]) -> None:
    if kind != "TemplateProcessing":
        return
    template, tokens = part["single"], part["special_tokens"]
    pieces = [name for piece in template for name in piece]  # each piece has one key
    longest = max((len(token["ids"]) for token in tokens.values()), default=0)
    added = pieces.count("SpecialToken")
    if len(pieces) - added != 1 or len(template) != len(pieces) or added * longest > MAXIMUM_ADDED:
        raise InvalidInput(
            "a template of the tokenizer does not hold the text once",
            f"the text, and at most {MAXIMUM_ADDED} special tokens around it",
        )
    pair = [(name, piece[name].get("id")) for piece in part.get("pair") or [] for name in piece]
    texts = [of for name, of in pair if name != "SpecialToken"]
    if len(set(texts)) != len(texts) or (len(pair) - len(texts)) * longest > MAXIMUM_ADDED:
        raise InvalidInput(
            "the template of pairs of the tokenizer holds a text twice",
            f"each text once, and at most {MAXIMUM_ADDED} special tokens around them",
        )


def _known_decoder(part: Any) -> Any:
    """Check a decoder; None for one of another kind, which only a model that writes text would need."""
    parts = part.get("decoders", []) if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if part is None or not all(isinstance(each, dict) and each.get("type") in DECODERS for each in parts):
        return None
    return _part("decoder", part, DECODERS, _decoder)


def _decoder(kind: str, part: Mapping[str, Any]) -> None:
    if kind == "Strip":
        _length("what a decoder strips", part["content"], 1)
        if part["stop"] != 0 or not 0 <= part["start"] <= MAXIMUM_AFFIX:
            raise InvalidInput(
                f"a decoder strips {part['start']} characters at the beginning and {part['stop']} at the end",
                f"{MAXIMUM_AFFIX} at most, and none",
            )
    elif kind == "Replace":
        match list(part["pattern"].items()):
            case [("String", str(text))] if len(text) == 1 and len(part["content"]) <= 1:
                return
        raise InvalidInput("a Replace of the tokenizer's decoder is not for one character", "replace single ones")


def _model(model: Any) -> dict[str, Any]:
    if not isinstance(model, dict):
        raise InvalidInput("the tokenizer has no model", _HINT)
    model = model if "type" in model else {"type": _old_kind(model), **model}
    kind = _kind("model", model, MODELS)
    if model.get("dropout") not in (None, 0):
        raise InvalidInput("the tokenizer drops merges by chance, so a text has no fixed tokens", "leave dropout out")
    if kind == "WordPiece" and not 0 < model.get("max_input_chars_per_word", 100) <= MAXIMUM_WORD:
        raise InvalidInput(
            f"max_input_chars_per_word is {model['max_input_chars_per_word']}", f"1 to {MAXIMUM_WORD} characters"
        )
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        _length(affix, model.get(affix) or "", MAXIMUM_AFFIX, least=0)
    vocabulary, merges = model["vocab"], model.get("merges") or []
    if max(len(vocabulary), len(merges)) > MAXIMUM_TOKENS:
        raise InvalidInput(
            f"the tokenizer has {len(vocabulary)} tokens, {len(merges)} merges", f"{MAXIMUM_TOKENS} each"
        )
    tokens = vocabulary if kind != "Unigram" else [entry[0] for entry in vocabulary]
    most = MAXIMUM_UNIGRAM if kind == "Unigram" else MAXIMUM_TOKEN
    if not all(isinstance(token, str) and len(token) <= most for token in tokens):
        raise InvalidInput(f"a token is no text of at most {most} characters", _HINT)
    if kind == "Unigram" and (size := sum(len(token.encode(errors="replace")) for token in tokens)) > MAXIMUM_TREE:
        raise InvalidInput(f"the tokens of a Unigram model have {size} bytes together", f"{MAXIMUM_TREE} at most")
    return dict(model)


def _old_kind(model: Mapping[str, Any]) -> str:
    """Tell the kind of a model that an old version wrote, without its name."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"

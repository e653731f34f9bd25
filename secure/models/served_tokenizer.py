"""The tokenizer that a model's clients run, made from the one of its directory as transformers loads it.

transformers takes a tokenizer from several files, which may disagree, and converts old formats. So the served document
is what it made of them. Before it is served, both divide probe texts; a difference is refused with the first such text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secure.errors import InvalidInput, MissingPackage, ModelNotFound, printable
from secure.models.calibration import HELD_OUT, SENTENCES
from secure.models.checkpoints import check_pointer, quiet_transformers
from secure.models.sentence_directory import transformer_directory
from secure.models.tokenizer_document import read_tokenizer
from secure.models.tokens import TextTokenizer, read_json

FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "spm.model", "tokenizer.model", "source.spm",
)  # fmt: skip
"""The files from which transformers makes a tokenizer."""

PROBES = (
    "",
    " ",
    "MixedCase ALL CAPS ÄÖÜ ẞ ΣΊΣΥΦΟΣ İstanbul",
    "naïve café Ångström e\u0301 \ufb01ne",
    "  two  spaces\tand\ta tab\n\nand lines \u00a0 ",
    "\ufeffa mark before",
    "zero\u200bwidth \u00adsoft",
    "don't can't it's; (brackets) [brackets] <angles> {braces}",
    "[CLS] [SEP] [MASK] [PAD] [UNK] <s> </s> <mask> <pad> <unk> <|endoftext|>",
    "3.14159 1,000,000 12345678901234567890 0x7f ½ ²",
    "한국어 문장 日本語の文 ไทย हिन्दी עברית العربية",
    "🙂👩‍👩‍👧‍👦🇫🇷 :smile:",
    "a" * 120,
    "." * 60,
    "snake_case camelCase kebab-case a/b/c user@example.org",
)
"""Texts on which tokenizers differ."""


def load_tokenizer(directory: str | Path) -> TextTokenizer:
    """Load the tokenizer of a directory; see ``load_served_tokenizer``."""
    return load_served_tokenizer(directory)[0]


def load_served_tokenizer(directory: str | Path, rows: int | None = None) -> tuple[TextTokenizer, bytes]:
    """Return the tokenizer of a model's directory, and the document that clients get; see ``load_tokenizers``."""
    served, document, _ = load_tokenizers(directory, rows)
    return served, document


def load_tokenizers(directory: str | Path, rows: int | None = None) -> tuple[TextTokenizer, bytes, Any]:
    """Return the tokenizer of a model's directory, the document that clients get, and the tokenizer of transformers.

    rows: of the model's table of tokens, which all ids must be below. Lower-casing that sentence-transformers adds
    becomes a part of the document. Raises MissingPackage, ModelNotFound if there is no tokenizer, and InvalidInput for
    one that clients do not run, that has ids beyond the table, or that divides a text otherwise than the original.
    """
    directory = transformer_directory(Path(directory))
    there = [directory / name for name in FILES if (directory / name).is_file()]
    if not there:
        raise ModelNotFound(
            f"{directory} has no tokenizer: none of {', '.join(FILES)}\n"
            "hint: give the model's directory; save_pretrained of a tokenizer writes them"
        )
    for path in there:
        check_pointer(path)
    _check_converts(there)
    original = _original(directory)
    lowered = bool(read_json(directory / "sentence_bert_config.json").get("do_lower_case", False))
    if lowered:
        _lower(original.backend_tokenizer)
    document = original.backend_tokenizer.to_str().encode()
    try:
        tokenizer, _ = read_tokenizer(document)
    except InvalidInput as error:
        raise InvalidInput(f"{directory} has no tokenizer that clients run: {error}") from None
    if rows is not None:
        _check_rows(directory, tokenizer, rows)
    served = TextTokenizer(tokenizer, _pad_id(original, directory))
    _check_same(directory, tokenizer, original, [*PROBES, *SENTENCES, *HELD_OUT])
    return served, document, original


def _check_converts(there: Collection[Path]) -> None:
    """Refuse a sentencepiece model alone where the library that reads it is missing; transformers names another."""
    models, others = [path for path in there if path.suffix == ".model"], {path.name for path in there}
    if models and not others & {"tokenizer.json", "vocab.txt", "vocab.json"} and find_spec("sentencepiece") is None:
        raise MissingPackage(
            f"{models[0]} is a sentencepiece model, and sentencepiece is not installed\n"
            f"hint: pip install 'unseen[sentencepiece]'; or {_WAY_OUT}"
        )


def _original(directory: Path) -> Any:
    """Load a tokenizer as transformers does, with the library that clients run at its core."""
    with quiet_transformers():
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingPackage("transformers is not installed\nhint: pip install 'unseen[models]'") from None
        try:
            found = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # every format raises errors of its own
            reason = printable((str(error).strip().splitlines() or [""])[0])[:300]
            raise InvalidInput(
                f"the tokenizer in {directory} cannot be loaded: {type(error).__name__}: {reason}", _WAY_OUT
            ) from None
    if not getattr(found, "is_fast", False):
        raise InvalidInput(
            f"the tokenizer in {directory} is a {type(found).__name__}, which runs in Python alone, not at clients",
            _WAY_OUT,
        )
    return found


_WAY_OUT = (
    "convert it where it loads: AutoTokenizer.from_pretrained(...).save_pretrained(DIRECTORY) writes a tokenizer.json; "
    "a type without a fast tokenizer is not supported"
)


def _lower(tokenizer: Any) -> None:
    """Lower-case a text first, as sentence-transformers does, unless the tokenizer does so already."""
    from tokenizers import normalizers

    found = tokenizer.normalizer
    parts: list[Any] = [*found] if isinstance(found, normalizers.Sequence) else [found]  # type: ignore[misc]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *(part for part in parts if part)])


def _pad_id(original: Any, directory: Path) -> int:
    """Find the padding id: the tokenizer's, or that of the model's configuration, or 0."""
    for found in (original.pad_token_id, read_json(directory / "config.json").get("pad_token_id")):
        if isinstance(found, int) and found >= 0:
            return found
    return 0


def _check_rows(directory: Path, tokenizer: Any, rows: int) -> None:
    beyond = sorted((id, token) for token, id in tokenizer.get_vocab(with_added_tokens=True).items() if id >= rows)
    if beyond:
        id, token = beyond[0]
        raise InvalidInput(
            f"the tokenizer in {directory} has {len(beyond)} tokens beyond the model's table of {rows} rows: "
            f"{printable(token)[:80]!r} is {id}",
            "model.resize_token_embeddings(len(tokenizer)) and training add rows; or take the tokens out",
        )


def _check_same(directory: Path, served: Any, original: Any, texts: Iterable[str]) -> None:
    """Refuse a tokenizer that divides one of the texts otherwise than the original."""
    for text in texts:
        with quiet_transformers():
            theirs = list(original(text, truncation=False, padding=False)["input_ids"])
        ours = served.encode(text).ids
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            shown = printable(json.dumps(text, ensure_ascii=False))[:120]
            raise InvalidInput(
                f"the tokenizer in {directory} divides {shown} otherwise than transformers: "
                f"token {at + 1} is {_at(served, ours, at)}, not {_at(served, theirs, at)}",
                "save the tokenizer again with save_pretrained, and tell us if that does not help",
            )


def _at(tokenizer: Any, ids: list[int], at: int) -> str:
    return printable(repr(tokenizer.id_to_token(ids[at])))[:80] if at < len(ids) else "none"

"""Tokenizers as they are found: clients get the tokens of the original, or the server does not start."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest

from secure.errors import InvalidInput, MissingPackage, ModelNotFound
from secure.models import served_tokenizer
from secure.models.calibration import HELD_OUT, SENTENCES
from secure.models.served_tokenizer import FILES, PROBES, load_served_tokenizer, load_tokenizer
from secure.models.text import load_text_model
from secure.models.tokenizer_document import SPLITS, read_tokenizer
from secure.models.tokens import tokenize
from tests.tiny import WORDS, write_model

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "The", "the", "Dog", "dog", "##s", "runs", "Äpfel", "apfel", "äpfel", ".", ",", "query", ":"]
TEXTS = ["The Dog runs.", "the dogs", "Äpfel THE", "[MASK] dog", "", "unheard of"]


def word_pieces(directory: Path, lowercase: bool, post_processor: bool = True) -> Path:
    """A WordPiece tokenizer as tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"model_type": "bert", "vocab_size": 18}')
    return directory


def theirs(directory: Path, text: str, lowered: bool = False) -> list[int]:
    """The tokens of the original: transformers, with the lower-casing that sentence-transformers adds."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if lowered:
        found = original.backend_tokenizer.normalizer
        original.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), found])
    return list(original(text)["input_ids"])


@pytest.mark.parametrize("document", [False, True])
@pytest.mark.parametrize("settings", [None, False, True])
@pytest.mark.parametrize("sentence", [None, False, True])
def test_every_combination_of_lower_casing(
    document: bool, settings: bool | None, sentence: bool | None, tmp_path: Path
) -> None:
    """The files tokenizer.json, tokenizer_config.json and sentence_bert_config.json may each say it, or not."""
    word_pieces(tmp_path, document)
    kind = {"tokenizer_class": "BertTokenizer"}
    lower = {} if settings is None else {"do_lower_case": settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind | lower))
    if sentence is not None:
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": sentence}))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        expected = theirs(tmp_path, text, lowered=bool(sentence))
        assert tokenizer.tokenizer.encode(text).ids == expected, text
    (upper,), (same,) = (tokenize(tokenizer, text, 8)[0].tolist() for text in ("THE DOG", "the dog"))
    if settings or sentence:
        assert upper == same


def test_sentence_transformers_agrees(tmp_path: Path) -> None:
    """The oracle itself, where it is installed."""
    transformer = pytest.importorskip("sentence_transformers")
    write_model(tmp_path)
    word_pieces(tmp_path, lowercase=False)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "BertTokenizer"}))
    (tmp_path / "config.json").write_text((write_model(tmp_path / "other") / "config.json").read_text())
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true, "max_seq_length": 12}')
    original = transformer.SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    tokenizer = load_tokenizer(tmp_path)
    for text in filter(None, TEXTS):
        found = original.tokenize([text])["input_ids"][0].tolist()
        assert tokenizer.tokenizer.encode(text).ids == found, text


@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_a_missing_post_processor(kind: str, tmp_path: Path) -> None:
    """Transformers gives some kinds their special tokens anyway; clients get the same."""
    word_pieces(tmp_path, lowercase=True, post_processor=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.tokenizer.encode(text).ids == theirs(tmp_path, text)
    assert (tokenizer.around == (1, 1)) == (kind == "BertTokenizer")


# other formats


def test_a_vocabulary_alone_is_converted(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer, document = load_served_tokenizer(tmp_path)
    assert read_tokenizer(document)[0].encode("the Dogs").ids == tokenizer.tokenizer.encode("the dogs").ids
    assert tokenizer.tokenizer.encode("the dogs .").tokens == ["[CLS]", "the", "dog", "##s", ".", "[SEP]"]
    assert tokenizer.pad_id == 0


SENTENCEPIECE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "xlm-roberta": ("XLMRobertaTokenizer", "sentencepiece.bpe.model", {}),
    "t5": ("T5Tokenizer", "spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "albert": (
        "AlbertTokenizer",
        "spiece.model",
        {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "user_defined_symbols": ["[CLS]", "[SEP]", "[MASK]"]},
    ),
}
"""Kinds of models whose tokenizer is a sentencepiece model: its class, its file, and how one is trained."""


def sentencepiece_directory(directory: Path, kind: str) -> Path:
    """Train a model of the Unigram kind on a few sentences; write it as such models are published."""
    library: Any = pytest.importorskip("sentencepiece")
    name, file, options = SENTENCEPIECE[kind]
    written, sentences = io.BytesIO(), iter([*SENTENCES, *HELD_OUT] * 3)
    library.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=written,
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (directory / file).write_bytes(written.getvalue())
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    settings = {"tokenizer_class": name, **({"extra_ids": 4} if kind == "t5" else {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_models_give_the_tokens_of_their_own_library(kind: str, tmp_path: Path) -> None:
    import sentencepiece

    directory = sentencepiece_directory(tmp_path, kind)
    library: Any = sentencepiece.SentencePieceProcessor(model_file=str(directory / SENTENCEPIECE[kind][1]))
    served, document = load_served_tokenizer(directory)
    read, _ = read_tokenizer(document)
    # a text that names special tokens is no matter of the library; ALBERT's lower-cases and takes accents off before it
    texts = [text for text in (*PROBES, *SENTENCES, *HELD_OUT) if "<s>" not in text]
    if kind == "albert":
        texts = [text.lower() for text in texts if text.isascii()]
    assert sum(len(text) > 20 for text in texts) > 25
    for text in texts:
        assert read.encode(text, add_special_tokens=False).tokens == library.encode(text, out_type=str), text
        assert read.encode(text).ids == served.tokenizer.encode(text).ids == theirs(directory, text), text
    around = {"xlm-roberta": ("<s>", "</s>"), "t5": (None, "</s>"), "albert": ("[CLS]", "[SEP]")}[kind]
    first, *_, last = read.encode(texts[-1]).tokens
    assert last == around[1]
    assert around[0] in (first, None)
    assert served.pad_id == read.token_to_id("<pad>")


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_without_the_library_a_sentencepiece_model_is_refused_with_the_way_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, file, _ = SENTENCEPIECE[kind]
    (tmp_path / file).write_bytes(b"a model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    monkeypatch.setattr(served_tokenizer, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match=rf"{file} is a sentencepiece model.*\nhint: pip install 'unseen\[sent"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["RobertaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_byte_level_tokenizers(kind: str, tmp_path: Path) -> None:
    """A byte order mark and blanks are part of a text."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    letters = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        "<|endoftext|>",
        *sorted(ByteLevel.alphabet()),
        "he",
        "Ġt",
        "Ġthe",
    ]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]
    getattr(transformers, kind)(vocab=vocabulary, merges=merges).save_pretrained(tmp_path)
    tokenizer, document = load_served_tokenizer(tmp_path)
    for text in ("the the", "\ufeffthe", " the\n the ", "naïve 🙂 1234 don't"):
        assert tokenizer.tokenizer.encode(text).ids == theirs(tmp_path, text)
    assert tokenizer.tokenizer.encode("\ufeffthe").ids != tokenizer.tokenizer.encode("the").ids
    if kind == "Qwen2Tokenizer":
        split = json.loads(document)["pre_tokenizer"]["pretokenizers"][0]
        assert split["pattern"]["Regex"] in SPLITS


def test_tokenizers_without_a_fast_form_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    class Slow:
        is_fast = False

    word_pieces(tmp_path, lowercase=True)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Slow())
    with pytest.raises(InvalidInput, match=r"is a Slow, which runs in Python alone.*\nhint: convert it"):
        load_tokenizer(tmp_path)


# refusals


def test_tokens_beyond_the_table_are_refused_by_number(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_model(tmp_path)
    load_text_model(str(tmp_path))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(["<product>", "<price>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        InvalidInput, match=r"2 tokens beyond the model's table of 100 rows: '<product>' is 100\nhint: model\.resize"
    ):
        load_text_model(str(tmp_path))


def test_a_difference_to_the_original_is_refused_with_the_first_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason is: here what clients run drops a part of the document."""
    from tokenizers import Tokenizer

    word_pieces(tmp_path, lowercase=True)

    def lossy(document: bytes) -> tuple[Any, Any]:
        found = json.loads(document)
        return Tokenizer.from_str(json.dumps(found | {"normalizer": None})), found

    monkeypatch.setattr(served_tokenizer, "read_tokenizer", lossy)
    with pytest.raises(InvalidInput, match=r"divides \".*\" otherwise than transformers: token \d+ is '.*', not '"):
        load_tokenizer(tmp_path)


def test_directories_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no tokenizer: none of tokenizer\.json"):
        load_tokenizer(tmp_path)
    for name in FILES:
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n")
        with pytest.raises(InvalidInput, match="is a pointer of git-lfs"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_the_least_limit_of_a_model_counts(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert load_text_model(str(tmp_path)).maximum_length == 16
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 12}))
    assert load_text_model(str(tmp_path)).maximum_length == 12
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    assert load_text_model(str(tmp_path)).maximum_length == 9
    assert WORDS

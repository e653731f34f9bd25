"""An index of documents for private search: their passages, and the embeddings of these by one model.

A directory holds it:

    index.json                    the manifest: the model, how documents were divided, the segments, and size and
                                  SHA-256 of the other two
    passages-....jsonl            the passages, one a line, in the order of rows
    embeddings-....safetensors    their embeddings, float32 (rows, width), of length 1 where the model's similarity is
                                  the cosine

Nothing in it runs: no pickle, no code. All of it is as secret as the documents. New files get new names, and the
manifest is replaced last, so that an update that is interrupted leaves the index as it was.

Rows stand in *segments* of up to SEGMENT. An update removes rows where they stand, and adds new ones behind. So the
segments without a change keep their rows, and clients keep what they have of these. The rows of a segment stand in
clusters (``secure.models.clusters``), so that a search need not look at all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor

from secure.capture.documents import read_document, read_tensors, what_is_wrong
from secure.errors import InvalidInput, InvalidProgram
from secure.models.clusters import clustered
from secure.models.passages import MAXIMUM_DOCUMENT, MAXIMUM_ID, Passage, TextDocument, checked_name, passages_of
from secure.models.prompts import Prompts
from secure.models.text import TextModel, model_directory, model_files
from secure.models.tokens import TextTokenizer, read_json
from secure.progress import Told, silent

FORMAT = 2
MANIFEST = "index.json"
SEGMENT = 4096
"""The most rows of a segment."""

MOST_PASSAGES = 1 << 20
MOST_SEGMENTS = 1 << 8
EMBEDDED = 64  # passages that are embedded at once, of similar lengths
COSINE, DOT = SIMILARITIES = ("cosine", "dot")
QUESTION, PASSAGE = ("query",), ("document", "passage", "corpus")
"""The names of prompts that go before questions and passages, as in sentence-transformers."""

AGAIN = "make it again: unseen index FILE|DIRECTORY --output DIRECTORY"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern="^[a-z]+-[0-9a-f]{16}[.][a-z]+$")]
    size: Annotated[int, Field(ge=0, le=1 << 38)]
    sha256: Sha256


class _Manifest(BaseModel):
    """The content of ``index.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int
    model: Annotated[str, Field(max_length=512)]
    model_sha256: Sha256
    key: Sha256
    length: Annotated[int, Field(ge=3, le=1 << 20)]
    overlap: Annotated[int, Field(ge=0, le=1 << 20)]
    prompt: Annotated[str, Field(max_length=1 << 12)]
    similarity: Annotated[str, Field(pattern=f"^({'|'.join(SIMILARITIES)})$")]
    width: Annotated[int, Field(ge=1, le=1 << 16)]
    segments: Annotated[list[Annotated[int, Field(ge=1, le=SEGMENT)]], Field(min_length=1, max_length=MOST_SEGMENTS)]
    passages: _File
    embeddings: _File


class _Row(BaseModel):
    """A line of the passages. sha256: of the document's text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(min_length=1, max_length=MAXIMUM_ID)]
    sha256: Sha256
    number: Annotated[int, Field(ge=0, le=MOST_PASSAGES)]
    start: Annotated[int, Field(ge=0, le=MAXIMUM_DOCUMENT)]
    end: Annotated[int, Field(ge=0, le=MAXIMUM_DOCUMENT)]
    text: Annotated[str, Field(min_length=1, max_length=1 << 20)]


_ROW = TypeAdapter(_Row)


@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """Passages and their embeddings, row by row, in segments.

    model, model_sha256: the name of the model, and a digest of its files. key: a secret of its own, under which its
    segments are named; it stays when the index is updated. length, overlap: of passages, in tokens.
    prompt: the text before each passage when it was embedded. similarity: "cosine", or "dot" (as the model says).
    documents: for each row SHA-256 of the whole document's text. segments: the rows of each. embeddings: float32,
    (rows, width).
    """

    model: str
    model_sha256: str
    key: str
    length: int
    overlap: int
    prompt: str
    similarity: str
    passages: Sequence[Passage]
    documents: Sequence[str]
    segments: Sequence[int]
    embeddings: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 over all of it, as hexadecimal digits."""
        return hashlib.sha256(self.encoded()[MANIFEST]).hexdigest()

    @property
    def names(self) -> dict[str, str]:
        """The documents, each with SHA-256 of its text."""
        return {passage.id: text for passage, text in zip(self.passages, self.documents, strict=True)}

    def encoded(self) -> dict[str, bytes]:
        """Return the files of the index, by name; the manifest comes last."""
        rows = [
            {"id": p.id, "sha256": d, "number": p.number, "start": p.start, "end": p.end, "text": p.text}
            for p, d in zip(self.passages, self.documents, strict=True)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        content = {"passages": lines, "embeddings": save({"embeddings": self.embeddings.contiguous()})}
        endings = {"passages": "jsonl", "embeddings": "safetensors"}
        digests = {name: hashlib.sha256(payload).hexdigest() for name, payload in content.items()}
        named = {name: f"{name}-{digests[name][:16]}.{endings[name]}" for name in content}
        files = {name: _File(name=named[name], size=len(content[name]), sha256=digests[name]) for name in content}
        manifest = _Manifest(
            format=FORMAT,
            model=self.model,
            model_sha256=self.model_sha256,
            key=self.key,
            length=self.length,
            overlap=self.overlap,
            prompt=self.prompt,
            similarity=self.similarity,
            width=self.embeddings.shape[1],
            segments=list(self.segments),
            **files,
        )
        return {named[name]: content[name] for name in content} | {
            MANIFEST: manifest.model_dump_json(indent=1).encode()
        }


@dataclass(frozen=True)
class Change:
    """The documents that an update added, changed and removed, how many passages it embedded, and segments it kept."""

    added: int
    changed: int
    removed: int
    embedded: int
    kept_segments: int


def model_digest(model: str) -> str:
    """Return SHA-256 over the names and contents of a model's files, as hexadecimal digits. Raises ModelNotFound."""
    total, root = hashlib.sha256(), model_directory(model)
    for path in model_files(model):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(root)}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def similarity_of(model: str) -> str:
    """Return how a model's vectors are compared. Raises InvalidInput for another way than SIMILARITIES."""
    settings = read_json(model_directory(model) / "config_sentence_transformers.json")
    found = str(settings.get("similarity_fn_name") or COSINE)
    if found not in SIMILARITIES:
        raise InvalidInput(
            f"{model} compares vectors by {found[:40]!r}, which is not supported", f"one of {', '.join(SIMILARITIES)}"
        )
    return found


def prompt_for(prompts: Prompts, names: Sequence[str]) -> str:
    """Return the text that goes before questions or passages: that of the first of ``names``, else the default."""
    return prompts.text(next((name for name in names if name in prompts.texts), None))


def build_index(
    model: str,
    loaded: TextModel,
    documents: Iterable[TextDocument],
    *,
    length: int,
    overlap: int,
    before: Index | None = None,
    told: Told = silent,
) -> tuple[Index, Change]:
    """Make the index of documents, or update one; ``told`` hears of progress.

    before: the index to update, whose other rows stay: it is brought to these documents, and embeds only what changed.
    Raises InvalidInput for documents without any passage, too many of them, and what ``passages_of`` refuses.
    """
    told(0, 0, "reading documents")
    prompt, similarity = prompt_for(loaded.prompts, PASSAGE), similarity_of(model)
    old = {} if before is None else before.names
    stay, fresh, seen = set[str](), list[tuple[Passage, str]](), dict[str, str]()
    for document in documents:
        checked_name(document)
        seen[document.id] = digest = document.digest
        if old.get(document.id) == digest:
            stay.add(document.id)
            continue
        fresh += [(each, digest) for each in passages_of(document, loaded.tokenizer, length, overlap, prompt)]
        if len(fresh) > MOST_PASSAGES:
            raise InvalidInput(f"more than {MOST_PASSAGES} passages", "make several indices")
    vectors = embed_passages(loaded, [prompt + each.text for each, _ in fresh], length, similarity, told)
    kept = _kept(before, stay)
    rows = [row for segment in kept for row in segment]
    sizes = _filled([len(segment) for segment in kept], len(fresh))
    if not sizes:
        raise InvalidInput("the documents have no text", "give files with words in them")
    if len(rows) + len(fresh) > MOST_PASSAGES or len(sizes) > MOST_SEGMENTS:
        raise InvalidInput(f"more than {MOST_PASSAGES} passages", "make several indices")
    if before is None:
        passages, sources, whole = [p for p, _ in fresh], [d for _, d in fresh], vectors
    else:
        passages = [*(before.passages[i] for i in rows), *(p for p, _ in fresh)]
        sources = [*(before.documents[i] for i in rows), *(d for _, d in fresh)]
        whole = torch.cat([before.embeddings[rows], vectors.reshape(-1, before.embeddings.shape[1])])
    key = secrets.token_hex(32) if before is None else before.key
    digest = model_digest(model)
    same = _unchanged(before, kept, sizes)
    order = _in_clusters(whole, sizes, same).tolist()
    passages, sources, whole = [passages[i] for i in order], [sources[i] for i in order], whole[order]
    made = Index(loaded.name, digest, key, length, overlap, prompt, similarity, passages, sources, sizes, whole)
    changed = sum(name in old and old[name] != digest for name, digest in seen.items())
    added = sum(name not in old for name in seen)
    return made, Change(added, changed, len(old.keys() - seen.keys()), len(fresh), sum(same))


def _kept(before: Index | None, stay: set[str]) -> list[list[int]]:
    """Return the rows that stay of each segment that keeps any.

    If more than twice as many segments are left as the rows need, all of them are joined and divided again.
    """
    found, at = list[list[int]](), 0
    for size in before.segments if before is not None else ():
        assert before is not None
        if rows := [row for row in range(at, at + size) if before.passages[row].id in stay]:
            found.append(rows)
        at += size
    rows = [row for segment in found for row in segment]
    if len(found) > 2 * (-(-len(rows) // SEGMENT)) + 1:
        return [rows[i : i + SEGMENT] for i in range(0, len(rows), SEGMENT)]
    return found


def _filled(sizes: Sequence[int], more: int) -> list[int]:
    """Return the sizes of segments with ``more`` rows behind: they fill the last one, then new ones."""
    found = list(sizes)
    if found and more:
        taken = min(more, SEGMENT - found[-1])
        found[-1], more = found[-1] + taken, more - taken
    return [*found, *[SEGMENT] * (more // SEGMENT), *([more % SEGMENT] if more % SEGMENT else [])]


def _unchanged(before: Index | None, kept: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[bool]:
    """Return which segments have the rows of one before, and no others. sizes: those after the new rows."""
    if before is None:
        return [False] * len(sizes)
    ends = itertools.accumulate(before.segments)
    old = {tuple(range(end - size, end)) for end, size in zip(ends, before.segments, strict=True)}
    found = [len(rows) == size and tuple(rows) in old for rows, size in zip(kept, sizes, strict=False)]
    return [*found, *[False] * (len(sizes) - len(found))]


def _in_clusters(vectors: Tensor, sizes: Sequence[int], unchanged: Sequence[bool]) -> Tensor:
    """Return the order of rows, (rows,), in which every segment but the unchanged ones stands in clusters.

    Rows stay in their segments, so that the passages of a document do, and an update changes as few as it can.
    """
    rows = torch.arange(len(vectors)).split(list(sizes))
    return torch.cat([at if same else at[clustered(vectors[at])] for at, same in zip(rows, unchanged, strict=True)])


def embed_passages(
    loaded: TextModel, texts: Sequence[str], length: int, similarity: str, told: Told = silent
) -> Tensor:
    """Embed texts in the clear with their owner's model; return float32 (texts, width), of length 1 for the cosine."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    with torch.no_grad():
        for first in range(0, len(order), EMBEDDED):
            told(first, len(order), "embedding passages")
            chosen = order[first : first + EMBEDDED]
            ids, mask = _padded(loaded.tokenizer, [texts[i] for i in chosen], length)
            vectors = loaded.module(ids, mask).to(torch.float32)
            vectors = F.normalize(vectors, dim=-1) if similarity == COSINE else vectors
            if not bool(torch.isfinite(vectors).all()):
                raise InvalidInput("the model gives values that are NaN or infinite on a passage", "look at the model")
            for i, vector in zip(chosen, vectors, strict=True):
                out[i] = vector
    return torch.stack(out) if out else torch.empty(0)


def _padded(tokenizer: TextTokenizer, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, as long as the longest text, of ``length`` tokens at most."""
    lowered = [text.lower() if tokenizer.lowercase else text for text in texts]
    found = [each.ids[:length] for each in tokenizer.tokenizer.encode_batch(lowered)]
    longest = max(map(len, found))
    ids = torch.tensor([[*each, *[tokenizer.pad_id] * (longest - len(each))] for each in found], dtype=torch.int64)
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in found], dtype=torch.int64)
    return ids, mask


# files


def write_index(index: Index, directory: Path) -> None:
    """Write an index, so that only its owner may read it: files of new names, then the manifest in place of the old.

    Files that no manifest names any more are removed. Raises InvalidInput if something else stands in the directory.
    """
    if directory.exists() and (not directory.is_dir() or (any(directory.iterdir()) and not is_index(directory))):
        raise InvalidInput(f"{directory} holds something else than an index", "give a new directory")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    files = index.encoded()
    for name, payload in files.items():
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".part-", delete=False) as part:
            try:
                part.write(payload)
                part.flush()
                os.fsync(part.fileno())
                os.replace(part.name, directory / name)
            finally:
                Path(part.name).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.name not in files and path.name.startswith(("passages-", "embeddings-", ".part-")):
            with contextlib.suppress(OSError):
                path.unlink()


def is_index(directory: Path) -> bool:
    """Tell whether a directory holds an index."""
    return (directory / MANIFEST).is_file()


def check_index(directory: Path, model: str | None = None) -> _Manifest:
    """Read the manifest of an index alone. model: the model's directory, whose index it must be.

    Raises InvalidInput for a directory without an index, and for one of another model.
    """
    if not is_index(directory):
        raise InvalidInput(f"{directory} holds no index: there is no {MANIFEST}", AGAIN)
    found = _manifest(directory / MANIFEST)
    if model is not None and not hmac.compare_digest(found.model_sha256, model_digest(model)):
        raise InvalidInput(
            f"{directory} is an index of another model than {model}: of {found.model}, with other files",
            "an index serves the model that embedded it; " + AGAIN,
        )
    return found


def read_index(directory: Path, model: str | None = None) -> Index:
    """Read an index, and check all of it. Raises like ``check_index``, and InvalidInput for one that is damaged."""
    found = check_index(directory, model)
    rows = sum(found.segments)
    if rows > MOST_PASSAGES:
        raise InvalidInput(f"{directory} has {rows} passages, {MOST_PASSAGES} at most are read", AGAIN)
    lines = _payload(directory, found.passages).decode("utf-8", "replace").split("\n")
    if len(lines) != rows + 1 or lines[-1]:
        raise InvalidInput(f"{directory} has {len(lines) - 1} passages and not the {rows} of its manifest", AGAIN)
    read = [_read(directory, line, _ROW.validate_json) for line in lines[:-1]]
    tensors = _read(
        directory, _payload(directory, found.embeddings), lambda payload: read_tensors(payload, ["embeddings"])
    )
    vectors = tensors.get("embeddings")
    form = (rows, found.width)
    if vectors is None or tuple(vectors.shape) != form or vectors.dtype != torch.float32:
        raise InvalidInput(f"{directory} has no embeddings of the form {form}, float32", AGAIN)
    if not bool(torch.isfinite(vectors).all()):
        raise InvalidInput(f"{directory} has embeddings that are NaN or infinite", AGAIN)
    return Index(
        found.model,
        found.model_sha256,
        found.key,
        found.length,
        found.overlap,
        found.prompt,
        found.similarity,
        [Passage(row.id, row.number, row.start, row.end, row.text) for row in read],
        [row.sha256 for row in read],
        found.segments,
        vectors,
    )


def _manifest(path: Path) -> _Manifest:
    try:
        found = _Manifest.model_validate(read_document(path.read_bytes()))
    except (InvalidProgram, ValidationError) as error:
        said = what_is_wrong(error) if isinstance(error, ValidationError) else str(error)
        raise InvalidInput(f"{path} is no manifest of an index: {said}", AGAIN) from None
    if found.format != FORMAT:
        raise InvalidInput(f"{path} has the format {found.format}, this is {FORMAT}", AGAIN)
    return found


def _payload(directory: Path, file: _File) -> bytes:
    path = directory / file.name
    try:
        size = path.stat().st_size
        payload = path.read_bytes() if size == file.size else b""
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", AGAIN) from None
    if size != file.size:
        raise InvalidInput(f"{path} has {size} bytes and not the {file.size} of its manifest: it was cut short", AGAIN)
    if not hmac.compare_digest(hashlib.sha256(payload).hexdigest(), file.sha256):
        raise InvalidInput(f"{path} is not the file of its manifest: it was changed", AGAIN)
    return payload


def _read(directory: Path, given: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(given)
    except (ValidationError, InvalidInput) as error:
        raise InvalidInput(f"{directory} is damaged: {what_is_wrong(error)}", AGAIN) from None

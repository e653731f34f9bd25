"""Answers and errors in OpenAI's form; those of classification in vLLM's, and of reranking in Jina's and Cohere's."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from parties.proxy.bodies import RequestRefused
from parties.proxy.tasks import Counted
from parties.proxy.writing import Ended
from secure.errors import Busy, Error, InvalidInput, OutOfRange, QuotaError, about
from secure.models.settings import LABEL, TaskSettings
from secure.tasks.rerank import ranked

Document = dict[str, Any]
INVALID, SERVER = "invalid_request_error", "server_error"
NO_RETRY = {"x-should-retry": "false"}
"""A header that OpenAI's clients know: the same request would end in the same way."""


def named(prefix: str) -> str:
    """Return a new name of an answer."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Return the seconds since 1970."""
    return int(time.time())


# errors


def failure(error: Error | RequestRefused) -> tuple[int, Document, dict[str, str]]:
    """Return the status, the body and the headers of an error."""
    if isinstance(error, RequestRefused):
        document = _error(str(error.error), INVALID, error.param, error.code or error.error.code)
        return error.status, document, NO_RETRY
    if isinstance(error, Busy):
        return 503, _error(str(error), SERVER, None, error.code), {"retry-after": f"{max(1, round(error.after))}"}
    if isinstance(error, QuotaError):
        return 429, _error(str(error), "insufficient_quota", None, error.code), NO_RETRY
    if isinstance(error, InvalidInput):
        return 400, _error(str(error), INVALID, None, error.code), NO_RETRY
    if isinstance(error, OutOfRange):
        return 422, _error(str(error), INVALID, None, error.code), NO_RETRY
    return 502, _error(str(error), SERVER, None, error.code), {}


def _error(message: str, kind: str, param: str | None, code: str | None) -> Document:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_error(status: int) -> Document:
    """Return the body of an HTTP status."""
    said = HTTPStatus(status).phrase
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        said += "\nhint: a base URL ends in /v1; docs/endpoint.md has the endpoints and their methods"
    return _error(said, INVALID if status < 500 else SERVER, None, None)


def counted(answers: Sequence[Counted | Error], noun: str) -> list[Counted]:
    """Return the answers of a request. Raises the first error among them, which names its input."""
    found = list[Counted]()
    for number, answer in enumerate(answers, 1):
        if isinstance(answer, Error):
            raise about(f"{noun} {number} of {len(answers)}", answer) if len(answers) > 1 else answer
        found.append(answer)
    return found


# answers


def _usage(prompt: int, completion: int | None = None) -> Document:
    if completion is None:
        return {"prompt_tokens": prompt, "total_tokens": prompt}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def shortened(vector: Tensor, dimensions: int | None, *, normalized: bool) -> Tensor:
    """Return the first numbers of an embedding, scaled to length 1 if the whole has that."""
    if dimensions is None or dimensions == len(vector):
        return vector
    return F.normalize(vector[:dimensions], dim=-1) if normalized else vector[:dimensions]


def embeddings(
    found: Sequence[Counted], model: str, *, dimensions: int | None, normalized: bool, encoded: bool
) -> Document:
    """Return embeddings, as lists of numbers or as little-endian float32 in base64."""
    data = list[Document]()
    for index, (vector, _) in enumerate(found):
        short = shortened(vector, dimensions, normalized=normalized).numpy()
        written: Any = base64.b64encode(short.astype("<f4").tobytes()).decode() if encoded else short.tolist()
        data.append({"object": "embedding", "index": index, "embedding": written})
    return {"object": "list", "data": data, "model": model, "usage": _usage(sum(each.tokens for each in found))}


def reranked(
    found: Sequence[Counted], model: str, documents: Sequence[str], top_n: int | None, *, texts: bool
) -> Document:
    """Return scores, the best first."""
    order = ranked([each.answer for each in found])[:top_n]
    results: list[Document] = [{"index": e["corpus_id"], "relevance_score": e["score"]} for e in order]
    if texts:
        results = [{**each, "document": {"text": documents[each["index"]]}} for each in results]
    usage = {"total_tokens": sum(each.tokens for each in found)}
    return {"id": named("rerank"), "object": "rerank", "model": model, "usage": usage, "results": results}


def classes(found: Sequence[Counted], model: str, settings: TaskSettings) -> Document:
    """Return classes. probs: those of all classes in the model's order, null where the owner reveals labels alone.

    Of a model of several labels whose owner reveals no more, ``labels`` are those that hold, and ``label`` is null.
    """
    data = list[Document]()
    for index, (answer, _) in enumerate(found):
        entry: Document = {"index": index, "label": None, "probs": None, "num_classes": len(settings.labels)}
        if settings.reveal != LABEL:
            scores: Mapping[str, float] = {each["label"]: each["score"] for each in answer}
            entry |= {"label": answer[0]["label"], "probs": [scores[label] for label in settings.labels]}
        elif isinstance(answer, list):
            entry["labels"] = [each["label"] for each in answer]
        else:
            entry["label"] = answer["label"]
        data.append(entry)
    usage = _usage(sum(each.tokens for each in found), 0)
    return {
        "id": named("classify"),
        "object": "list",
        "created": now(),
        "model": model,
        "data": data,
        "usage": usage,
    }


def found(question: str, passages: Sequence[Mapping[str, Any]]) -> Document:
    """Return the passages that answer a question, as OpenAI's vector stores do; scores null, or no texts, where the
    owner of the index reveals none.
    """
    data = list[Document]()
    for each in passages:
        content = [{"type": "text", "text": each["text"]}] if "text" in each else []
        about = {name: each[name] for name in ("passage", "start", "end")}
        entry = {"file_id": each["id"], "filename": each["id"], "score": each["score"], "attributes": about}
        data.append({**entry, "content": content})
    form = {"object": "vector_store.search_results.page", "search_query": [question]}
    return {**form, "data": data, "has_more": False, "next_page": None}


def models(name: str, created: int) -> Document:
    """Return the list of the one model."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> Document:
    """Return what is said of a model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "unseen"}


class Written:
    """The documents of a request for text: whole, or a piece at a time. chat: the form of chat completions."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat, self._id = chat, named("chatcmpl" if chat else "cmpl")
        self._common = {"created": now(), "model": model}

    def whole(self, texts: Sequence[str], ends: Sequence[Ended]) -> Document:
        """Return the answer that holds all texts."""
        choices = list[Document]()
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            said: Document = {"text": text}
            if self._chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": end.reason})
        return {**self._head(""), "choices": choices, "usage": _of(ends)}

    def piece(self, index: int, text: str, *, first: bool = False) -> Document:
        """Return a piece of one text. first: it begins it."""
        if not self._chat:
            return self._chunk(index, {"text": text}, None)
        return self._chunk(index, {"delta": {**({"role": "assistant"} if first else {}), "content": text}}, None)

    def end(self, index: int, end: Ended) -> Document:
        """Return the last piece of one text."""
        return self._chunk(index, {"delta": {}} if self._chat else {"text": ""}, end.reason)

    def usage(self, ends: Sequence[Ended]) -> Document:
        """Return the piece that says how many tokens there were."""
        return {**self._head(".chunk"), "choices": [], "usage": _of(ends)}

    def _chunk(self, index: int, said: Document, reason: str | None) -> Document:
        return {
            **self._head(".chunk"),
            "choices": [{"index": index, **said, "logprobs": None, "finish_reason": reason}],
        }

    def _head(self, kind: str) -> Document:
        form = f"chat.completion{kind}" if self._chat else "text_completion"
        return {"id": self._id, "object": form, **self._common}


def _of(ends: Sequence[Ended]) -> Document:
    return _usage(sum(end.prompt for end in ends), sum(end.written for end in ends))


def event(document: Document | str) -> bytes:
    """Return a server-sent event."""
    text = document if isinstance(document, str) else json.dumps(document, separators=(",", ":"))
    return f"data: {text}\n\n".encode()

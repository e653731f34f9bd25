"""The bodies of requests. Every parameter is honoured, or refused by its name, or stands in a list of the harmless.

Nothing that a caller wrote is repeated in a refusal, but for the names of parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secure.errors import Error, InvalidInput, printable
from secure.models.tokens import REFUSE, TRUNCATE

MOST_INPUTS = 2048
MOST_STOPS = 16
"""Inputs of a request, as OpenAI bounds them."""

ABOUT = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
"""HttpParameters that tell OpenAI about the caller. They change no answer, and stay here: nobody reads them."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "ranking_options": ({},),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "rewrite_query": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": (1,),
}
"""HttpParameters that cannot be honoured, with the values that ask for what happens anyway."""


class RequestRefused(Exception):
    """A request that is not answered. error: why, in words; param: the parameter that it is about, if it is one."""

    def __init__(self, error: Error, *, status: int, param: str | None, code: str | None) -> None:
        super().__init__(str(error))
        self.error, self.status, self.param, self.code = error, status, param, code


def refused(error: Error, *, status: int = 400, param: str | None = None, code: str | None = None) -> RequestRefused:
    """Return the exception for a request that is not answered."""
    return RequestRefused(error, status=status, param=param, code=code)


class HttpParameters(BaseModel):
    """The parameters of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)
    named: ClassVar[str] = ""  # how messages call the request


class Body(HttpParameters):
    """Those that say which model is asked; in other requests the path does."""

    model: str


Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
Pairs = Annotated[list[Pair], Field(min_length=1, max_length=MOST_INPUTS)]
Long = Literal["refuse", "truncate", "split"]
Cut = Literal["refuse", "truncate"]


class EmbeddingsBody(Body):
    """The parameters of /v1/embeddings. long, prompt_name: see ``secure.tasks.embed.Embed``."""

    named: ClassVar[str] = "embeddings"

    input: str | Texts | Tokens | TokenLists
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    long: Long = REFUSE  # type: ignore[assignment]
    prompt_name: str | None = None

    @property
    def inputs(self) -> list[str | tuple[int, ...]]:
        """The inputs one by one, each a text or token ids."""
        return each_input(self.input)


class StreamOptions(BaseModel):
    """The options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class WritingBody(Body):
    """The parameters of a text. ignore_eos, hide_length: see ``Session.generate``. seed: of the likeliest text."""

    max_tokens: Count | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(default=0.0, ge=0)
    seed: int | None = None
    ignore_eos: bool = False
    hide_length: bool = False

    def check(self) -> None:
        """Raise RequestRefused for parameters that contradict one another."""
        if self.seed is not None and self.temperature > 0:
            no_seed = InvalidInput("no seed repeats a text at a temperature", "leave seed out, or temperature")
            raise refused(no_seed, param="seed")
        if "stream_options" in self.model_fields_set and not self.stream:
            raise refused(InvalidInput("stream_options mean nothing without stream"), param="stream_options")


class CompletionsBody(WritingBody):
    """The parameters of /v1/completions."""

    named: ClassVar[str] = "completions"

    prompt: str | Texts | Tokens | TokenLists


class ContentPart(BaseModel):
    """A part of a message's content: text alone."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A chat message."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    role: str
    content: str | list[ContentPart]

    @property
    def plain(self) -> dict[str, str]:
        """The message as sessions take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatBody(WritingBody):
    """The parameters of /v1/chat/completions."""

    named: ClassVar[str] = "chat completions"

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens):
            both = InvalidInput("max_tokens and max_completion_tokens mean the same", "give one of them")
            raise refused(both, param="max_tokens")


class Document(BaseModel):
    """A document, as Jina's clients may give it."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    text: str


class RerankBody(Body):
    """The parameters of /v1/rerank."""

    named: ClassVar[str] = "rerank"

    query: str
    documents: list[str | Document] = Field(min_length=1, max_length=MOST_INPUTS)
    top_n: Count | None = None
    return_documents: bool = False
    long: Cut = TRUNCATE  # type: ignore[assignment]

    @property
    def texts(self) -> list[str]:
        """The documents as texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


class ClassifyBody(Body):
    """The parameters of /v1/classify. input: a text, texts, or pairs of texts."""

    named: ClassVar[str] = "classify"

    input: str | Texts | Pairs
    long: Cut = REFUSE  # type: ignore[assignment]

    @property
    def inputs(self) -> list[str | tuple[str, ...]]:
        """The inputs one by one, each a text or a pair."""
        given = [self.input] if isinstance(self.input, str) else self.input
        return [each if isinstance(each, str) else tuple(each) for each in given]


def each_input(given: str | list[str] | list[int] | list[list[int]]) -> list[str | tuple[int, ...]]:
    """Return texts and token arrays one by one."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [tuple(given)]
    return [each if isinstance(each, str) else tuple(each) for each in given]


class SearchBody(HttpParameters):
    """The parameters of /v1/vector_stores/{model}/search. max_num_results: by default all that the server finds."""

    named: ClassVar[str] = "search"

    query: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_num_results: Count | None = None
    long: Cut = REFUSE  # type: ignore[assignment]
    prompt_name: str | None = None

    @property
    def question(self) -> str:
        """The question."""
        return self.query if isinstance(self.query, str) else self.query[0]


Kind = TypeVar("Kind", bound=HttpParameters)


def read_body(kind: type[Kind], raw: bytes) -> Kind:
    """Read a request's body. HttpParameters that are null count as not given. Raises RequestRefused."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise refused(InvalidInput("the body is no JSON", "an object of parameters")) from None
    if not isinstance(document, dict):
        raise refused(InvalidInput("the body is no JSON object", "an object of parameters"))
    given = {name: value for name, value in document.items() if value is not None}
    for name in [name for name in given if name not in kind.model_fields]:
        if name in ABOUT:
            del given[name]
        elif name not in NEUTRAL:
            known = ", ".join(sorted(kind.model_fields))
            unknown = InvalidInput(f"{kind.named}: no parameter {printable(name)[:40]!r} is known", f"one of {known}")
            raise refused(unknown, param=printable(name)[:40])
        elif any(type(given[name]) is type(value) and given[name] == value for value in _alike(NEUTRAL[name])):
            del given[name]
        else:
            neutral = " or ".join(json.dumps(value) for value in NEUTRAL[name])
            cannot = InvalidInput(f"{kind.named}: {name} cannot be honoured", f"leave it out, or give {neutral}")
            raise refused(cannot, param=name)
    try:
        found = kind.model_validate(given)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        # of a value that may have several types, what is wrong with one of its own type comes first
        first = min(errors, key=lambda wrong: wrong["type"].endswith("_type"))
        where = printable(str(first["loc"][0] if first["loc"] else ""))[:40]
        raise refused(
            InvalidInput(f"{kind.named}: {where}: {first['msg']}", "see docs/endpoint.md"), param=where
        ) from None
    if isinstance(found, WritingBody):
        found.check()
    return found


def _alike(values: tuple[Any, ...]) -> list[Any]:
    """Return values, and whole numbers as floats too."""
    return [*values, *(float(value) for value in values if type(value) is int)]

"""The routes of a proxy. A request shows the proxy's token before anything of it is read, and all of it is bounded.

Nothing of a request is logged, nor of an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from parties.bulk.embedding import vector_width
from parties.limits.tokens import Token
from parties.proxy import answers
from parties.proxy.bodies import (
    Body,
    ChatBody,
    ClassifyBody,
    CompletionsBody,
    EmbeddingsBody,
    HttpParameters,
    RequestRefused,
    RerankBody,
    SearchBody,
    WritingBody,
    each_input,
    read_body,
    refused,
)
from parties.proxy.metrics import HttpOutcome, Metrics
from parties.proxy.page import check_local, learns, show
from parties.proxy.tasks import Classification, Counted, Embedding, Reranking, Searching
from parties.proxy.workers import SessionWorkers
from parties.proxy.writing import Ended, WrittenText
from secure.deployments.deployment import Deployment, find
from secure.errors import Busy, Error, InvalidInput, TokenError
from secure.lowering.client_inputs import GENERATE
from secure.models.heads import CLASSIFY, RERANK, SEARCH
from secure.models.settings import LABEL
from secure.session.session import Session
from secure.tasks.embed import Embed
from secure.tasks.generate import Generate
from secure.tasks.task import Loader, Task

MOST_BODY = 1 << 24  # bytes
MOST_REQUESTS = 256  # that are being answered
BODY_SECONDS = 60.0
DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI's has it

NO_TOKEN = ("this proxy asks for its token", "give it as the API key of your client")
ANOTHER_TOKEN = (
    "this is not the token that this proxy asks for",
    "give it as the API key of your client; without --api-key-file each start of the proxy makes a new one",
)
ENDPOINTS = {
    "": "embeddings",
    Embed.name: "embeddings",
    CLASSIFY: "classify",
    RERANK: "rerank",
    SEARCH: "search",
    GENERATE: "completions",
}
"""The endpoint of each task; a model that names none embeds."""

log = logging.getLogger("unseen.proxy")
Kind = TypeVar("Kind", bound=HttpParameters)


def check_servable(session: Session) -> None:
    """Raise InvalidInput for a model that has no endpoint here."""
    served = session.served
    if served.task not in ENDPOINTS:
        raise InvalidInput(f"the proxy has no endpoint for the task {served.task!r}", f"unseen {served.task}")
    if served.tokenizer is None or not session.length:
        raise InvalidInput("this server's model takes no text", "ask it with secure.connect(...).query")
    if ENDPOINTS[served.task] == "embeddings":
        vector_width(session)


class Proxy:
    """The answers of a proxy. token: what callers show. token_ids: arrays of tokens are taken, as the model's own.

    matryoshka: the first numbers of the model's embeddings are embeddings too. deployment: that of the sessions, for
    who learns what. host: the name at which it listens. Raises InvalidInput for a model that has no endpoint, and for
    ``matryoshka`` where it embeds nothing.
    """

    def __init__(
        self,
        workers: SessionWorkers,
        metrics: Metrics,
        token: Token,
        *,
        token_ids: bool = False,
        matryoshka: bool = False,
        deployment: Deployment | None = None,
        host: str = "localhost",
    ) -> None:
        session = workers.session
        check_servable(session)
        self.served = session.served
        self.endpoint = ENDPOINTS[self.served.task]
        self.width = vector_width(session) if self.endpoint == "embeddings" else 0
        if matryoshka and not self.width:
            raise InvalidInput("--matryoshka means nothing for a model that embeds no texts", "leave it out")
        self.model, self._room = str(session.program.labels.get("model") or "model"), 0
        if self.endpoint == "completions":
            self._room = session.room
        self._workers, self._metrics, self._digest = workers, metrics, token.digest
        self._deployment, self._host = deployment or find(session.deployment)(), host
        self._token_ids, self._created, self._running = token_ids, answers.now(), 0
        self._shortened = matryoshka or "dimensions" in session.program.labels

    def app(self) -> Starlette:
        """Return the application."""
        posts: dict[str, tuple[type[HttpParameters], Callable[[Any], Awaitable[Response]]]] = {
            "/v1/embeddings": (EmbeddingsBody, self._embeddings),
            "/v1/chat/completions": (ChatBody, self._chat),
            "/v1/completions": (CompletionsBody, self._completions),
            "/v1/rerank": (RerankBody, self._rerank),
            "/v1/classify": (ClassifyBody, self._classify),
            "/v1/vector_stores/{name:path}/search": (SearchBody, self._search),
        }
        routes = [
            Route(path, partial(self._post, path, kind, answer), methods=["POST"])
            for path, (kind, answer) in posts.items()
        ]
        gets: dict[str, Callable[[Request], Response]] = {
            "/v1/models": lambda _: JSONResponse(answers.models(self.model, self._created)),
            "/v1/models/{name:path}": self._one_model,
            "/metrics": self._numbers,
            "/status": self._status,
        }
        routes += [Route(path, partial(self._get, path, answer)) for path, answer in gets.items()]
        routes.append(Route("/healthz", self._health))
        routes.append(Route("/", self._page))
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})

    # what is common

    async def _post(
        self, path: str, kind: type[Kind], answer: Callable[[Kind], Awaitable[Response]], request: Request
    ) -> Response:
        with self._metrics.request(path) as outcome:
            return await self._guarded(request, outcome, self._answered(request, kind, answer))

    async def _get(self, path: str, answer: Callable[[Request], Response], request: Request) -> Response:
        async def answered() -> Response:
            return answer(request)

        with self._metrics.request(path) as outcome:
            return await self._guarded(request, outcome, answered)

    async def _guarded(
        self, request: Request, outcome: HttpOutcome, answered: Callable[[], Awaitable[Response]]
    ) -> Response:
        """Answer a request that shows the token; errors in OpenAI's form."""
        try:
            self._admit(request)
            if self._running >= MOST_REQUESTS:
                raise Busy(f"{MOST_REQUESTS} requests are being answered", "ask again later")
            self._running += 1
            try:
                response = await answered()
            except BaseException:
                self._ended()
                raise
            if isinstance(response, _Streamed):
                response.ended = self._ended
            else:
                self._ended()
        except (Error, RequestRefused) as error:
            status, document, headers = answers.failure(error)
            response = JSONResponse(document, status, headers)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:  # whose text may hold a value
            log.error("%s failed: %s", request.url.path, type(error).__name__)
            response = JSONResponse(answers.status_error(500), 500)
        outcome.status = response.status_code
        return response

    def _ended(self) -> None:
        self._running -= 1

    def _admit(self, request: Request) -> None:
        """Raise RequestRefused unless the request shows the token. The comparison takes the same time for all."""
        said = request.headers.getlist("authorization")
        scheme, _, text = said[0].partition(" ") if len(said) == 1 else ("", "", "")
        digest = hashlib.sha256(text.strip().encode()).hexdigest()
        bears = scheme.lower() == "bearer"
        if not (hmac.compare_digest(digest, self._digest) and bears):
            wrong = ANOTHER_TOKEN if text and bears else NO_TOKEN
            raise refused(TokenError(*wrong), status=401, code="invalid_api_key")

    def _answered(
        self, request: Request, kind: type[Kind], answer: Callable[[Kind], Awaitable[Response]]
    ) -> Callable[[], Awaitable[Response]]:
        async def answered() -> Response:
            body = read_body(kind, await _read(request))
            self._require(request.path_params["name"] if not isinstance(body, Body) else body.model, kind.named)
            return await _until_gone(request, answer(body))

        return answered

    def _require(self, model: str, named: str) -> None:
        if model != self.model:
            missing = InvalidInput(f"{named}: this proxy has no such model", f"it has {self.model!r}")
            raise refused(missing, status=404, param="model", code="model_not_found")

    async def _ask(self, task: Task[Any, Any], inputs: list[Any], noun: str) -> list[Counted]:
        task.fits(self.served)
        task.check(inputs, self.served)
        found: list[Any] = await asyncio.wrap_future(self._workers.ask(task, inputs))
        return answers.counted(found, noun)

    def _check_tokens(self, inputs: list[Any], param: str) -> None:
        if not self._token_ids and not all(isinstance(each, str) for each in inputs):
            arrays = InvalidInput(
                f"{param}: this proxy takes no arrays of tokens, as clients often send those of another tokenizer",
                "give texts (in LangChain: check_embedding_ctx_length=False), or start it with --token-ids",
            )
            raise refused(arrays, param=param)

    # tasks

    async def _embeddings(self, body: EmbeddingsBody) -> Response:
        self._fits(Embed())
        self._check_tokens(inputs := body.inputs, "input")
        if body.dimensions is not None and (body.dimensions > self.width or not self._may_shorten(body.dimensions)):
            hint = f"leave it out, or give {self.width}; --matryoshka is for models that were trained to be cut"
            raise refused(InvalidInput(f"dimensions: this model gives {self.width} numbers", hint), param="dimensions")
        found = await self._ask(Embedding(body.long, body.prompt_name), inputs, "input")
        document = answers.embeddings(
            found,
            self.model,
            dimensions=body.dimensions,
            normalized=self.served.normalized,
            encoded=body.encoding_format == "base64",
        )
        return JSONResponse(document)

    def _may_shorten(self, dimensions: int) -> bool:
        return dimensions == self.width or self._shortened

    async def _rerank(self, body: RerankBody) -> Response:
        documents = body.texts
        found = await self._ask(Reranking(body.long), [(body.query, text) for text in documents], "document")
        return JSONResponse(answers.reranked(found, self.model, documents, body.top_n, texts=body.return_documents))

    async def _classify(self, body: ClassifyBody) -> Response:
        task = Classification(body.long, top_k=1 if self.served.settings.reveal == LABEL else None)
        found = await self._ask(task, body.inputs, "input")
        return JSONResponse(answers.classes(found, self.model, self.served.settings))

    async def _search(self, body: SearchBody) -> Response:
        task = Searching(body.max_num_results, long=body.long, prompt=body.prompt_name)
        ((passages, _),) = await self._ask(task, [body.question], "question")
        return JSONResponse(answers.found(body.question, passages))

    async def _chat(self, body: ChatBody) -> Response:
        count = body.max_completion_tokens or body.max_tokens or self._room
        return await self._write(body, [[message.plain for message in body.messages]], count, chat=True)

    async def _completions(self, body: CompletionsBody) -> Response:
        prompts = each_input(body.prompt)
        self._check_tokens(prompts, "prompt")
        given = [each if isinstance(each, str) else list(each) for each in prompts]
        count = body.max_tokens or min(DEFAULT_TOKENS, self._room)
        return await self._write(body, given, count, chat=False)

    async def _write(self, body: WritingBody, prompts: list[Any], count: int, *, chat: bool) -> Response:
        self._fits(Generate())
        form = answers.Written(self.model, chat=chat)
        texts = [self._text(body, prompt, count) for prompt in prompts]
        if not body.stream:
            whole, ends = list[str](), list[Ended]()
            for text in texts:
                self._workers.write(text)
                said = ""
                async with aclosing(text.pieces()) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Ended):
                            ends.append(piece)
                        else:
                            said += piece
                whole.append(said)
            return JSONResponse(form.whole(whole, ends))
        events = self._events(form, texts, usage=body.stream_options.include_usage)
        first = await anext(events)  # an error before it has a status of its own
        return _Streamed(_after(first, events), media_type="text/event-stream", headers=NO_CACHE)

    def _text(self, body: WritingBody, prompt: Any, count: int) -> WrittenText:
        def begin(session: Session) -> Any:
            return session.generate(
                prompt,
                count,
                stop=body.stop,
                ignore_end=body.ignore_eos,
                hide_length=body.hide_length,
                temperature=body.temperature,
            )

        return WrittenText(begin, hidden=body.hide_length)

    async def _events(self, form: answers.Written, texts: list[WrittenText], *, usage: bool) -> AsyncIterator[bytes]:
        """Yield the events of a stream. Raises what befalls the first text before anything of it was yielded."""
        ends, begun = list[Ended](), False
        try:
            for index, text in enumerate(texts):
                self._workers.write(text)
                first = True
                async with aclosing(text.pieces()) as pieces:
                    async for piece in pieces:
                        begun = True
                        if not isinstance(piece, Ended):
                            yield answers.event(form.piece(index, piece, first=first))
                            first = False
                            continue
                        if first:
                            yield answers.event(form.piece(index, "", first=True))
                        ends.append(piece)
                        yield answers.event(form.end(index, piece))
            if usage:
                yield answers.event(form.usage(ends))
            yield answers.event("[DONE]")
        except Error as error:
            if not begun:
                raise
            yield answers.event(answers.failure(error)[1])
        except Exception as error:  # whose text may hold a value
            log.error("a stream failed: %s", type(error).__name__)
            yield answers.event(answers.status_error(500))

    def _fits(self, task: Loader) -> None:
        task.fits(self.served)

    # what is no task

    def _one_model(self, request: Request) -> Response:
        self._require(request.path_params["name"], "models")
        return JSONResponse(answers.model(self.model, self._created))

    def _numbers(self, request: Request) -> Response:
        self._metrics.waiting.set(self._workers.waiting)
        self._metrics.ready.set(self._workers.ready)
        self._metrics.sessions.set(self._workers.alive)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _status(self, request: Request) -> Response:
        """Return the numbers of the page: of the sessions, of queries, and who learns what in one."""
        check_local(request, self._host)
        workers, session = self._workers, self._workers.session
        document = {
            "model": self.model,
            "endpoint": self.endpoint,
            "deployment": session.deployment,
            "program": session.program.digest,
            "room": self._room,
            "sessions": {"alive": workers.alive, "all": workers.all},
            "running": self._running - 1,  # without this one
            "waiting": workers.waiting,
            "ready": workers.ready,
            **self._metrics.history.as_dict(),
            **learns(self._deployment, token_table=bool(session.link.tables)),
        }
        return JSONResponse(document, headers={"cache-control": "no-store"})

    async def _page(self, request: Request) -> Response:
        return show(request, self._host)

    async def _health(self, request: Request) -> Response:
        """Tell whoever asks, without a token, whether there is a session, or one can be opened as far as is known."""
        alive = self._workers.alive
        return JSONResponse({"status": "ok" if alive else "no session"}, 200 if alive else 503)


NO_CACHE = {"cache-control": "no-store", "x-accel-buffering": "no"}


async def _read(request: Request) -> bytes:
    """Read a body of a bounded size in a bounded time. Raises RequestRefused."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                read += chunk
                if len(read) > MOST_BODY:
                    large = InvalidInput(f"the body has more than {MOST_BODY} bytes", "ask in smaller parts")
                    raise refused(large, status=413)
    except TimeoutError:
        raise refused(InvalidInput(f"the body did not come within {BODY_SECONDS:g} s"), status=408) from None
    return bytes(read)


async def _until_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """Wait for an answer, and no longer than the caller does. Raises ClientDisconnect."""
    working, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for each in (working, leaving):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _gone(request: Request) -> None:
    """Return when the caller has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Streamed(StreamingResponse):
    """A stream of events. ended: called when it has ended, in whatever way."""

    ended: Callable[[], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()


async def _after(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for each in events:
        yield each


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return JSONResponse(answers.status_error(status), status)

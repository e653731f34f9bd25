"""Embeddings and a language model of LlamaIndex: ``pip install llama-index-core``."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from parties.shapes.opening import Opened, aside
from parties.shapes.sentence_transformer import SentenceTransformer
from secure.errors import InvalidInput
from secure.tasks.generate import Generate


class UnseenEmbedding(BaseEmbedding):  # type: ignore[misc]
    """Private embeddings. It takes what ``secure.connect`` takes, or a Session; ``model.close()`` ends its session."""

    _model: SentenceTransformer = PrivateAttr()

    def __init__(self, deployment: Any, **options: Any) -> None:
        made = SentenceTransformer(deployment, **options)
        super().__init__(model_name=str(made.session.program.labels.get("model", "unseen")))
        self._model = made

    @property
    def model(self) -> SentenceTransformer:
        """The model that answers."""
        return self._model

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [list(map(float, row)) for row in self._model.encode_document(texts)]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return list(map(float, self._model.encode_query(query)))

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await aside(self._get_query_embedding, query)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await aside(self._get_text_embeddings, texts)


class UnseenLLM(CustomLLM):  # type: ignore[misc]
    """Private texts. ``UnseenLLM.connect`` takes what ``secure.connect`` takes.

    session: what answers; the caller closes it. max_tokens: of a text; None: as many as there is room for.
    """

    session: Any
    max_tokens: int | None = None
    temperature: float = 0.0

    @classmethod
    def connect(cls, deployment: Any, *, max_tokens: int | None = None, **options: Any) -> UnseenLLM:
        """Connect, and return a language model."""
        return cls(session=Opened(deployment, **options).session, max_tokens=max_tokens)

    @property
    def metadata(self) -> LLMMetadata:
        """The bounds of the model, as LlamaIndex asks for them."""
        room = self.session.room
        return LLMMetadata(context_window=self.session.length + room, num_output=self.max_tokens or room)

    def _text(self, prompt: str, given: dict[str, Any]) -> Any:
        stop = given.pop("stop", None) or ()
        if given:
            raise InvalidInput(f"{sorted(given)[0]} cannot be honoured", "leave it out")
        Generate().fits(self.session.served)
        count = self.max_tokens or self.session.room
        return self.session.generate(prompt, count, stop=stop, temperature=self.temperature)

    @llm_completion_callback()  # type: ignore[untyped-decorator]
    def complete(self, prompt: str, formatted: bool = False, **given: Any) -> CompletionResponse:
        """Return the text that continues a prompt."""
        return CompletionResponse(text=self._text(prompt, given).complete().text)

    @llm_completion_callback()  # type: ignore[untyped-decorator]
    def stream_complete(self, prompt: str, formatted: bool = False, **given: Any) -> Any:
        """Return the text piece by piece."""

        def pieces() -> Any:
            text = self._text(prompt, given)
            for piece in text:
                yield CompletionResponse(text=text.text, delta=piece)

        return pieces()

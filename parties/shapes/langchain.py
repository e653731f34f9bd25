"""Embeddings and a chat model of LangChain: ``pip install langchain-core``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from parties.shapes.opening import Opened
from parties.shapes.sentence_transformer import SentenceTransformer
from secure.errors import InvalidInput
from secure.session.generation import Generation
from secure.session.session import Session
from secure.tasks.generate import Generate


class UnseenEmbeddings(Embeddings):
    """Private embeddings. It takes what ``secure.connect`` takes, or a Session; ``model.close()`` ends its session."""

    def __init__(self, deployment: Any, **options: Any) -> None:
        self.model = SentenceTransformer(deployment, **options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the embeddings of documents."""
        return [list(map(float, row)) for row in self.model.encode_document(texts)]

    def embed_query(self, text: str) -> list[float]:
        """Return the embedding of a query."""
        return list(map(float, self.model.encode_query(text)))


class ChatUnseen(BaseChatModel):
    """Private chat. ``ChatUnseen.connect`` takes what ``secure.connect`` takes.

    session: what answers; the caller closes it. max_tokens: of an answer; None: as many as there is room for.
    """

    session: Any
    max_tokens: int | None = None
    temperature: float = 0.0
    hide_length: bool = False

    @classmethod
    def connect(cls, deployment: Any, *, max_tokens: int | None = None, **options: Any) -> ChatUnseen:
        """Connect, and return a chat model."""
        return cls(session=Opened(deployment, **options).session, max_tokens=max_tokens)

    @property
    def _llm_type(self) -> str:
        return "unseen"

    def _text(self, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]) -> Generation:
        if given:
            raise InvalidInput(f"{sorted(given)[0]} cannot be honoured", "leave it out")
        session: Session = self.session
        Generate().fits(session.served)
        return session.generate(
            convert_to_openai_messages(messages),
            self.max_tokens or session.room,
            stop=stop or (),
            temperature=self.temperature,
            hide_length=self.hide_length,
        )

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **given: Any
    ) -> ChatResult:
        text = self._text(messages, stop, given).complete()
        about = {"finish_reason": text.finish_reason}
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text.text, response_metadata=about))])

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **given: Any
    ) -> Iterator[ChatGenerationChunk]:
        for piece in self._text(messages, stop, given):
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk

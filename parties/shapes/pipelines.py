"""The shape of ``transformers.pipeline``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from parties.shapes.opening import Opened, aside
from secure.errors import InvalidInput
from secure.models.chat import CONTENT, ROLE
from secure.models.settings import LABEL
from secure.models.tokens import REFUSE
from secure.tasks.answer import Answering
from secure.tasks.classify import Classify
from secure.tasks.embed import Embed
from secure.tasks.generate import Generate
from secure.tasks.tag import NONE, Tag
from secure.tasks.task import Loader

MOST_LIKELY = 5  # classes of an image, as in the original
LEGACY = ""  # the original's way to say that top_k was not given


class Pipeline(Opened):
    """A served model that is called like one of transformers' pipelines; ``pipeline`` makes one.

    ``acall`` is the same without blocking the event loop.
    """

    asks: ClassVar[Loader]

    def __init__(self, deployment: Any, **options: Any) -> None:
        super().__init__(deployment, **options)
        try:
            self.asks.fits(self.session.served)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def __call__(self, *inputs: Any, **how: Any) -> Any:
        """Return the original's answer."""

    async def acall(self, *inputs: Any, **how: Any) -> Any:
        """Return what a call does, without blocking the event loop."""
        return await aside(self.__call__, *inputs, **how)


class TextClassification(Pipeline):
    """The pipeline "text-classification"."""

    asks = Classify()

    def __call__(self, inputs: Any, *, top_k: int | str | None = LEGACY, truncation: bool = False) -> Any:
        """Return {"label", "score"} of each text, or lists of them for ``top_k``; of one text, as the original does.

        An input is a text, or {"text", "text_pair"}. truncation: cut long texts, which are an error else.
        """
        single = isinstance(inputs, str | Mapping)
        chosen = 1 if isinstance(top_k, str) else top_k
        found = list(self.session.run(Classify(_long(truncation), top_k=chosen), [inputs] if single else list(inputs)))
        if top_k == LEGACY:
            return found[0] if isinstance(inputs, Mapping) else found
        lists = [each if isinstance(each, list) else [each] for each in found]
        return lists[0] if single else lists


class ImageClassification(Pipeline):
    """The pipeline "image-classification"."""

    asks = Classify()

    def __call__(self, inputs: Any, *, top_k: int | None = None) -> Any:
        """Return the likeliest classes of an image, or of each of a list: a path, bytes or a PIL image.

        top_k: five, or the one that the server's owner reveals.
        """
        settings = self.session.served.settings
        count = top_k or (1 if settings.reveal == LABEL else min(MOST_LIKELY, len(settings.labels)))
        several = isinstance(inputs, list | tuple)
        found = self.session.classify(list(inputs) if several else [inputs], top_k=count)
        lists = [each if isinstance(each, list) else [each] for each in found]
        return lists if several else lists[0]


class TokenClassification(Pipeline):
    """The pipeline "token-classification"."""

    asks = Tag()

    def __call__(self, inputs: str | Sequence[str], *, aggregation_strategy: str = NONE, long: str = REFUSE) -> Any:
        """Return the entities of a text, or a list of them for each of several. "word" is a part of the text."""
        single = isinstance(inputs, str)
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        found = self.session.tag(texts, aggregation=aggregation_strategy, long=long)
        return found[0] if single else found


class QuestionAnswering(Pipeline):
    """The pipeline "question-answering"."""

    asks = Answering()

    def __call__(self, *inputs: Any, question: Any = None, context: Any = None, long: str = REFUSE) -> Any:
        """Return {"score", "start", "end", "answer"} for a question and a context, or a list of such for several.

        They are given by name, or as {"question", "context"}, or as a list of these.
        """
        if len(inputs) > 1 or bool(inputs) == (question is not None or context is not None):
            raise InvalidInput("a question and its context are wanted", "question=..., context=...")
        if not inputs:
            return self.session.answer(question, context, long=long)
        given = [inputs[0]] if isinstance(inputs[0], Mapping) else list(inputs[0])
        if not all(isinstance(each, Mapping) and each.keys() == {"question", "context"} for each in given):
            raise InvalidInput("an input has not the keys question and context alone", "give both")
        found = self.session.answer([g["question"] for g in given], [g["context"] for g in given], long=long)
        return found[0] if isinstance(inputs[0], Mapping) else found


class FeatureExtraction(Pipeline):
    """The pipeline "feature-extraction", of a model that gives one vector for a text.

    The vector is what Hugging Face's inference service returns for such a model. The original's numbers for each token
    are not computed.
    """

    asks = Embed()

    def __call__(self, inputs: str | Sequence[str], *, truncation: bool = False) -> Any:
        """Return the embedding of a text as a list of numbers, or such a list for each of several texts."""
        single = isinstance(inputs, str)
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        found = [each.tolist() for each in self.session.embed(texts, long=_long(truncation))]
        return found[0] if single else found


class TextGeneration(Pipeline):
    """The pipeline "text-generation"."""

    asks = Generate()

    def __call__(
        self,
        inputs: Any,
        *,
        max_new_tokens: int | None = None,
        return_full_text: bool | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        stop_strings: Sequence[str] = (),
        hide_length: bool = False,
    ) -> Any:
        """Return [{"generated_text": ...}] for a text or for chat messages, or a list of such for several of them.

        The text has the prompt before it unless ``return_full_text`` is False; of messages, it is the list of them and
        the model's. max_new_tokens: as many as there is room for by default. do_sample: draw tokens, at a temperature
        of 1 by default; else they are the likeliest.
        """
        if temperature is not None and not do_sample:
            raise InvalidInput("temperature means nothing without do_sample", "do_sample=True, or leave it out")
        heat = 0.0 if not do_sample else 1.0 if temperature is None else temperature
        one = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], Mapping))
        found = []
        for prompt in [inputs] if one else list(inputs):
            count = max_new_tokens or self.session.room
            text = self.session.generate(
                prompt, count, stop=list(stop_strings), hide_length=hide_length, temperature=heat
            ).complete()
            found.append([{"generated_text": _whole(prompt, text.text, full=return_full_text)}])
        return found[0] if one else found


def _whole(prompt: Any, text: str, *, full: bool | None) -> Any:
    if full is False:
        return text
    return prompt + text if isinstance(prompt, str) else [*prompt, {ROLE: "assistant", CONTENT: text}]


def _long(truncation: bool) -> str:
    return "truncate" if truncation else REFUSE


PIPELINES: Mapping[str, type[Pipeline]] = {
    "text-classification": TextClassification,
    "sentiment-analysis": TextClassification,
    "image-classification": ImageClassification,
    "token-classification": TokenClassification,
    "ner": TokenClassification,
    "question-answering": QuestionAnswering,
    "feature-extraction": FeatureExtraction,
    "text-generation": TextGeneration,
}
"""The pipelines by the names of their tasks."""


def pipeline(task: str, deployment: Any, **options: Any) -> Pipeline:
    """Return a callable in the shape of ``transformers.pipeline(task)``, whose answers a served model gives.

    task: "text-classification", "token-classification", "question-answering", "feature-extraction", "text-generation",
    "image-classification". deployment, options: as for ``secure.connect``; or a Session that is open. Raises
    InvalidInput for another task, and for a model that was made for another; and what ``secure.connect`` raises.
    """
    if task not in PIPELINES:
        raise InvalidInput(f"no pipeline is called {task!r}", f"one of {', '.join(PIPELINES)}")
    return PIPELINES[task](deployment, **options)

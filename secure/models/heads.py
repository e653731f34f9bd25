"""Models with a head, as transformers saves them: classifiers, taggers, question answerers, rerankers.

What the client gets of a model is its owner's choice, and part of the Program:

- "label": the most likely class (of a tagger, of each token; of a classifier of several labels, whether each holds).
  The arg-max is computed under the protocol, so that the client learns an index and nothing else.
- "span": the same for a question answerer: the first and last token of the best answer, as one index.
- "token": the same for a model that writes text: its next token.
- "probabilities": softmax or sigmoid, computed under the protocol. A client that had the logits would learn more than
  their softmax says: all logits together may be shifted without a change of it.
- "logits": what the model itself gives. It tells most, and costs least.
- "ids", "passages": of a search, which passages of the index were found, without or with their texts; "ids-scores" and
  "passages-scores" add how well each fits.

A reranker's score is its one logit. The function that makes it a probability is applied by the client: it can be
undone, so that nothing would be hidden, and in fixed point it would make ties of the most relevant documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure.capture.graph import MASKED
from secure.errors import InvalidInput
from secure.lowering.client_inputs import GENERATE
from secure.models.calibration import HELD_OUT
from secure.models.checkpoints import load_checkpoint
from secure.models.pairs import encode, pair_samples
from secure.models.served_tokenizer import load_served_tokenizer
from secure.models.settings import (
    IDENTITY,
    IDS,
    IDS_SCORES,
    LABEL,
    LOGITS,
    PASSAGES,
    PASSAGES_SCORES,
    PROBABILITIES,
    SIGMOID,
    SOFTMAX,
    SPAN,
    TOKEN,
    TaskSettings,
)
from secure.models.text import model_directory
from secure.models.tokens import TRUNCATE, TextTokenizer, read_json
from secure.polynomial.recipe import RECIPE

CLASSIFY, TAG, ANSWER, RERANK, SEARCH = "classify", "tag", "answer", "rerank", "search"

ENDINGS: Mapping[str, str] = {
    "ForSequenceClassification": CLASSIFY,
    "ForTokenClassification": TAG,
    "ForQuestionAnswering": ANSWER,
    "ForImageClassification": CLASSIFY,
    "ForCausalLM": GENERATE,
    "LMHeadModel": GENERATE,
}
"""The tasks of models, by how the names of their classes end (``architectures`` of config.json)."""

REVEALED: Mapping[str, tuple[str, ...]] = {
    CLASSIFY: (LABEL, PROBABILITIES, LOGITS),
    TAG: (LABEL, PROBABILITIES, LOGITS),
    ANSWER: (SPAN, LOGITS),
    RERANK: (LOGITS,),
    GENERATE: (TOKEN,),
    SEARCH: (IDS, PASSAGES, IDS_SCORES, PASSAGES_SCORES),
}
"""The forms of an answer that each task has; the first is the default, which tells least."""

ANSWER_TOKENS = 15
"""The most tokens of an answer, as in transformers' pipeline."""


def task_named(model: str) -> str:
    """Return the task of a model's directory by the class that it was saved from; "" for one that embeds texts.

    A model of one class, whose score says how well two texts fit, is a reranker.
    """
    directory = Path(model)
    try:
        if _embeds(directory):
            return ""
        settings = read_json(directory / "config.json")
    except InvalidInput:  # whoever loads the model says so
        return ""
    name = str((settings.get("architectures") or [""])[0])
    task = next((task for ending, task in ENDINGS.items() if name.endswith(ending)), "")
    return RERANK if name.endswith("ForSequenceClassification") and _classes(settings) == 1 else task


def _embeds(directory: Path) -> bool:
    """True if sentence-transformers saved a model that embeds: its modules, and no cross-encoder."""
    kind = read_json(directory / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    return (directory / "modules.json").is_file() and kind != "CrossEncoder"


def _classes(settings: Mapping[str, Any]) -> int:
    """Return how many classes a configuration has; transformers assumes two where nothing is said."""
    named = settings.get("id2label")
    return len(named) if isinstance(named, Mapping) else int(settings.get("num_labels", 2))


@dataclass(frozen=True, eq=False, repr=False)
class HeadModel:
    """A loaded model with a head. maximum_length: the most tokens that it takes, special ones included.

    about: a line about how it was loaded, or "".
    """

    name: str
    module: nn.Module
    tokenizer: TextTokenizer
    tokenizer_json: bytes
    maximum_length: int
    settings: TaskSettings
    about: str = ""

    def samples(self, task: str, length: int, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
        """Make calibration inputs of one padded length. Raises InvalidInput for a length that the model does not take.

        Taggers get single sentences, classifiers those and pairs, question answerers and rerankers pairs alone.
        """
        if not 4 < length <= self.maximum_length:
            raise InvalidInput(f"the model takes no length of {length} tokens", f"5 to {self.maximum_length}")
        takes, found = self.settings.segments, list[dict[str, Tensor]]()
        if task in (CLASSIFY, TAG):
            alone = [text.replace("\t", " ") for text in sentences]
            texts = [*alone, " ".join(alone), " ".join(reversed(alone))]
            found += [encode(self.tokenizer, text, None, length, TRUNCATE)[0].inputs(segments=takes) for text in texts]
        if task != TAG:
            found += pair_samples(self.tokenizer, length, sentences, segments=takes)
        if self.settings.reveal == SPAN:
            found = [{**each, "context": each["attention_mask"]} for each in found]
        return found

    def held_out(self, task: str, length: int) -> list[dict[str, Tensor]]:
        """Make inputs of one padded length from public sentences that calibrate nothing, the first of full length."""
        whole, (question, short, sentence) = " ".join(HELD_OUT * (length // 64 + 1)), HELD_OUT[1:4]
        alone = [(whole, None), (sentence, None), (short, None)] if task in (CLASSIFY, TAG) else []
        pairs = [(question, whole), (question, sentence)] if task != TAG else []
        made = [encode(self.tokenizer, *each, length, TRUNCATE)[0] for each in (*alone, *pairs)]
        return [
            each.inputs(segments=self.settings.segments)
            | ({"context": each.second} if self.settings.reveal == SPAN else {})
            for each in made
        ]


def load_head(model: str, task: str, reveal: str = "") -> HeadModel:
    """Load a text model with a head for one task, and its tokenizer, from a directory.

    reveal: one of REVEALED; "" stands for the task's default, or for logits where nothing less can be revealed.
    Raises ModelNotFound, MissingPackage, and InvalidInput for a model of another task, a form that it does not have,
    and one in polynomial form.
    """
    directory = model_directory(model)
    kind = next(ending for ending, of in ENDINGS.items() if of == (CLASSIFY if task == RERANK else task))
    check_exact(directory)
    heard = list[str]()
    loaded: Any = load_checkpoint(directory, f"AutoModel{kind}", told=heard.append)
    config = loaded.config
    classes = int(config.num_labels)
    if (task == RERANK) != (classes == 1) and task in (RERANK, TAG):
        raise InvalidInput(f"{model} has {classes} classes, which does not fit the task {task}", "see --task")
    activation = activation_of(config, task)
    reveal = chosen(reveal, task, activation)
    tokenizer, tokenizer_json = load_served_tokenizer(directory)
    pairs = task != TAG
    segments = pairs and int(getattr(config, "type_vocab_size", 0) or 0) > 1
    labels = tuple(str(config.id2label[i]) for i in range(classes)) if task in (CLASSIFY, TAG) else ()
    settings = TaskSettings(reveal, labels, activation, segments)
    _ = settings.encoded  # which clients would refuse
    module = _Answering(loaded, settings) if task == ANSWER else _Revealing(loaded, settings)
    return HeadModel(
        directory.name,
        module.eval(),
        tokenizer,
        tokenizer_json,
        _maximum_length(directory, config),
        settings,
        "; ".join(heard),
    )


def chosen(reveal: str, task: str, activation: str) -> str:
    """Return what a model reveals: ``reveal``, or for "" the least. Numbers that are no classes' have logits alone.

    Raises InvalidInput for a form that the model does not have.
    """
    known = (LOGITS,) if activation == IDENTITY else REVEALED[task]
    if (reveal := reveal or known[0]) not in known:
        raise InvalidInput(f"the task {task} of this model reveals no {reveal}", f"one of {', '.join(known)}")
    return reveal


def check_exact(directory: Path) -> None:
    """Raise InvalidInput for a model in polynomial form, whose answers by exact functions would be wrong."""
    if (directory / RECIPE).is_file():
        raise InvalidInput(
            f"{directory} is in polynomial form ({RECIPE}), which models with a head do not have so far",
            "train the head on the original model and serve that, by two or three parties; polynomial form is for "
            "sentence encoders and language models",
        )


def activation_of(config: Any, task: str) -> str:
    """Return the function that transformers' pipelines, or for rerankers sentence-transformers, apply to logits."""
    if task == RERANK:
        said = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
        said = said or getattr(config, "sbert_ce_default_activation_function", None) or "torch.nn.modules.Sigmoid"
        known = {"Sigmoid": SIGMOID, "Identity": IDENTITY}
        if (name := str(said).rpartition(".")[2]) not in known:
            raise InvalidInput(f"the reranker's scores are made by {said}", "Sigmoid or Identity")
        return known[name]
    if task in (TAG, ANSWER):
        return SOFTMAX
    if config.problem_type == "regression":
        return IDENTITY
    return SIGMOID if config.problem_type == "multi_label_classification" or config.num_labels == 1 else SOFTMAX


def _maximum_length(directory: Path, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and config.model_type in _POSITIONS_BEHIND_PADDING:
        positions -= config.pad_token_id + 1
    limits = [positions, read_json(directory / "tokenizer_config.json").get("model_max_length")]
    return min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=512)


_POSITIONS_BEHIND_PADDING = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm"),
        *("camembert", "mpnet", "longformer", "data2vec-text"),
    }
)
"""Types of models whose table of positions begins behind the padding token's."""


class _Revealing(nn.Module):
    """A model that gives its logits, and what is revealed of them: (batch, classes) or (batch, length, classes).

    The result is (batch, classes) or (batch, length, classes) of logits or probabilities; of labels one index for each
    row or token, or, where several labels may hold, 1 for each that does and 0 for others.
    """

    def __init__(self, model: nn.Module, settings: TaskSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return revealed(self._logits(input_ids, attention_mask, token_type_ids), self.settings)

    def _logits(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **given).logits
        return found

    def scored(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits, and which of them count: of a tagger those of tokens, not of padding."""
        logits = self._logits(input_ids, attention_mask, token_type_ids)
        return logits, attention_mask[..., None] if logits.dim() == 3 else torch.ones_like(logits)


def revealed(logits: Tensor, settings: TaskSettings) -> Tensor:
    """Return what is revealed of logits (..., classes)."""
    several = settings.activation == SIGMOID
    if settings.reveal == PROBABILITIES:
        return torch.sigmoid(logits) if several else F.softmax(logits, dim=-1)
    if settings.reveal == LABEL:
        return torch.stack([-logits, logits], -1).argmax(-1) if several else logits.argmax(-1)
    return logits


class _Answering(nn.Module):
    """A question answerer. It gives the logits of starts and ends, (batch, 2, length), or one index of a span (batch,).

    context: 1 for the tokens in which the answer may begin and end, (batch, length).
    """

    def __init__(self, model: nn.Module, settings: TaskSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        start, end = self._logits(input_ids, attention_mask, token_type_ids)
        if context is None:
            return torch.stack([start, end], 1)
        outside = (1.0 - context.to(start.dtype)) * MASKED
        return best_span(start + outside, end + outside)

    def _logits(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **given)
        return found.start_logits, found.end_logits

    def scored(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits and which of them are no padding's; with a context those of spans, and which lie in it."""
        start, end = self._logits(input_ids, attention_mask, token_type_ids)
        if context is None:
            return torch.stack([start, end], 1), attention_mask[:, None]
        return span_sums(start, end), span_sums(context, context) == 2


def best_span(start: Tensor, end: Tensor) -> Tensor:
    """Return the index of the span of the greatest sum of a start and an end, both (batch, length); see ``span_at``."""
    return span_sums(start, end).argmax(-1)


def span_sums(start: Tensor, end: Tensor) -> Tensor:
    """Return the sums of a start and an end, both (batch, length), of every span: (batch, spans).

    The spans of one token come first, in order, then those of two, and so on up to ANSWER_TOKENS.
    """
    length = start.shape[-1]
    sums = [start[:, : length - more] + end[:, more:] for more in range(min(ANSWER_TOKENS, length))]
    return torch.cat(sums, -1)


def span_at(index: int, length: int) -> tuple[int, int]:
    """Return the first and the last token of the span of an index of ``best_span``.

    Raises InvalidInput for one that is none.
    """
    for more in range(min(ANSWER_TOKENS, length)):
        if 0 <= index < length - more:
            return index, index + more
        index -= length - more
    raise InvalidInput("the answer is no span of the text", "ask the server's owner")

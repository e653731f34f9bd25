"""The commands ``unseen classify``, ``tag``, ``answer``, ``rerank`` and ``search``: what served models are asked."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from parties.cli.asking import Asking, Question, TextsArgument, ask, in_words
from parties.cli.console import say
from parties.cli.options import Long, LongOption
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput
from secure.models.searcher import shown
from secure.models.tokens import REFUSE, TRUNCATE
from secure.session.link import Report
from secure.session.session import Session
from secure.tasks.answer import Answering
from secure.tasks.classify import Classify
from secure.tasks.rerank import Rerank, ranked
from secure.tasks.search import Search
from secure.tasks.tag import AGGREGATIONS, SIMPLE, Tag

# Enums for typer's choices; their members come from the library.
Aggregation = StrEnum("Aggregation", {a: a for a in AGGREGATIONS})  # type: ignore[misc]
Cut = StrEnum("Cut", {how: how for how in (REFUSE, TRUNCATE)})  # type: ignore[misc]

CutOption = Annotated[
    Cut,
    typer.Option(
        "--long", help=f"What becomes of texts with more tokens than the served length: {REFUSE}, {TRUNCATE}."
    ),
]


def classify(
    deployment: Deployment,
    asking: Asking,
    texts: TextsArgument = None,
    top_k: Annotated[
        int, typer.Option(min=1, help="Show so many classes of each text, the likeliest first, if the server tells.")
    ] = 1,
    image_files: Annotated[
        bool,
        typer.Option(
            "--image-files", help="TEXTS, or those of --input, are names of image files: PNG, JPEG, WEBP, BMP."
        ),
    ] = False,
    pair: Annotated[
        bool,
        typer.Option("--pair", help="Each text is two, with a tab between them, such as a premise and a hypothesis."),
    ] = False,
    long: CutOption = Cut[REFUSE],
) -> None:
    """Classify texts, pairs of texts, or images that the servers never see."""
    if pair and image_files:
        raise InvalidInput("--pair and --image-files exclude each other", "leave one of them out")
    asked = Question(
        "classify",
        Classify(str(long), top_k=top_k),
        in_words(deployment, _classes),
        give=Path if image_files else pair_of if pair else str,
        also="--pair" if pair else "",
        long=str(long),
    )
    ask(asked, deployment, asking, texts)


def pair_of(text: str) -> tuple[str, str]:
    """Return the two texts on both sides of a tab. A blank text is two empty ones, which have no answer.

    Raises InvalidInput for a text with no tab, or with several.
    """
    if (tabs := text.count("\t")) != 1 and text.strip():
        raise InvalidInput(f"{tabs} tabs in a text, where --pair wants one between two texts", "TEXT<tab>TEXT")
    first, _, second = text.partition("\t")
    return first, second


def _classes(found: Any) -> list[str]:
    lines = [f"{each['label']}{_score(each)}" for each in (found if isinstance(found, list) else [found])]
    return lines or ["no label"]  # of several that may hold


def _score(found: Any) -> str:
    return "" if found["score"] is None else f"   {found['score']:.4f}"


def tag(
    deployment: Deployment,
    asking: Asking,
    texts: TextsArgument = None,
    aggregation: Annotated[
        Aggregation, typer.Option(help="simple: neighbouring tokens of one label together; none: each token alone.")
    ] = Aggregation[SIMPLE],
    long: LongOption = Long[REFUSE],
) -> None:
    """Find entities in texts that the servers never see."""
    task = Tag(str(long), aggregation=str(aggregation))
    ask(Question("tag", task, in_words(deployment, _entities), long=str(long)), deployment, asking, texts)


def _entities(found: Sequence[Any]) -> list[str]:
    lines = []
    for each in found:
        kind = each.get("entity_group", each.get("entity"))
        lines.append(f"{each['start']:>5} to {each['end']:<5} {kind}   {each['word']!r}{_score(each)}")
    return lines or ["no entity"]


def answer(
    deployment: Deployment,
    asking: Asking,
    question: Annotated[str, typer.Option(help="The question.")],
    contexts: Annotated[
        list[str] | None,
        typer.Option(
            "--context", help="A text that holds the answer; none: one a line from standard input, or those of --input."
        ),
    ] = None,
    long: LongOption = Long[REFUSE],
) -> None:
    """Answer a question by a part of a context. The servers see neither."""
    asked = Question(
        "answer",
        Answering(str(long)),
        in_words(deployment, lambda found: [f"{found['answer']!r}{_score(found)}"]),
        give=lambda context: (question, context),
        also=question,
        long=str(long),
        texts="context",
        given="--context",
    )
    ask(asked, deployment, asking, contexts)


def rerank(
    deployment: Deployment,
    asking: Asking,
    query: Annotated[str, typer.Argument(help="The query.")],
    documents: Annotated[
        list[str] | None,
        typer.Argument(help="Documents; none: one a line from standard input, or those of --input."),
    ] = None,
    long: CutOption = Cut[TRUNCATE],
) -> None:
    """Sort documents by how well they answer a query. The servers see neither. A file has its scores in its order."""

    def best_first(found: Sequence[Any]) -> list[int]:
        return [each["corpus_id"] for each in ranked(found)]

    asked = Question(
        "rerank",
        Rerank(str(long)),
        in_words(deployment, lambda found: [f"{found:.4f}"], best_first),
        give=lambda document: (query, document),
        also=query,
        long=str(long),
        texts="document",
        given="documents as arguments",
    )
    ask(asked, deployment, asking, documents)


def search(
    deployment: Deployment,
    asking: Asking,
    questions: Annotated[
        list[str] | None,
        typer.Argument(help="Questions; none: one a line from standard input, which other users cannot see."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Show so many passages, the best first; all that the server finds by default."),
    ] = None,
    passages: Annotated[
        bool, typer.Option("--passages", help="Show the passages themselves, of a server whose owner serves them.")
    ] = False,
    long: CutOption = Cut[REFUSE],
) -> None:
    """Find passages in a server's index. The servers learn neither the question nor what was found."""

    def words(found: Sequence[Any]) -> list[str]:
        lines = list[str]()
        for rank, each in enumerate(found, 1):
            where = f"passage {each['passage']}, characters {each['start']} to {each['end']}"
            lines.append(f"{rank:>3}  {each['id']}   {where}{_score(each)}")
            if passages:
                lines += [f"       {line}" for line in shown(each["text"]).split("\n")]
        return lines

    def show(
        session: Session, texts: Sequence[str], found: Sequence[Any], taken: Sequence[Report], *, as_json: bool
    ) -> None:
        if clusters := session.served.settings.clusters:
            some, all_of = clusters
            say(
                f"unseen search: the server looks into the {some} of {all_of:,} clusters of passages that are nearest "
                "to a question; a passage elsewhere is not found"
            )
        in_words(deployment, words)(session, texts, found, taken, as_json=as_json)

    asked = Question(
        "search",
        Search(top, passages, str(long)),
        show,
        also=f"--top {top}" if top else "",
        long=str(long),
        texts="question",
        given="questions as arguments",
    )
    ask(asked, deployment, asking, questions)

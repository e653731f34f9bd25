"""The command ``unseen embed``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from parties.bulk.connection import Connection
from parties.cli.asking import Asking, Opening, Question, TextsArgument, ask
from parties.cli.console import OUT, say
from parties.cli.options import (
    Long,
    LongOption,
    PromptOption,
    RayInsecureOption,
    RayOption,
    RayWorkersOption,
    along_with_ray,
)
from parties.cluster.embedding import Workers
from parties.cluster.joined import Cluster
from parties.reports import answers
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput, printable
from secure.models.prompts import Prompts
from secure.models.text import model_directory
from secure.models.tokens import REFUSE
from secure.progress import Told
from secure.session.link import Report
from secure.session.session import Session
from secure.tasks.embed import Embed


def embed(
    deployment: Deployment,
    asking: Asking,
    texts: TextsArgument = None,
    long: LongOption = Long[REFUSE],
    prompt: PromptOption = None,
    compare_with: Annotated[
        str | None, typer.Option(help="Also run this model here, in the clear, and print how close the answers are.")
    ] = None,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    ray_insecure: RayInsecureOption = False,
) -> None:
    """Embed texts that the servers never see."""
    if asking.as_json and compare_with:
        raise InvalidInput("--json and --compare-with exclude each other", "leave one of them out")
    if asking.input is not None or ray is None:
        along_with_ray(ray, ray_workers, insecure=ray_insecure)
    task = Embed(str(long), prompt)

    def show(
        session: Session, texts: Sequence[str], found: Sequence[Any], taken: Sequence[Report], *, as_json: bool
    ) -> None:
        if as_json:
            answers.as_json(OUT, texts, found, taken)
            return
        if compare_with:
            say(f"unseen embed: embedding in the clear with {compare_with}, to compare ...")
        answers.report(OUT, deployment, session, texts, found, taken, task, compare_with)

    def several(connection: Connection) -> Opening:
        """Ask in the sessions of a cluster's workers."""

        def opened(told: Told) -> Workers:
            assert ray is not None  # or one session would do
            told(0, 0, "starting the workers of the cluster")
            return Workers(Cluster(ray, insecure=ray_insecure), connection, ray_workers)

        return opened

    if compare_with and asking.input is None:
        model_directory(compare_with)  # a mistake in it shows before anything is sent
    question = Question(
        "embed",
        task,
        show,
        about=lambda prompts: _prompt(prompts, task),
        answer="embedding",
        vectors=True,
        long=str(long),
        more={"--ray": ray},
        apart={"--compare-with": compare_with},
    )
    ask(question, deployment, asking, texts, None if ray is None else several)


def _prompt(prompts: Prompts, task: Embed) -> str:
    """Say which prompt goes before each text, where the model has any."""
    if not prompts:
        return ""
    text = prompts.text(task.prompt)
    said = f"{printable(json.dumps(text, ensure_ascii=False))} goes before each text" if text else "none is used"
    return f"of the model's prompts ({', '.join(prompts.texts)}) {said}; --prompt NAME chooses one"

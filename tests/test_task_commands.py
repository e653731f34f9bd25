"""``unseen classify``, ``tag``, ``answer`` and ``rerank``: with services, with files, and what they refuse."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secure
from parties import deployments
from parties.bulk.unfinished import beside
from parties.cli import tasks as commands
from parties.two_party.masked_model import mask_model
from secure.lowering.client_inputs import SETTINGS, TASK
from tests.dealer_key import KEY
from tests.heads import LABELS, write_head
from tests.test_cli import Run, in_words, run
from tests.tiny import Ready, Served, sentences, serving

for module in ("transformers", "tokenizers"):
    pytest.importorskip(module)

__all__ = ["run"]  # the fixture

LENGTH = 12
TEXTS = sentences(5, LENGTH - 2)
QUERY = sentences(1, 3)[0]
ASKING = {
    "classify": ["classify", *TEXTS[:2]],
    "tag": ["tag", *TEXTS[:2]],
    "answer": ["answer", "--question", QUERY, "--context", TEXTS[0][:29]],
    "rerank": ["rerank", QUERY, *(text[:24] for text in TEXTS[:3])],
}

Made = Callable[[str], secure.Compiled]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model for each task, compiled with the defaults: labels, spans, scores."""

    @cache
    def compiled(task: str) -> secure.Compiled:
        directory = write_head(tmp_path_factory.mktemp("commands") / task, task)
        return secure.compile_text_model(str(directory), LENGTH, calibration=TEXTS)

    return compiled


@contextmanager
def hosted(compiled: secure.Compiled, dealer: Served, state: Path) -> Iterator[list[str]]:
    """A server and a dealer of a model; the options with which a client reaches them."""
    with serving(Ready(compiled, mask_model(compiled.model, state)), dealer.address) as server:
        yield [
            *("--server", server.address, "--dealer", dealer.address, "--dealer-key", KEY.public.text),
            *("--no-cache", "--pace", "0"),
        ]


def private(compiled: secure.Compiled, task: str) -> list[Any]:
    """The answers of a session to what ``ASKING`` asks, in the command's order."""
    with secure.insecure_in_process(compiled) as session:
        if task == "answer":
            return [session.answer(QUERY, TEXTS[0][:29])]
        if task == "rerank":
            return [each["score"] for each in session.rerank(QUERY, [text[:24] for text in TEXTS[:3]])]
        found: list[Any] = session.classify(TEXTS[:2]) if task == "classify" else session.tag(TEXTS[:2])
        return found


@pytest.mark.parametrize("task", LABELS)
def test_a_command_asks_services(task: str, made: Made, run: Run, dealer: Served, state: Path) -> None:
    expected = private(made(task), task)
    with hosted(made(task), dealer, state) as options:
        ended = run(*ASKING[task], *options, "--json")
        assert ended.code == 0, ended.err
        rows = json.loads(ended.out)
        for row, answer in zip(rows, expected, strict=True):
            assert row["answer"] == (pytest.approx(answer, abs=1e-3) if task == "rerank" else answer)
            assert row["rounds"] > 0
        told = run(*ASKING[task], *options)
        assert told.code == 0, told.err
        assert "who learnt what" in told.out
        shown: dict[str, Callable[[], str]] = {
            "classify": lambda: expected[0]["label"],
            "tag": lambda: expected[0][0]["entity_group"],
            "answer": lambda: repr(expected[0]["answer"]),
            "rerank": lambda: f"\n  {expected[0]:.1f}",
        }
        assert shown[task]()[:5] in told.out
        for other in ASKING.keys() - {task}:
            in_words(run(*ASKING[other], *options), f"is for the task '{task}', not for '{other}'", f"unseen {task}")
        in_words(run("embed", TEXTS[0], *options), f"is for the task '{task}', not for 'embed'", f"unseen {task}")


def test_labels_that_a_terminal_must_not_show(run: Run, dealer: Served, state: Path) -> None:
    """A server's labels are bytes from outside: refused at the description, before anything is asked."""
    settings = '{"labels": ["\\u001b[2Jnegative", "positive"], "reveal": "label"}'
    model = nn.Linear(4, 2).requires_grad_(False)
    hostile = secure.compile(model, {"input": torch.randn(1, 4)}, labels={TASK: "classify", SETTINGS: settings})
    with hosted(hostile, dealer, state) as options:
        ended = run("classify", "x", *options)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("unseen: error: the Program of the server: the settings of the task: labels.0: ")
    assert "cannot be printed" in ended.err
    assert "\x1b" not in ended.err


# files


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch, made: Made) -> Callable[[str], list[secure.Session]]:
    """Let the commands ask all parties in this process; gives the sessions that are opened."""

    def connect_to(task: str) -> list[secure.Session]:
        opened = list[secure.Session]()

        def connect(*_: Any, **__: Any) -> secure.Session:
            opened.append(secure.insecure_in_process(made(task)))
            return opened[-1]

        monkeypatch.setattr(deployments, "connect", connect)
        return opened

    return connect_to


FILES = {
    "classify": ["classify"],
    "tag": ["tag"],
    "answer": ["answer", "--question", QUERY],
    "rerank": ["rerank", QUERY],
}


def test_an_answer_of_no_label_is_a_line() -> None:
    assert commands._classes([]) == ["no label"]
    assert commands._classes({"label": "good", "score": None}) == ["good"]


@pytest.mark.parametrize("task", LABELS)
def test_a_file_of_texts(
    task: str, run: Run, connected: Callable[[str], list[secure.Session]], made: Made, tmp_path: Path
) -> None:
    connected(task)
    texts = [TEXTS[0][:19], "", TEXTS[1][:19]]
    source, output = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"{text}\n" for text in texts))
    command = [*FILES[task], "--input", str(source), "--output", str(output)]
    ended = run(*command)
    assert (ended.code, ended.out) == (1, "")
    assert "one of them has no answer" in ended.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    which = "second text" if task in ("answer", "rerank") else "text"
    assert rows[1]["error"].startswith(f"the {which} is empty")
    with secure.insecure_in_process(made(task)) as session:
        asked: Callable[[str], Any] = {
            "classify": lambda text: session.classify([text])[0],
            "tag": lambda text: session.tag([text])[0],
            "answer": lambda text: session.answer(QUERY, text),
            "rerank": lambda text: pytest.approx(session.rerank(QUERY, [text])[0]["score"], abs=1e-3),
        }[task]
        assert [rows[i]["answer"] for i in (0, 2)] == [asked(texts[i]) for i in (0, 2)]
    in_words(run(*command[:-1], str(tmp_path / "out.npy")), "has no known suffix", "one of .jsonl")


def test_a_run_goes_on_where_it_stopped(
    run: Run, connected: Callable[[str], list[secure.Session]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = connected("classify")
    source, output = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"said": text}) + "\n" for text in TEXTS))
    command = ["classify", "--input", str(source), "--field", "said", "--output", str(output)]
    ask, count = secure.Session._answers, 0

    def failing(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal count
        if (count := count + 1) == 3:
            raise KeyboardInterrupt
        return ask(self, *arguments, **named)

    monkeypatch.setattr(secure.Session, "_answers", failing)
    assert run(*command).code == 130
    assert beside(output)[0].read_text().count("\n") == 2
    # other options would give other rows
    in_words(run(*command, "--long", "truncate"), "was begun with another long", "--overwrite")
    ended = run(*command)
    assert ended.code == 0, ended.err
    assert "this run goes on at text 3" in ended.err
    assert output.read_text().count("\n") == len(TEXTS)
    assert [len(session.reports) for session in opened] == [2, 0, 3]


def test_rows_of_another_query_are_not_mixed(
    run: Run, connected: Callable[[str], list[secure.Session]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected("rerank")
    source, output = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(TEXTS[:2]))
    monkeypatch.setattr("parties.bulk.unfinished.UnfinishedRows.finish", lambda _: None)
    assert run("rerank", QUERY, "--input", str(source), "--output", str(output)).code == 0
    ended = run("rerank", QUERY + "s", "--input", str(source), "--output", str(output))
    in_words(ended, "was begun with another long", "--overwrite")


def test_standard_input(
    run: Run, connected: Callable[[str], list[secure.Session]], monkeypatch: pytest.MonkeyPatch
) -> None:
    connected("answer")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXTS[0][:19]}\n{TEXTS[1][:19]}\n"))
    ended = run("answer", "--question", QUERY, "--json")
    assert [row["text"] for row in json.loads(ended.out)] == [TEXTS[0][:19], TEXTS[1][:19]]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    in_words(run("rerank", QUERY), "no document", "one a line on standard input")


# pairs


def test_pairs_as_arguments_and_lines(
    run: Run, connected: Callable[[str], list[secure.Session]], made: Made, tmp_path: Path
) -> None:
    """Each text is two, and the answers are those of the session's pairs, which differ from those of single texts."""
    opened = connected("classify")
    pairs = [(QUERY, text[:24]) for text in TEXTS]
    with secure.insecure_in_process(made("classify")) as session:
        expected = session.classify(pairs)
        assert expected != session.classify([f"{one} {other}" for one, other in pairs])
    texts = ["\t".join(pair) for pair in pairs]
    ended = run("classify", "--pair", *texts, "--json")
    assert ended.code == 0, ended.err
    assert [row["answer"] for row in json.loads(ended.out)] == expected
    source, output = tmp_path / "pairs.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"{text}\n" for text in [*texts, "", "\t"]))
    command = ["classify", "--input", str(source), "--output", str(output)]
    ended = run(*command, "--pair")
    assert ended.code == 1, ended.err  # two have no answer
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.get("answer") for row in rows] == [*expected, None, None]
    assert [row["error"].partition(":")[0] for row in rows[-2:]] == 2 * ["the first text is empty"]
    asked = len(opened)
    for text, tabs in ((QUERY, 0), (f"{QUERY}\t{QUERY}\t{QUERY}", 2)):
        source.write_text(f"{texts[0]}\n{text}\n")
        for ended in (run(*command, "--pair", "--overwrite"), run("classify", "--pair", texts[0], text)):
            in_words(ended, f"text 2: {tabs} tabs in a text", "TEXT<tab>TEXT")
    in_words(
        run("classify", "--pair", "--image-files", "a.png"), "--pair and --image-files exclude each other", "leave"
    )
    assert len(opened) == asked, "a mistake in a line shows before anything is sent"


def test_a_file_of_pairs_is_no_file_of_texts(
    run: Run, connected: Callable[[str], list[secure.Session]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected("classify")
    source, output = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text(f"{QUERY}\t{TEXTS[0][:24]}\n")
    monkeypatch.setattr("parties.bulk.unfinished.UnfinishedRows.finish", lambda _: None)
    assert run("classify", "--pair", "--input", str(source), "--output", str(output)).code == 0
    ended = run("classify", "--input", str(source), "--output", str(output))
    in_words(ended, "was begun with another long", "--overwrite")


# the owner's side


def test_what_an_owner_is_told(run: Run, tmp_path: Path) -> None:
    directory = write_head(tmp_path / "m", "classify")
    ended = run("compile", str(directory), str(tmp_path / "kept"), "--length", str(LENGTH), "--reveal", "logits")
    assert ended.code == 0, ended.err
    assert "for the task classify: 3 labels, which clients see; each answer reveals the logits" in ended.err
    kept = str(tmp_path / "kept")
    in_words(run("serve", kept, "--reveal", "label"), "--reveal label: .*compiled with logits", "leave --reveal out")
    in_words(run("serve", kept, "--task", "tag"), "--task tag: .*compiled with classify", "leave --task out")
    ended = run("compile", str(directory), str(tmp_path / "other"), "--length", str(LENGTH), "--task", "rerank")
    in_words(ended, "3 classes, which does not fit the task rerank", "see --task")

"""``unseen generate`` with services, its mistakes in words, and models that write text in other commands."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import secure
from parties import deployments
from parties.cli import generate
from parties.cli import generate as generate_module
from secure.errors import PeerLost
from tests.test_cli import Run, in_words, run
from tests.writers import scripted, tokenizer_of, write_writer

for module in ("transformers", "tokenizers", "jinja2"):
    pytest.importorskip(module)

__all__ = ["run"]  # the fixture


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_writer(tmp_path_factory.mktemp("writer") / "tiny")


@pytest.fixture(scope="module")
def compiled(directory: Path) -> secure.Compiled:
    return secure.compile_generator(str(directory), prompt=(16, 32), capacity=48, draft_length=3)


@pytest.fixture(scope="module")
def served(compiled: secure.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The options with which a client reaches a dealer and a server."""
    state = tmp_path_factory.mktemp("state")
    with (
        secure.serve(role="dealer", deployment=secure.TwoParty(), state=state / "dealer") as dealer,
        secure.serve(
            replace(compiled, deployment=secure.TwoParty(dealer_key=(key := str(state / "dealer" / "dealer.pub")))),
            role="server",
            peers={"dealer": dealer.address},
            state=state / "server",
        ) as server,
    ):
        yield [*("--server", server.address, "--dealer", dealer.address, "--dealer-key", key), "--no-cache"]


def test_a_text_by_services(run: Run, served: list[str], compiled: secure.Compiled) -> None:
    with secure.insecure_in_process(compiled) as session:
        expected = session.generate("the cat sat", 6, ignore_end=True).complete()
    ended = run("generate", "the cat sat", "--max-new-tokens", "6", "--ignore-end", "--network", "wan", *served)
    assert ended.code == 0, ended.err
    assert ended.out == f"{expected.text}\n"
    for said in (
        "a prompt of up to 32 tokens: ",
        "each token after it: ",
        "of waiting on WAN",
        "16, 32 tokens",
        "6 tokens in ",
        "the servers saw a prompt of up to 16 tokens, 6 steps, and when each was",
        "who learnt what",
    ):
        assert said in ended.err
    told = run("generate", "the cat sat", "--max-new-tokens", "6", "--ignore-end", "--fixed-length", "--json", *served)
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert (found["text"], found["ids"], found["finish_reason"]) == (expected.text, expected.ids, "length")
    assert [query["length"] for query in found["queries"]] == [32, 1, 1, 1, 1, 1]


def test_a_chat_by_services(run: Run, served: list[str], compiled: secure.Compiled) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "the cat"}]
    with secure.insecure_in_process(compiled) as session:
        expected = session.generate(messages, 3, ignore_end=True).complete()
    chat = ["generate", "the cat", "--chat", "--system", "a", "--max-new-tokens", "3", "--ignore-end"]
    ended = run(*chat, *served)
    assert (ended.code, ended.out) == (0, f"{expected.text}\n"), ended.err


def test_a_draft_by_services(run: Run, served: list[str], compiled: secure.Compiled, directory: Path) -> None:
    write = ["generate", "the cat sat", "--max-new-tokens", "6", "--ignore-end", *served]
    plain, ended = run(*write), run(*write, "--draft", str(directory), "--network", "wan")
    assert (plain.code, ended.code, ended.out) == (0, 0, plain.out), ended.err
    for said in (
        "a pass over the last of these and 2 guesses of the draft: ",
        "a pass gives 1 to 3 tokens; if 0%, 50%, 80%, 100% of the guesses agree, a token takes ",
        "waiting on WAN, 400 Mbps, 10 ms, for the same shares: ",
        "the servers see how many guesses agree in each pass, which says much about the text",
        "4 of 4 guesses of the draft agreed (100%); the servers saw how many in each pass",
        "guesses that agree in each pass",
    ):
        assert said in ended.err
    assert "guess" not in plain.err
    found = json.loads(run(*write, "--draft", str(directory), "--json").out)
    assert (found["drafted"], found["agreed"]) == (4, 4)
    assert [query["length"] for query in found["queries"]] == [16, 3, 3]
    refused = run(*write, "--draft", str(directory), "--hide-length")
    in_words(refused, "so its length cannot be hidden", "as many passes as tokens")
    in_words(run(*write, "--draft", "nowhere"), "the draft: no model at 'nowhere'", "save_pretrained")


def test_pinned_programs(run: Run, served: list[str], compiled: secure.Compiled) -> None:
    write = ["generate", "the cat sat", "--max-new-tokens", "2", *served]
    assert run(*write, "--program-digest", compiled.programs_digest).code == 0
    one, others = compiled.program.digest, "0" * 64
    in_words(run(*write, "--program-digest", one), "no Programs for a prompt and a step", "pin all the model's")
    in_words(run(*write, "--program-digest", others), "for all its Programs together, this client expects", "ask")


def test_mistakes_by_services(run: Run, served: list[str]) -> None:
    ended = run("generate", "the cat sat on the mat and then " * 9, *served)
    assert (ended.code, ended.out) == (1, "")
    assert "tokens, at most 32 fit\nhint: shorten it" in ended.err
    in_words(run("generate", "a", "--max-new-tokens", "99", *served), "99 new tokens after a prompt", "33 at most")
    for command in (["classify", "a"], ["embed", "a"]):
        ended = run(*command, *served)
        assert ended.code == 1
        assert "is for the task 'generate'" in ended.err
        assert "hint: unseen generate" in ended.err
        assert "the server sees" not in ended.err  # as a line before it


# without services


@pytest.mark.parametrize(
    ("count", "steps", "said"),
    [(21, 21, "20"), (21, 6, "20"), (5, 21, "20"), (2, 2, "1"), (1, 1, "")],
)
def test_the_rate_is_of_tokens(count: int, steps: int, said: str) -> None:
    """With a draft a pass gives several; with a hidden length there are steps without."""
    assert generate_module._rate(count, steps, 1.5, 0.5) == (f", {said} a second after the prompt" if said else "")


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Let the command ask a model that says what a script says; gives the queries that it was asked."""

    def connect_to(script: list[Any], **given: Any) -> list[Any]:
        session, asked = scripted(script, tokenizer_of("bytes"), **given)
        monkeypatch.setattr(deployments, "connect", lambda *_, **__: session)
        monkeypatch.setattr(generate, "prices", lambda *_, **__: [])
        return asked

    return connect_to


def ids(text: str) -> list[int]:
    found: list[int] = tokenizer_of("bytes").tokenizer.encode(text, add_special_tokens=False).ids
    return found


def test_stops_and_hidden_lengths(run: Run, connected: Callable[..., list[Any]]) -> None:
    asked = connected([*ids("a mat.\nUser: and"), *[5] * 30])
    ended = run("generate", "the", "--stop", "User:", "--hide-length", "--max-new-tokens", "20")
    assert (ended.code, ended.out) == (0, "a mat.\n\n"), ended.err
    assert len(asked) == 20
    assert "20 steps are taken, whatever the text is" in ended.err
    assert "ended at its end or at a stop, which 10 more steps hid" in ended.err


def test_prompts_from_files_and_standard_input(
    run: Run, connected: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("\ufeffthe\ncat\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("the\ncat\n"))
    for arguments in (["--input", str(tmp_path / "prompt")], [], ["the\ncat"]):
        asked = connected(ids("a"))
        assert run("generate", *arguments, "--max-new-tokens", "1").code == 0
        assert asked[0]["input_ids"][0].tolist()[-len(ids("the\ncat")) :] == ids("the\ncat")
    in_words(run("generate", "a", "--input", "b"), "--input and a prompt as an argument exclude each other", "leave")
    in_words(run("generate", "--input", str(tmp_path / "no")), "cannot be read: No such file", "a text file")


def test_what_was_written_before_a_party_was_lost_is_kept(run: Run, connected: Callable[..., list[Any]]) -> None:
    script = [*ids("a mat"), PeerLost("the server was silent", "look at its log")]
    connected(script)
    ended = run("generate", "the")
    assert (ended.code, ended.out) == (1, "a mat\n")
    assert ended.err.count("what was written is kept") == 1
    assert f"unseen: error: after {len(ids('a mat'))} tokens: the server was silent" in ended.err
    connected(script)
    ended = run("generate", "the", "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["text"] == "a mat"
    assert json.loads(ended.out)["finish_reason"] is None
    assert json.loads(ended.out)["error"].startswith(f"after {len(ids('a mat'))} tokens: the server was silent\nhint: ")
    connected([PeerLost("the server was silent", "look at its log")])
    ended = run("generate", "the")
    assert (ended.code, ended.out) == (1, "")
    assert "kept" not in ended.err


def test_nothing_obeys_on_a_terminal() -> None:
    assert generate._on_terminal("a\x1b[2Jb\n\tü🙂") == "a?[2Jb\n\tü🙂"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["a", "--stop", ""], "a stop string is empty", "leave it out"),
        (["a", "--system", "b"], "--system means nothing without --chat", "both"),
        (["a", "--network", "moon"], "unknown network 'moon'", "lan"),
    ],
)
def test_mistakes_in_words(
    arguments: list[str], message: str, hint: str, run: Run, connected: Callable[..., list[Any]]
) -> None:
    asked = connected([5])
    in_words(run("generate", *arguments), message, hint)
    assert not asked


def test_a_model_without_a_template(run: Run, connected: Callable[..., list[Any]]) -> None:
    connected([5], template="")
    ended = run("generate", "a", "--chat")
    assert (ended.code, ended.out) == (1, "")
    assert "this model has no chat template\nhint: give the prompt as a text" in ended.err


# other commands


def test_other_commands_know_models_that_write_text(run: Run, directory: Path, tmp_path: Path) -> None:
    sizes = ["--length", "8", "--length", "4", "--capacity", "16", "--draft-length", "3"]
    ended = run("compile", str(directory), str(tmp_path / "kept"), *sizes)
    assert ended.code == 0, ended.err
    assert "is for the task generate: each answer reveals the token" in ended.err
    assert "each token after the prompt: " in ended.err
    assert "a pass over 3 tokens and drafts: " in ended.err
    compiled = secure.load_compiled(tmp_path / "kept")
    assert [size.program.labels["length"] for size in compiled.sizes] == ["8", "4", "1", "3"]
    assert f"all 4 Programs together: {compiled.programs_digest}" in ended.err
    with secure.insecure_in_process(compiled) as session:
        assert len(session.generate("a", 2, ignore_end=True).complete().ids) == 2
    serve = ["serve", str(tmp_path / "kept"), "--listen", "127.0.0.1:0", "--dealer", "127.0.0.1:1"]
    in_words(run(*serve, "--capacity", "20"), "--capacity 20: .* was compiled with 16", "leave --capacity out")
    in_words(run(*serve, "--draft-length", "4"), "--draft-length 4: .* was compiled with 3", "leave --draft-length out")
    for more in ([], ["--length", "8"], ["--draft-length", "3"]):
        ended = run("profile", str(directory), "--capacity", "16", "--no-time", "--json", *more)
        assert ended.code == 0, ended.err
        assert '"rounds"' in ended.out
        assert ("tokens" in json.loads(ended.out)) == ("--draft-length" in more)
    timed = run("profile", str(directory), "--capacity", "16", "--json")
    assert timed.code == 0, timed.err
    assert all(row["seconds"] > 0 for row in json.loads(timed.out)["networks"])
    both = run("profile", str(directory), "--length", "8", "--draft-length", "3")
    in_words(both, "--length is of a prompt, and --draft-length of a pass", "leave one of them out")
    in_words(run("compare", str(directory)), "writes text, and answers are compared by their cosine", "profile")
    new = str(tmp_path / "other")
    in_words(run("compile", str(directory), new, "--batch", "2"), "--batch means nothing", "a text is written alone")
    in_words(
        run("compile", str(directory), new, "--accept-cosine", "0.9"),
        "--accept-cosine 0.9 means nothing",
        "--accept-error",
    )
    in_words(run("compile", str(directory), new, "--answer-bits", "9"), "answer_bits mean nothing", "tokens")
    in_words(run("compile", str(directory), new, "--reveal", "logits"), "reveals no logits", "token")
    in_words(run("compile", str(directory), new, "--length", "64", "--capacity", "9"), "a capacity of 9", "as many")
    in_words(run("compile", "digits", new, "--capacity", "9"), "--capacity means nothing for digits", "write text")
    in_words(run("compile", "digits", new, "--draft-length", "4"), "--draft-length means nothing", "write text")

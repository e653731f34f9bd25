"""Every option of every command, for every deployment, changes what the command does or is refused by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import typer
import typer.main
from torch import Tensor, nn

import secure
from parties import deployments
from parties.bulk.connection import Connection
from parties.cli import (
    accuracy,
    asking,
    certs,
    compare,
    compile,
    console,
    demo,
    embed,
    generate,
    index,
    main,
    output,
    party,
    plan,
    profile,
    proxy,
    serve,
    timeline,
    train,
    verify,
)
from parties.cli.config import NO_SETTING
from parties.cli.verbs import Verb
from parties.receipts.receipt import Receipt
from parties.reports import answers
from parties.served.compiled_files import CompiledCache
from parties.served.described import ConnectOptions
from parties.services import hosting
from parties.services.hosting import HostOptions, Parts
from parties.telemetry import logs
from secure.cost.demand import QueryDemand, RoleDemand
from secure.cost.report import ProfileReport
from secure.cost.traffic import ONLINE, Cost, Traffic
from secure.deployments import deployment as registry
from secure.deployments.compare import Outcome, variants
from secure.deployments.compilation import Compilation
from secure.deployments.deployment import COMPILE, CONNECT, ROWS, SERVE, CompileOptions, Deployment, Role, option
from secure.models.index import Change
from secure.models.prompts import Prompts
from secure.models.tokens import TextTokenizer
from secure.mpc.network import NETWORKS
from secure.progress import Told, silent
from secure.session.link import Link, Report
from secure.tasks.task import Served
from secure.training.fidelity import Fidelity
from tests.test_cli import Run, run
from tests.tiny import word_tokenizer

__all__ = ["run"]  # the fixture

NAMES = [d.name for d in registry.deployments()]
FREE = "127.0.0.1:0"


# what commands do, written down instead


@dataclass
class Calls:
    """What a command asked of the library, as text."""

    made: list[str] = field(default_factory=list)

    def note(self, name: str, answer: Any = None) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            shown = [a for a in arguments if not isinstance(a, SimpleNamespace)]
            shown = [vars(a) if isinstance(a, Connection) else a for a in shown]  # not its place in memory
            shown += [(k, v) for k, v in sorted(named.items()) if not callable(v)]
            self.made.append(f"{name}{shown!r}")
            return answer(*arguments, **named) if callable(answer) else answer

        return called


class Written(list[str]):
    """A text of one piece."""

    ids, text, finish_reason, drafted = (5,), "a", "stop", 0

    def __init__(self) -> None:
        super().__init__(["a"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """Commands end where the library begins: nothing is loaded, compiled, hosted, asked or trained."""
    found = Calls()

    def put(module: Any, name: str, answer: Any = None) -> None:
        monkeypatch.setattr(module, name, found.note(name, answer))

    waits = found.note("wait_announced", lambda tell, drain: tell())
    service = SimpleNamespace(about=(), address="nowhere:1", wait_announced=waits)
    cost = Cost(1, (Traffic("a", "b", 1, ONLINE),))
    program = SimpleNamespace(digest="d", labels={})
    compiled = SimpleNamespace(cost=cost, program=program, model=None, about="", deployment=secure.TwoParty())
    compiled.sizes = (compiled,)
    asked = found.note("run", lambda *_: iter([torch.zeros(2)]))
    report = Report(1, (), 0.0, 0.0, 0.0, 0.0, 0)
    session = SimpleNamespace(run=asked, report=report, program=program, sizes=(), prompts=Prompts())
    session.served, session.room = Served(None, 8, task="generate"), 64
    session.link, session.reports = SimpleNamespace(tables={}), [report]
    session.generate = found.note("generate", Written())

    @contextmanager
    def connected(*_: Any, **__: Any) -> Iterator[Any]:
        yield session

    for module in (serve, compile, party, asking, demo, profile, plan):
        for name in ("get_ready", "use_threads"):
            if hasattr(module, name):
                put(module, name)
    put(logs, "log_to_stderr")
    put(hosting, "check")
    put(hosting, "check_owners")
    put(deployments, "serve", service)
    put(deployments, "serve_together")
    monkeypatch.setattr(serve, "apart", lambda check: check())
    put(deployments, "connect", connected)
    put(serve, "model_directory")
    put(serve, "check_index")
    put(compile, "save_compiled", lambda _, directory: directory.mkdir())
    put(Compilation, "run", lambda *_: compiled)
    put(Compilation, "key", "k")
    put(CompiledCache, "find")
    put(CompiledCache, "keep")
    for name in ("choices", "remarks"):
        monkeypatch.setattr(Deployment, name, lambda *_: ())
    for each in registry.deployments():
        for name in ("choices", "remarks"):
            monkeypatch.setattr(each, name, lambda *_: ())
    for module in (embed, compare, train, accuracy):
        put(module, "model_directory", Path)
    put(party, "write_shares", lambda *_: [])
    put(index, "load_text_model", SimpleNamespace(maximum_length=64))
    put(index, "read_documents", [])
    made_index = SimpleNamespace(names={}, passages=[], segments=[], length=8, overlap=2)
    put(index, "build_index", (made_index, Change(0, 0, 0, 0, 0)))
    put(index, "read_index", made_index)
    put(index, "write_index")
    put(generate, "prices", ["a price"])
    put(proxy, "answer_at")
    put(asking, "Measurements", SimpleNamespace(add=found.note("add"), show=found.note("show"), check=lambda: None))
    put(answers, "report")
    for name in ("as_json", "report_answers", "answers_as_json"):
        put(answers, name)
    put(profile, "profiled", lambda *_: ProfileReport(cost, {"deployment": "d"}))
    roles = (RoleDemand("a", 0.1, 0.1), RoleDemand("b", 0.1, 0.1, stored=1))
    put(plan, "demanded", QueryDemand(cost, roles, 1, NETWORKS[0], 0.1, 0.1))
    put(compare, "_outcomes", lambda *_: iter([Outcome(variants([8])[0], cost, {"wan": 1.0, "250,20": 1.0})]))
    put(compare, "_seconds")
    put(compare, "use_threads")
    put(demo, "ask_texts", 0)
    put(demo, "_owner")
    put(demo, "ask_digits", 0)

    @contextmanager
    def hosted(*_: Any, **__: Any) -> Iterator[Any]:
        yield None, None

    put(demo, "hosted", hosted)
    for module in (train, accuracy):
        put(module, "measured", Fidelity(ways=(), layers=(), ranges=()))
        put(module, "show")
    put(accuracy, "use_threads")
    put(torch, "set_num_threads")
    put(train, "data_set", [])
    monkeypatch.setattr("secure.training.distil.distil", found.note("distil"))
    put(timeline, "merged", "merged")
    receipt = SimpleNamespace(used=frozenset(), messages=1, size=1, answered=1)
    monkeypatch.setattr(verify, "Receipt", SimpleNamespace(read=found.note("read", receipt)))
    put(verify, "found_in", {})
    put(verify, "asked_for", {})
    for name in ("get_ready", "compare", "table"):
        put(verify, name)
    session.receipt = found.note("receipt", SimpleNamespace(write=found.note("write")))
    put(output, "write")
    put(output, "store")
    authority = {name: found.note(name, tmp_path) for name in ("make", "issue", "renew", "revoke")}
    made = SimpleNamespace(**authority, exists=lambda _: False)
    made.make = found.note("make", made)
    monkeypatch.setattr(certs, "Authority", made)
    (tmp_path / "texts").write_text("One.\nTwo.\n")
    (tmp_path / "set").mkdir()
    return found


# how every option is given

FIRST: dict[str, list[str]] = {
    "embed": ["A text."],
    "classify": ["A text."],
    "tag": ["A text."],
    "answer": ["--question", "Who?", "--context", "A text."],
    "rerank": ["A query.", "A text."],
    "search": ["A question?"],
    "generate": ["A text."],
    "index": ["{tmp}/documents", "--output", "{tmp}/index"],
    "serve": ["--listen", FREE],
    "compile": ["a-model", "{tmp}/compiled"],
    "dealer": ["--listen", FREE],
    "party": ["--share", "s", "--id", "0", "--listen", FREE],
    "train": ["--text", "{tmp}/texts", "--output", "{tmp}/out"],
    "plan": ["--clients", "10", "--queries-per-day", "5000"],
    "accuracy": ["a-model"],
    "timeline": ["c", "s", "--output", "o"],
    "verify": ["receipt", "--server", FREE],
    "certs": ["{tmp}/certs", "client"],
    "token": ["new", "somebody", "--tokens", "{tmp}/given"],
}
"""What a command needs anyway."""

WITH: dict[tuple[str, str], list[str]] = {
    ("profile", "output"): ["--json"],
    ("accuracy", "output"): ["--format", "json"],
    ("compare", "network"): ["--time"],
    ("demo", "layers"): ["--digits"],
    ("demo", "images"): ["--digits"],
    ("demo", "documents"): ["--model", "m", "a question"],
    **{("demo", name): ["--model", "m"] for name in ("texts", "length", "embedding", "refresh", "precision")},
    ("party", "party_0"): ["--id", "1"],
    ("generate", "system"): ["--chat"],
    ("generate", "input"): [],
    **{(name, "reveal"): ["--task", "classify"] for name in ("serve", "compile", "share-model")},
}
"""What else is said where an option is tried."""

POSITIONS = {
    ("accuracy", "model"): 1,
    ("compile", "model"): 1,
    ("compile", "directory"): 2,
    ("timeline", "client"): 1,
    ("timeline", "server"): 2,
    ("certs", "directory"): 1,
    ("certs", "roles"): 2,
    ("token", "action"): 1,
    ("verify", "receipt"): 1,
    ("token", "name"): 2,
    ("index", "documents"): 1,
    ("rerank", "query"): 1,
    ("rerank", "documents"): 2,
    ("generate", "prompt"): 1,
}
"""Arguments that a command needs anyway, by their places in its line."""

VALUES: dict[str, str] = {
    "tokens": "{tmp}/others",
    "api_key_file": "{tmp}/key",
    "listen": "127.0.0.1:7",
    "dealer": "127.0.0.1:7",
    "server": "127.0.0.1:7",
    "parties": "127.0.0.1:7,127.0.0.1:8,127.0.0.1:9",
    "party_0": "127.0.0.1:7",
    "party_2": "127.0.0.1:7",
    "calibration": "{tmp}/texts",
    "texts": "{tmp}/texts",
    "held_out": "{tmp}/texts",
    "text": "{tmp}/set",
    "network": "250,20",
    "number": "1",
    "budget_memory": "1",
    "budget_seconds": "1",
    "power": "6",
    "shift": "2",
    "activation_degree": "3",
    "fraction_bits": "12",
    "answer_bits": "9",
    "accuracy": "0.5",
    "accept_cosine": "0.5",
    "accept_error": "0.5",
    "trace": "{tmp}/traces",
    "receipt": "{tmp}/receipt.json",
    "output": "{tmp}/written",
    "embedding": "client-table",
    "gelu": "puma",
    "long": "truncate",
    "aggregation": "none",
    "task": "tag",
    "reveal": "logits",
    "temperature": "0.5",
    "draft": "{tmp}",
    "top_k": "2",
    "approximations": "puma",
    "form": "json",
    "roles": "dealer",
    "attention": "quad",
    "deployment": "three-party",
    "action": "list",
    "command": "dealer",
    **dict.fromkeys(
        (
            "layers",
            "images",
            "length",
            "depth",
            "ahead",
            "deadline",
            "pace",
            "precision",
            "count",
            "days",
            "retries",
            "batch",
            "samples",
            "workers",
            "capacity",
            "draft_length",
            "max_new_tokens",
            "ray_workers",
            "dimensions",
            "overlap",
            "top",
            "clusters",
        ),
        "4",
    ),
    "rotate_mask": "7",
    "store": "{tmp}/store",
    "store_bytes": "4",
    "store_key_file": "{tmp}/store.key",
    "memory": "4",
    "metrics": "127.0.0.1:7",
    "log_format": "json",
    "otlp": "http://127.0.0.1:7/v1/traces",
    "wait": "4",
    "clients": "20",
    "queries_per_day": "900000",
    "texts_per_query": "3",
    "latency": "0.01",
    "prices": "core-hour=1",
    "sessions_per_machine": "3",
}


def commands() -> Mapping[str, Any]:
    group: Any = typer.main.get_command(main.app())
    commands: Mapping[str, Any] = group.commands
    return commands


@pytest.fixture
def made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are made once for all tests that ask for this, none of which adds a deployment or a command."""
    monkeypatch.setattr(Verb, "command", _command)


_command = functools.cache(Verb.command)


def cases() -> list[tuple[str, str, str]]:
    """(command, deployment or "", parameter): all there are."""
    out = []
    for name, command in commands().items():
        of = NAMES if any(p.name == "deployment" for p in command.params) and name != "compare" else [""]
        out += [(name, d, str(p.name)) for d in of for p in command.params if p.name not in NO_SETTING]
    return out


def given(parameter: Any) -> list[str]:
    """An option on the command line, with another value than its default; or an argument."""
    if getattr(parameter, "is_flag", False):
        return [parameter.secondary_opts[0] if parameter.default else parameter.opts[0]]
    default = parameter.default
    number = isinstance(default, (int, float)) and parameter.name not in VALUES
    value = str(default + 1) if number else VALUES.get(parameter.name, "something-else")
    if isinstance(default, Enum) and default.value == value:
        value = next(str(other.value) for other in type(default) if other is not default)
    return [parameter.opts[0], value] if parameter.opts[0].startswith("-") else [value]


@pytest.mark.parametrize(("name", "deployment", "parameter"), cases())
def test_every_option_is_read_or_refused(
    name: str, deployment: str, parameter: str, made_once: None, run: Run, calls: Calls, tmp_path: Path
) -> None:
    command = commands()[name]
    (tried,) = (p for p in command.params if p.name == parameter)
    if parameter == "deployment" and name != "compare":
        pytest.skip("every other case names one")
    chosen = ["--deployment", deployment] if deployment else []
    first, more = list(FIRST.get(name, [])), WITH.get((name, parameter), [])
    if more and more[0].startswith("--") and more[0] in first:  # it takes the place of what is needed anyway
        del first[(at := first.index(more[0])) : at + 2]
    common = [name, *chosen, *more, *first]
    common = [word.replace("{tmp}", str(tmp_path)) for word in common]
    with_it = [word.replace("{tmp}", str(tmp_path)) for word in given(tried)]

    def seen(arguments: Sequence[str]) -> tuple[Any, ...]:
        calls.made.clear()
        ended = run(*arguments)
        assert ended.code != 2, ended.err
        return ended.code, ended.out, ended.err, tuple(calls.made)

    before = seen(common)
    if (name, parameter) in POSITIONS:
        place = POSITIONS[name, parameter] + len(chosen)
        after = seen([*common[:place], *with_it, *common[place + 1 :]])
    else:
        argument = not tried.opts[0].startswith("-")
        after = seen([common[0], *with_it, *common[1:]] if argument else [*common, *with_it])
    written = tried.opts[0]
    if "nobody serves a whole model" in before[2]:
        assert after[0] == 1  # the command as a whole is refused
        return
    refused = after[0] == 1 and re.search(rf"{written}\b.* (means? nothing|exclude)", after[2], re.IGNORECASE)
    assert refused or after != before, f"{name}: {written} was ignored: {after}"


def test_an_ignored_option_is_noticed(run: Run, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dealer(listen: str = FREE, colour: str = "red") -> None:
        deployments.serve(role="dealer", listen=listen)

    monkeypatch.setattr("parties.cli.serve.dealer", dealer)
    test_every_option_is_read_or_refused("dealer", "", "listen", None, run, calls, tmp_path)
    with pytest.raises(AssertionError, match="--colour was ignored"):
        test_every_option_is_read_or_refused("dealer", "", "colour", None, run, calls, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["embed", "x", "--deployment", "ckks", "--dealer", "a:1"], "--dealer means nothing under ckks", "--server"),
        (["embed", "x", "--keys", "k"], "--keys means nothing under two-party", "it takes --server, --dealer"),
        (["embed", "x", "--deployment", "ckks", "--trace", "t"], "--trace means nothing under ckks", "two-party"),
        (["profile", "--public-weights"], "--public-weights means nothing under two-party", "none of this kind"),
        (["profile", "--deployment", "ckks", "--gelu", "puma"], "--gelu means nothing under ckks", "--embedding"),
        (["profile", "--deployment", "ckks", "--network", "wan"], "--network means nothing under ckks", "none of"),
        (["serve", "--deployment", "ckks", "--network", "wan"], "--network means nothing under ckks", "--embedding"),
        (["serve", "--network", "moon"], "unknown network 'moon'", "loopback, lan, wan"),
        (["share-model", "--network", "moon"], "unknown network 'moon'", "loopback, lan, wan"),
        (["serve", "--deployment", "three-party"], "nobody serves a whole model under three-party", "share-model"),
        (["serve", "--deployment", "ckks", "--trace", "t"], "--trace means nothing to the server of ckks", "--state"),
        (
            ["party", "--share", "s", "--id", "2", "--ahead", "2"],
            "--ahead means nothing to the party 2 of",
            "--deadline",
        ),
        (["party", "--share", "s", "--id", "2", "--party-0", "a:1"], "--party-0 means nothing to the party 2", "none"),
        (["demo", "--deployment", "ckks"], "all-MiniLM-L6-v2 does not run under ckks", "--digits"),
        (["demo", "--digits", "--length", "16"], "--length means nothing in the demo of digits", ""),
        (["demo", "--documents", "docs"], "--documents without a question", "unseen demo --documents"),
        (
            ["train", "--text", __file__, "--output", "o", "--column", "c"],
            "--column means nothing with the file",
            "set",
        ),
    ],
)
def test_options_of_others_are_refused(arguments: list[str], message: str, hint: str, run: Run, calls: Calls) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.out) == (1, "")
    first, *rest = ended.err.splitlines()
    assert first.startswith("unseen: error: ")
    assert message in first
    assert hint in "".join(rest)


def test_help_names_who_takes_an_option(run: Run) -> None:
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", run("embed", "--help").out).split())
    assert "three-party: host:port of parties 0, 1, 2" in said
    assert "two-party, ckks: The server's host:port." in said or "ckks, two-party: The server's host:port." in said


# a deployment of one's own


@dataclass(frozen=True)
class Toy(Deployment):
    """One role, which echoes."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "an echo"
    trust: ClassVar[str] = "none"
    takes: ClassVar[frozenset[str]] = frozenset()
    serves: ClassVar[str] = "echo"

    echo: str = option("127.0.0.1:50099", "The echo's host:port.", CONNECT)
    loudness: int = option(3, "How loud it is.", COMPILE, SERVE, CONNECT)

    def roles(self, *, token_table: bool = False) -> tuple[Role, ...]:
        everything = dict.fromkeys(ROWS, "all")
        return (Role("client", everything, ("echo",)), Role("echo", everything))

    def build(
        self,
        model: nn.Module,
        samples: Sequence[Mapping[str, Tensor]],
        options: CompileOptions,
        labels: Mapping[str, str],
        told: Told = silent,
    ) -> Any:
        return SimpleNamespace(program=EchoProgram(), client_tables={})

    def cost(self, model: Any) -> Cost:
        return Cost(1, ())

    def insecure(self, model: Any, tokenizer: TextTokenizer | None) -> Link:
        return EchoLink(self)


class EchoProgram:
    labels: Mapping[str, str] = {"length": "8"}
    digest = "echo"

    def clear_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Mapping[str, Any]:
        return inputs

    def encode(self, values: Mapping[str, Any], tables: Mapping[str, Tensor]) -> Mapping[str, Any]:
        return values

    def check_results(self, results: Sequence[Any]) -> None:
        """Every answer is one."""

    def decode(self, results: Sequence[Any]) -> dict[str, Tensor]:
        return {"out": results[0]}


class EchoLink(Link):
    deployment = Toy.name

    def __init__(self, toy: Toy) -> None:
        self.program, self.tables, self._toy = EchoProgram(), {}, toy
        self.tokenizer = TextTokenizer(word_tokenizer(), 0, lowercase=False)

    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Any], Report]:
        answer = values["attention_mask"].double() * self._toy.loudness
        return [answer], Report(1, (Traffic("client", "echo", 8, ONLINE),), 0.1, 0.0, 0.0, 0.0, number)

    def close(self) -> None:
        pass


class ToyHosted:
    deployment: type[Deployment] = Toy
    takes: Mapping[str, frozenset[str]] = {"echo": frozenset()}
    forked: frozenset[str] = frozenset()

    def connect(self, deployment: Deployment, options: ConnectOptions) -> Link:
        assert isinstance(deployment, Toy)
        return EchoLink(deployment)

    def prescribed(self, receipt: Receipt, programs: Mapping[str, bytes]) -> int:
        return receipt.answered

    def parts(
        self, role: str, held: Any, deployment: Deployment, peers: Mapping[str, str], options: HostOptions
    ) -> Parts:
        return Parts([lambda server: None], {}, about=[f"loudness {deployment.loudness}"])  # type: ignore[attr-defined]

    def shared(self, role: str, held: Any, options: HostOptions) -> Any:
        return held

    def owner(self, compiling: Sequence[str], directory: Path) -> Sequence[str]:
        return ()

    def tries(
        self, role: str, deployment: Deployment, network: Any, state: Path | None
    ) -> Mapping[str, Callable[[], str]]:
        return {}

    def command(self, role: str, compiling: Sequence[str], directory: Path, peers: Mapping[str, str]) -> Sequence[str]:
        return ("serve", *compiling, "--deployment", Toy.name)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry.register(Toy)
    deployments.host(ToyHosted())
    yield
    registry.unregister(Toy)
    deployments._HOSTED.pop(Toy.name)


def test_a_deployment_of_ones_own_needs_no_edit_elsewhere(toy: None, run: Run) -> None:
    """It has its options in every command, is asked by the one client, and options of others are refused."""
    ended = run("embed", "zqba zqbe", "--deployment", "toy", "--loudness", "7", "--json")
    assert ended.code == 0, ended.err
    assert '"embedding": [7.0, 7.0, 7.0, 7.0, 0.0, 0.0, 0.0, 0.0]' in ended.out
    told = run("embed", "zqba", "--deployment", "toy", "--echo", "127.0.0.1:7")
    assert "8 bytes" in told.out or "from client to echo" in told.out
    assert "who learnt what (none)" in told.out
    assert "--loudness means nothing under two-party" in run("embed", "x", "--loudness", "1").err
    assert "--keys means nothing under toy" in run("embed", "x", "--deployment", "toy", "--keys", "k").err
    assert "--gelu means nothing under toy" in run("serve", "--deployment", "toy", "--gelu", "puma").err
    assert "toy: How loud it is. 3 by default." in " ".join(run("serve", "--help").out.replace("│", " ").split())
    with secure.connect(Toy(loudness=2)) as session:
        assert session.embed(["zqba"])[0].tolist() == [2.0] * 3 + [0.0] * 5
    compiled = secure.compile(nn.Identity(), {"x": torch.zeros(1)}, deployment=Toy(loudness=9))
    with secure.serve(compiled, role="echo", listen=FREE) as service:
        assert service.about == ("loudness 9",)
    assert console.announced('{"listening": "a:1"}\n') == "a:1"


@pytest.mark.parametrize("arguments", [["--length", "16", "--length", "32"], ["--length=16", "--length", "16"]])
def test_an_option_of_one_value_is_given_once(run: Run, arguments: list[str]) -> None:
    ended = run("plan", "all-MiniLM-L6-v2", "--clients", "1", "--queries-per-day", "5", *arguments)
    assert (ended.code, ended.err) == (1, "unseen: error: --length is given twice\nhint: it takes one value\n")
    assert "is given twice" not in run("embed", "--", "--long", "--long").err  # texts

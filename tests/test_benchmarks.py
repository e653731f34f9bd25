"""The suite: its works are the peers', its tables say what the results hold, one small work runs as the large ones."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secure
from benchmarks import common, suite, table, three_party, without_mask, works
from benchmarks.peers import works as peers

OURS: dict[str, Any] = {
    "how": "made up",
    "elements": 393216,
    "online s": 0.25,
    "offline s": 0.25,
    "rounds": 4,
    "online bytes": 20_000_000,
    "offline bytes to server": 5_000_000,
    "max error": 1e-3,
    "peak MB": {"client": 1, "server": 2, "dealer": 3},
}
RESULTS: dict[str, Any] = {
    "machine": {"date": "2000-01-01", "processor": "abacus", "cores": 2, "simd": "beads", "command": "python"},
    "runs": 3,
    "versions": {"unseen": "0"},
    "ours": {
        "gelu 128x3072": {**OURS, "bars": {"max error": {"bar": 2e-3, "met": True}}},
        "product 128x768 by 768x768": OURS,
        "minilm 32": {**OURS, "cosine": 0.999},
        "bert-base 128": OURS,
        "polynomial-bert-base 128": OURS,
        "softmax 12x128x128": {"failed": "why"},
    },
    "peers": {
        "abacus": {
            "peer": "abacus",
            "version": "1",
            "parties": 2,
            "threads a party": 1,
            "work": {
                "gelu 128x3072": {"seconds": 5.0, "bytes": 10_000_000, "max_error": 0.5},
                "matmul 128x768 by 768x768": {"failed": "beads"},
            },
        }
    },
}


# names


def test_works_are_those_of_the_peers_and_more() -> None:
    assert set(works.WORKS) == {*peers.WORKS, *works.COUNTERPARTS, *works.OURS_ALONE}
    assert len(set(works.WORKS)) == len(works.WORKS)
    assert [works.counterpart(name) for name in peers.WORKS] == list(peers.WORKS)
    assert works.counterpart("product 128x768 by 768x768") == "matmul 128x768 by 768x768"
    assert works.counterpart("bert-base 128") is None
    assert {name.split()[0] for name in works.WORKS} == set(works.HOW)
    assert set(suite.BARS) <= set(works.WORKS)


# tables


def lines(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]


def test_tables_from_results() -> None:
    text = table.markdown(RESULTS)
    assert text.startswith("2000-01-01, abacus, 2 cores, beads;")
    assert "abacus: abacus 1, 2 parties, 1 thread(s) each" in text
    rows = lines(text)
    assert rows[0] == list(table.OURS)
    assert ["gelu 128x3072", "0.250", "0.250", "4", "20.0", "5.00", "1.0e-03", "1, 2, 3"] in rows
    assert ["softmax 12x128x128", "failed", *["-"] * 6] in rows
    assert next(row for row in rows if row[0] == "minilm 32")[6] == "1 - cos 1e-03"
    compared = rows[len(RESULTS["ours"]) + 3 :]
    # 5 s are 20 times our 0.25 s online and 10 times our 0.5 s in all; 10 MB are half of our 20
    theirs = ["5.000 (20x, 10x)", "10.0 (0.50x)", "5.0e-01"]
    assert ["gelu 128x3072", "0.250 (+ 0.250)", "20.0", *theirs] in compared
    assert ["product 128x768 by 768x768", "0.250 (+ 0.250)", "20.0", "failed", "-", "-"] in compared
    assert ["minilm 32", "0.250 (+ 0.250)", "20.0", "-", "-", "-"] in compared
    assert not {"bert-base 128", "softmax 12x128x128"} & {row[0] for row in compared}


def test_without_peers_there_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    alone = {**RESULTS, "peers": {}}
    assert [row[0] for row in lines(table.markdown(alone))].count("work") == 1
    table.show(alone)
    table.show(RESULTS)
    assert "20x, 10x" in capsys.readouterr().out


def test_what_failed_and_what_missed_its_bar_is_told() -> None:
    failed = ["unseen: softmax 12x128x128 failed", "abacus: matmul 128x768 by 768x768 failed"]
    assert suite.failures(RESULTS) == failed
    slow = copy.deepcopy(RESULTS)
    slow["ours"]["gelu 128x3072"]["bars"]["max error"] = {"bar": 1e-4, "met": False}
    assert suite.failures(slow) == [*failed, "unseen: gelu 128x3072: max error is 0.001, the bar is 0.0001"]


@pytest.mark.parametrize("entry", ["abacus=/tmp", "spu", "spu=/nowhere"])
def test_peers_are_checked_before_anything_runs(entry: str) -> None:
    with pytest.raises(SystemExit, match="hint: "):
        list(suite.parse_peers([entry]))


def test_modes_of_a_peer(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert [peer.name for peer in suite.parse_peers([f"spu={tmp_path}"])] == ["spu ABY3", "spu SEMI2K"]


# works


@pytest.mark.parametrize(
    "name",
    ["matmul 4x8 by 8x6", "product 4x8 by 8x6", "softmax 2x4x4", "layernorm 4x32", "compare 100", "multiply 100"],
)
def test_small_works_are_right_and_take_what_the_profile_says(name: str) -> None:
    job = works.make(name)
    compiled = job.build()
    with secure.insecure_in_process(compiled) as session:
        answer = session.query(job.inputs)
    torch.testing.assert_close(answer.double(), job.expected(), atol=4e-3, rtol=0)
    (report,) = session.reports
    assert (report.rounds, report.traffic) == (compiled.cost.rounds, compiled.cost.traffic)
    assert secure.profile(compiled).cost == compiled.cost


def test_a_decoder_is_the_same_for_peers_and_for_us() -> None:
    given = peers.gpt2(8, layers=2, width=48, heads=4, vocabulary=97)
    model = works.NextToken(works.gpt2_model(given)).double().eval()
    (expected,) = peers.decoder("gpt2 8", given).expected
    with torch.no_grad():
        assert model(torch.from_numpy(given.ids)[None]).flatten().tolist() == expected.tolist()
    compiled = secure.compile(works.NextToken(works.gpt2_model(given)).eval(), {"input_ids": torch.arange(8)[None]})
    with secure.insecure_in_process(compiled) as session:
        assert session.query({"input_ids": torch.from_numpy(given.ids)[None]}).flatten().tolist() == expected.tolist()


def test_nobody_knows_the_operand_of_an_operation() -> None:
    work, job = peers.make("gelu 4x8"), works.make("gelu 4x8")
    assert not np.isclose(job.inputs["x"].numpy(), work.arrays["x"]).any()


def test_comparisons_use_the_whole_ring_and_stay_within_the_bar() -> None:
    compiled, bar = works.make("compare 800").build(), suite.BARS["compare 393216"]["online bytes an element"]
    cost = compiled.program.cost
    (comparison,) = (i.protocol for i in compiled.program.circuit if i.protocol.kind == "compare")
    assert (comparison.operand_ring, getattr(comparison, "drop", None)) == (64, 0)
    assert (cost.to_first + cost.to_second) / 800 <= bar


@pytest.mark.slow
def test_one_small_work_through_three_processes() -> None:
    name = "gelu 4x8"
    row = suite.measure(name, runs=1)
    predicted = works.make(name).build().program.cost
    assert row["rounds"] == predicted.rounds
    assert row["online bytes to server"] == predicted.to_first
    assert row["online bytes to client"] == predicted.to_second
    assert row["offline bytes to server"] == predicted.dealt
    assert row["max error"] < 2e-3
    assert min(row["online s"], row["offline s"], *row["peak MB"].values()) > 0


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(common.ChildFailed, match="nonsense"):
        common.Service("benchmarks.hosting", "serve", "nonsense 4", "--dealer", "127.0.0.1:1", "--state", "/nowhere")


# linear layers without the mask


@pytest.mark.parametrize("name", without_mask.SETTINGS)
def test_products_with_encrypted_weights_are_exact(name: str) -> None:
    small = replace(without_mask.SETTINGS[name], degree=256)
    assert without_mask.measure(small, inputs=24, outputs=40, tokens=5)["right"]


def test_a_modulus_without_room_for_the_flooding_is_refused() -> None:
    narrow = without_mask.SETTINGS["narrow"]
    with pytest.raises(ValueError, match="take a larger modulus"):
        replace(narrow, hiding=61).flood(1536)
    assert narrow.flood(1536) + 2 <= narrow.modulus - narrow.ring


def test_results_of_other_works_of_three_parties_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(date: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        return {"machine": {"date": date}, "runs": 1, "ours": ours, "peer": theirs}

    monkeypatch.setattr(three_party, "RESULTS", tmp_path / "three_party.json")
    first = results("monday", {"a": {"rounds": 1}, "b": {"rounds": 2}}, {"a": {"s": 1}})
    assert three_party.kept(first) == first
    three_party.RESULTS.write_text(json.dumps(first))
    found = three_party.kept(results("friday", {"b": {"rounds": 3}}, {"b": {"s": 2}}))
    assert found["ours"] == {"a": {"date": "monday", "rounds": 1}, "b": {"rounds": 3}}
    assert (found["peer"], found["machine"]) == ({"a": {"s": 1}, "b": {"s": 2}}, {"date": "friday"})


def test_results_of_other_works_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(date: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        return {"machine": {"date": date}, "ours": ours, "peers": {"peer": {"version": date, "work": theirs}}}

    monkeypatch.setattr(suite, "RESULTS", tmp_path / "suite.json")
    first = results("monday", {"gelu 128x3072": {"rounds": 1}, "gpt2 32": {"rounds": 2}}, {"gelu 128x3072": {"s": 1}})
    assert suite.kept(first) == first
    suite.RESULTS.write_text(json.dumps(first))
    found = suite.kept(
        results("friday", {"gpt2 32": {"rounds": 3}, "gelu 128x3072": {"failed": "why"}}, {"gpt2 32": {"s": 2}})
    )
    assert found["ours"] == {"gelu 128x3072": {"date": "monday", "rounds": 1}, "gpt2 32": {"rounds": 3}}
    assert found["peers"] == {"peer": {"version": "friday", "work": {"gelu 128x3072": {"s": 1}, "gpt2 32": {"s": 2}}}}
    suite.RESULTS.write_text(json.dumps(found))
    alone = suite.kept({**results("sunday", {"gpt2 32": {"rounds": 3}}, {}), "peers": {}})  # ratios are of one run
    assert alone["peers"] == {"peer": {"version": "friday", "work": {"gelu 128x3072": {"s": 1}}}}

"""``unseen share-model``, ``party`` and what other commands do for three parties; four processes on real input."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from torch.nn.functional import cosine_similarity

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch

from parties.cli import demo
from tests.test_cli import COMMAND, NOBODY, ROOT, Run, in_words, run
from tests.three_parties import running, shared
from tests.tiny import LENGTH, TEXT, expected, sentences

__all__ = ["run"]  # the fixture

THREE = ("--deployment", "three-party")


@pytest.fixture(scope="module")
def shares(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(directory, tmp_path_factory.mktemp("shares"), "one-hot")


def test_sharing_asking_and_predicting(
    run: Run, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the profile predicts is what a query takes."""
    texts = tmp_path / "texts"
    texts.write_text("\n".join(sentences()))
    common = [str(directory), "--length", str(LENGTH)]
    made = run("share-model", *common, "--output", str(tmp_path / "shares"), "--calibration", str(texts))
    assert made.code == 0
    assert made.err.count("it holds secrets") == 3
    again = run("share-model", *common, "--output", str(tmp_path / "shares"))
    in_words(again, f"{tmp_path / 'shares' / 'party-0'} is already there", "give a new directory, or remove it")
    profiled = run("profile", *common, *THREE, "--json", "--no-time")
    assert profiled.code == 0
    predicted = json.loads(profiled.out)
    assert predicted["deployment"] == "three-party"
    with running(tmp_path / "shares") as three:
        addresses = ",".join(three.addresses)
        asked = run("embed", TEXT, *THREE, "--parties", addresses, "--json", "--no-cache")
        assert asked.code == 0, asked.err
        (row,) = json.loads(asked.out)
        assert cosine_similarity(torch.tensor(row["embedding"]), expected(directory, TEXT).float(), dim=0) > 0.9999
        told = run("embed", TEXT, *THREE, "--parties", addresses, "--compare-with", str(directory), "--no-cache")
        assert told.code == 0, told.err
        assert "no two parties may collude" in told.out
        assert float(re.search(r"plaintext model +([0-9.]+)", told.out)[1]) > 0.9999  # type: ignore[index]
    total = predicted["total"]
    assert row["rounds"] == total["rounds"]
    for link in total["traffic"]:
        (moved,) = (t["bytes"] for t in row["traffic"] if {**t, "bytes": 0} == {**link, "bytes": 0})
        assert abs(moved / link["bytes"] - 1) < 0.05  # calibrated on other sentences


def test_public_weights_are_cheaper(run: Run, directory: Path) -> None:
    common = ["profile", str(directory), "--length", str(LENGTH), *THREE, "--json", "--no-time"]
    ours, public = (json.loads(run(*common, *more).out)["total"]["traffic"] for more in ((), ("--public-weights",)))
    for phase in ("online", "offline"):
        held, known = (sum(t["bytes"] for t in links if t["phase"] == phase) for links in (ours, public))
        assert known < held


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["serve", *THREE], "nobody serves a whole model under three-party", "unseen share-model"),
        (["embed", TEXT, *THREE, "--trace", "x"], "--trace means nothing under three-party", "unseen profile"),
        (["embed", TEXT, *THREE, "--parties", "nowhere"], "parties: 1 addresses", ""),
        (["embed", TEXT, *THREE, "--parties", f"{NOBODY},{NOBODY}"], "party 0 at 127.0.0.1:1 cannot", "unseen party"),
        (["party", "--id", "0", "--share", "nowhere"], "no share of a model in nowhere", "unseen share-model"),
        (["profile", "--public-weights"], "--public-weights means nothing under two-party", "it takes none"),
    ],
)
def test_mistakes_in_words(arguments: list[str], message: str, hint: str, run: Run) -> None:
    in_words(run(*arguments), message, hint)


def test_mistakes_about_a_share(run: Run, shares: Path) -> None:
    share = str(shares / "party-1")
    in_words(run("party", "--id", "0", "--share", share), "is the share of party 1, not of party 0", "own directory")
    elsewhere = ["party", "--id", "1", "--share", share, "--listen", "0.0.0.0:0"]
    in_words(run(*elsewhere), "would not be encrypted", "--insecure")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo() -> None:
    """Owner, three parties and client, each a process, on all-MiniLM-L6-v2; tokens looked up in the shared table."""
    command = [*COMMAND, "demo", *THREE, "--length", "16"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=800, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    cosines = [float(x) for x in re.findall(r"plaintext model +([0-9.]+)", ended.stdout)]
    assert len(cosines) == len(demo.SENTENCES)
    assert min(cosines) > 0.9999

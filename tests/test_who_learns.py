"""The tables of who learns what: in the documents they are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from parties.reports.who_learns import columns, main, markdown, who_learns, written
from secure.deployments.deployment import ROWS, WEIGHTS, Deployment, deployments, variants
from secure.deployments.three_party import ThreeParty
from secure.errors import InvalidInput

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_have_the_tables_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == written(text), f"python -m parties.reports.who_learns {page.name}"


def test_every_deployment_has_its_table_in_security() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for deployment in deployments():
        assert f"<!-- who-learns:{deployment.name} -->" in text


@pytest.mark.parametrize("name", variants(Deployment))
def test_a_column_for_everybody_who_learns_something_else(name: str) -> None:
    deployment = variants(Deployment)[name]
    for table in (False, True):
        roles = deployment.roles(token_table=table)
        assert all(set(role.learns) == set(ROWS) for role in roles)
        found = columns(roles)
        assert ", ".join(found).split(", ") == [role.name for role in roles]
        assert len(who_learns(deployment, token_table=table).columns) == 1 + len(found)


@pytest.mark.parametrize("public", [False, True])
def test_clients_of_three_parties_learn_a_token_table_at_most(public: bool) -> None:
    for table, learnt in ((False, "nothing"), (True, "the token table")):
        client, *parties = ThreeParty(public_weights=public).roles(token_table=table)
        assert client.learns[WEIGHTS] == learnt
        assert {party.learns[WEIGHTS] for party in parties} == {"all" if public else "nothing"}


def test_tables_are_written_between_their_marks() -> None:
    two_party = next(iter(deployments()))()
    text = "before\n<!-- who-learns:two-party -->\nold\n<!-- /who-learns -->\nafter\n"
    new = written(text)
    assert new == f"before\n<!-- who-learns:two-party -->\n{markdown(two_party)}<!-- /who-learns -->\nafter\n"
    assert written(new) == new
    with pytest.raises(InvalidInput, match="unknown deployment 'moon'"):
        written(text.replace("two-party", "moon"))


def test_the_command_takes_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, marks = tmp_path / "page.md", "<!-- who-learns:two-party -->\n<!-- /who-learns -->\n"
    page.write_text(marks)

    def run(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr("sys.argv", ["who_learns", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            printed = capsys.readouterr()
            return end.code, printed.out + printed.err
        return None, ""

    for arguments in ((page, tmp_path / "nothing"), (page, tmp_path)):
        code, said = run(*arguments)
        assert code == 2
        assert f"{arguments[1]} is no file" in said
    assert run()[0] == run(page, "--other")[0] == 2
    code, said = run("--help")
    assert code == 0
    assert "FILE" in said
    assert page.read_text() == marks  # not one of these wrote anything
    assert run(page) == (None, "")
    assert page.read_text() == written(marks) != marks

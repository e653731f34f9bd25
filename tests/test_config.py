"""Settings: every option by command line, variable and file; precedence; mistakes named with what is known."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from parties.cli.config import known_settings, toml, variables
from tests.test_cli import Run, in_words, run
from tests.test_cli_options import FIRST, Calls, calls, commands, given, made_once

__all__ = ["calls", "made_once", "run"]  # the fixtures

pytestmark = pytest.mark.usefixtures("made_once")

EVERY = [(name, key) for name, command in commands().items() for key in known_settings(command)]


def needed(name: str, tmp_path: Path) -> tuple[dict[str, str], list[str]]:
    """The options and the arguments that a command needs anyway."""
    words = [word.replace("{tmp}", str(tmp_path)) for word in FIRST.get(name, [])]
    options, arguments = dict[str, str](), list[str]()
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            options[word] = words.pop(0)
        else:
            arguments.append(word)
    return options, arguments


def shown(run: Run, *arguments: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What --show-config prints: values by key, and sources by key."""
    ended = run(*arguments, "--show-config")
    assert ended.code == 0, ended.err
    (table,) = tomllib.loads(ended.out).values()
    said = [text.rpartition("  # ") for text in ended.out.splitlines() if " = " in text]
    return dict(table), {text.partition(" = ")[0]: source for text, _, source in said}


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_every_option_is_set_by_each_way(
    name: str, key: str, run: Run, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = commands()[name]
    known = known_settings(command)[key]
    (tried,) = (p for p in command.params if p.name == known.name)
    words = [word.replace("{tmp}", str(tmp_path)) for word in given(tried)]
    options, arguments = needed(name, tmp_path)
    options.pop(f"--{key}", None)
    typed = [word for pair in options.items() for word in pair]
    positional = [p.name for p in command.params if not p.opts[0].startswith("-") and p.nargs == 1]
    others = dict[str, str]()
    if known.name in positional:
        place = positional.index(known.name)
        others = {k: v for k, v in zip(positional, arguments, strict=False) if k != key}
        arguments = [*arguments[:place], *words, *arguments[place + 1 :]]
        values, sources = shown(run, name, *typed, *arguments)
    else:
        typed += arguments
        values, sources = shown(run, name, *typed, *words)
    value = values[key]
    assert value != tried.default
    assert sources[key] == "command line"

    def is_set(source: str, *before: str) -> None:
        values, sources = shown(run, *before, name, *typed)
        assert (values[key], sources[key]) == (value, source)

    for table in ("common", name):
        tables: dict[str, dict[str, Any]] = {name: {}, table: {}}
        tables[name] |= others
        one = table == "common" and isinstance(value, list) and len(value) == 1  # others may take one value alone
        tables[table][key] = value[0] if one else value
        file = tmp_path / f"{table}.toml"
        file.write_text(
            "\n".join(f"[{t}]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in s.items()) for t, s in tables.items())
        )
        is_set(f"{file} [{table}]", "--config", str(file))
    for k, v in others.items():
        monkeypatch.setenv(variables(name, k)[0], v)
    for variable in variables(name, key):
        with monkeypatch.context() as changed:
            changed.setenv(variable, " ".join(map(str, value)) if isinstance(value, list) else str(value))
            is_set(variable)
    assert calls.made == []  # nothing ran


def test_no_variable_means_two_things() -> None:
    meant: dict[str, tuple[str, str]] = {}
    for name, key in EVERY:
        own, common = variables(name, key)
        assert meant.setdefault(own, (name, key)) == (name, key)
        assert meant.setdefault(common, ("", key)) == ("", key)


def test_precedence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line, the command's variable, everybody's variable, the command's table, [common], the default."""
    file = tmp_path / "config" / "unseen" / "config.toml"
    file.parent.mkdir(parents=True)

    def threads(*more: str) -> tuple[int, str]:
        values, sources = shown(run, "dealer", *more)
        return values["threads"], sources["threads"]

    assert threads() == (1, "default")
    file.write_text("[common]\nthreads = 2\n")
    assert threads() == (2, f"{file} [common]")
    file.write_text("[common]\nthreads = 2\n[dealer]\nthreads = 3\n")
    assert threads() == (3, f"{file} [dealer]")
    monkeypatch.setenv("UNSEEN_THREADS", "4")
    assert threads() == (4, "UNSEEN_THREADS")
    monkeypatch.setenv("UNSEEN_DEALER_THREADS", "5")
    assert threads() == (5, "UNSEEN_DEALER_THREADS")
    assert threads("--threads", "6") == (6, "command line")


def test_settings_reach_the_command(run: Run, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "unseen.toml"
    file.write_text('[serve]\nlisten = "127.0.0.1:0"\nmodel = "digits"\n\n[dealer]\nlisten = "127.0.0.1:0"\n')
    monkeypatch.setenv("UNSEEN_CONFIG", str(file))
    monkeypatch.setenv("UNSEEN_DEADLINE", "7")
    assert run("serve").code == 0
    assert any("'127.0.0.1:0'" in made and "'deadline', 7.0" in made for made in calls.made)
    assert any(made.startswith("run[Compilation(") for made in calls.made)
    calls.made.clear()
    assert run("serve", "--show-config").code == 0
    assert calls.made == []


def test_quotas_are_a_table(run: Run, calls: Calls, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[quotas]\nqueries = 5\n[quotas."a/b"]\nbytes = 1000\n[dealer]\nthreads = 2\n')
    assert run("--config", str(file), "dealer").code == 0
    (served,) = (made for made in calls.made if made.startswith("serve"))
    assert "every=Quota(queries=5" in served
    assert "bytes=1000" in served
    shown = run("--config", str(file), "dealer", "--show-config").out
    assert tomllib.loads(shown)["quotas"] == {"queries": 5, "a/b": {"bytes": 1000}}
    assert "quotas" not in run("--config", str(file), "embed", "--show-config").out
    file.write_text("[quotas]\nquerys = 5\n")
    in_words(run("--config", str(file), "embed", "x"), "unknown setting 'querys'", "did you mean 'queries'")


def test_what_is_shown_can_be_a_file(run: Run, tmp_path: Path) -> None:
    first = run("compare", "--length", "8", "--length", "16", "--beside", 'a "b"', "--show-config").out
    file = tmp_path / "c.toml"
    file.write_text(first)
    assert shown(run, "--config", str(file), "compare")[0] == tomllib.loads(first)["compare"]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[serve]\nlisen = 1\n", r"c.toml \[serve\]: unknown setting 'lisen'", "did you mean 'listen'"),
        ("[common]\ndedline = 1\n", r"c.toml \[common\]: unknown setting 'dedline'", "did you mean 'deadline'"),
        ("[serv]\n", "c.toml: unknown table 'serv'", "did you mean 'serve'"),
        ("[zzz]\n", "c.toml: unknown table 'zzz'", "known: accuracy, "),
        ("listen = 1\n", "c.toml: listen stands in no table", "common"),
        ("[embed]\ntexts = ['secret']\n", "unknown setting 'texts'", ""),
        ("[serve]\nlength = 1\n", r"\[serve\]: length = 1: input should be greater than or equal to 3", "--help"),
        ("[serve]\nlength = '32'\n", r"\[serve\]: length = '32': input should be a valid integer", "--help"),
        ("[serve]\nlength = true\n", r"\[serve\]: length = True: input should be a valid integer", "--help"),
        ("[serve]\nlisten = 5\n", r"\[serve\]: listen = 5: input should be a valid string", "--help"),
        ("[serve]\ninsecure = 'no'\n", r"\[serve\]: insecure = 'no': input should be a valid boolean", "--help"),
        ("[serve]\ngelu = 'x'\n", r"\[serve\]: gelu = 'x': input should be ", "--help"),
        ("[party]\nid = 3\n", r"\[party\]: id = 3: input should be less than or equal to 2", "--help"),
        ("[common]\nthreads = -1\n", r"\[common\]: threads = -1: input should be greater than or equal to 0", ""),
        ("[serve]\nlisten = 'a\\u001b[31m'\n[", "is no TOML", "toml.io"),
        ("[serve\n", "is no TOML", "toml.io"),
    ],
)
def test_mistakes_in_the_file(text: str, message: str, hint: str, run: Run, calls: Calls, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    in_words(run("--config", str(file), "dealer"), message, hint)
    assert calls.made == []


def test_files_that_cannot_be_read(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_words(run("--config", "/no/file", "dealer"), "--config: /no/file cannot be read: No such file", "TOML")
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    in_words(run("--config", str(tmp_path / "large"), "dealer"), "more than 1048576 bytes", "TOML")
    (tmp_path / "bytes").write_bytes(b"\xff")
    in_words(run("--config", str(tmp_path / "bytes"), "dealer"), "is no TOML", "")
    (tmp_path / "deep").write_text("a = " + "[" * 100_000)
    in_words(run("--config", str(tmp_path / "deep"), "dealer"), "is no TOML", "")
    monkeypatch.setenv("UNSEEN_CONFIG", "/no/other")
    in_words(run("dealer"), "UNSEEN_CONFIG: /no/other cannot be read", "TOML")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("UNSEEN_DEALER_THREADS", "x", "UNSEEN_DEALER_THREADS = 'x': input should be a valid integer"),
        ("UNSEEN_THREADS", "-1", "UNSEEN_THREADS = '-1': input should be greater than or equal to 0"),
        ("UNSEEN_INSECURE", "maybe", "UNSEEN_INSECURE = 'maybe': input should be a valid boolean"),
    ],
)
def test_mistakes_in_variables(
    variable: str, value: str, message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    in_words(run("dealer"), message, "--help")


def test_a_home_directory_in_the_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text("[serve]\nstate = '~/state'\n")
    assert shown(run, "--config", str(tmp_path / "c.toml"), "serve")[0]["state"] == str(tmp_path / "state")

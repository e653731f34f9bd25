"""Settings of the commands: a TOML file and environment variables beside the command line, one mechanism for all.

The file has a table for each command, named after it, with its options under their names on the command line; the table
``common`` holds options of every command that takes them. An option has two variables: ``UNSEEN_SERVE_LISTEN`` for one
command, ``UNSEEN_LISTEN`` for all. The command line comes before variables, these before the file, the file before
defaults; what is said for one command comes before what is said for all. The names, types and bounds are those of the
commands' own parameters: nothing here lists them again. Values mean what they mean on the command line. Texts to be
embedded are no settings: arguments that take several values stay on the command line.
"""

from __future__ import annotations

import inspect
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import Field, TypeAdapter, ValidationError

from parties.cli.console import write
from parties.limits.quotas import Limits
from parties.net.directories import user_directory
from secure.errors import InvalidInput, printable

COMMON, PREFIX = "common", "UNSEEN"
MAXIMUM_BYTES = 1 << 20  # of a file of settings
COMMAND_LINE, DEFAULT = "command line", "default"
NO_SETTING = ("help", "show_config")
TABLES: Mapping[str, Callable[[Mapping[str, Any], str], Any]] = {"quotas": Limits.read}
"""The tables of the file that are no command's, and how they are read: a command's parameter of that name takes one."""

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A TOML file of settings; $UNSEEN_CONFIG or ~/.config/unseen/config.toml by default.",
    ),
]


@dataclass(frozen=True)
class Setting:
    """A value and the place that it came from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Known:
    """A parameter of a command that can be set. key: its name in the file; kind: the type of its value."""

    name: str
    key: str
    kind: Any
    secret: bool

    def from_file(self, value: Any) -> Any:
        """Check a value of a TOML file, strictly by its type. Raises ValidationError."""
        listed = [value] if self._is_list and not isinstance(value, list) else value
        found = TypeAdapter(self.kind).validate_json(json.dumps(listed, default=str), strict=True)
        return _plain(found.expanduser() if isinstance(found, Path) else found)

    def from_text(self, text: str) -> Any:
        """Read the text of a variable; several values stand between spaces. Raises ValidationError."""
        return _plain(TypeAdapter(self.kind).validate_python(text.split() if self._is_list else text))

    @property
    def _is_list(self) -> bool:
        return get_origin(self.kind) is list


def _plain(value: Any) -> Any:
    """Return a value as the command line has it: a choice is its text."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value


def known_settings(command: Any) -> dict[str, Known]:
    """Return what can be set of a command of typer, by key: options, and arguments of one value."""
    hints = {p.name: p.annotation for p in inspect.signature(command.callback, eval_str=True).parameters.values()}
    out = {}
    for parameter in command.params:
        if parameter.nargs == 1 and parameter.name in hints and parameter.name not in NO_SETTING:
            longest = max(parameter.opts, key=len)
            key = longest.lstrip("-") if longest.startswith("-") else parameter.name
            kind, secret = _kind(hints[parameter.name])
            out[key] = Known(parameter.name, key, kind, secret)
    return out


def _kind(hint: Any) -> tuple[Any, bool]:
    """Return the type of a parameter's value with the bounds that typer has, and whether it must not be shown."""
    kind, *said = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    bounds = {
        limit: getattr(each, name)
        for each in said
        for name, limit in (("min", "ge"), ("max", "le"))
        if getattr(each, name, None) is not None
    }
    secret = any(getattr(each, "hide_input", False) for each in said)
    if not bounds:
        return kind, secret
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return list[Annotated[inner, Field(**bounds)]], secret  # type: ignore[valid-type]
    return Annotated[kind, Field(**bounds)], secret


# the file


def default_file() -> Path | None:
    """Return ``$XDG_CONFIG_HOME/unseen/config.toml`` or ``~/.config/unseen/config.toml``; None without a home."""
    try:
        return user_directory("XDG_CONFIG_HOME", ".config") / "unseen" / "config.toml"
    except InvalidInput:
        return None


def read_file(named: Path | None) -> tuple[Path | None, Mapping[str, Any]]:
    """Read the file that was named, by the option or by UNSEEN_CONFIG, else the user's own if there is one.

    Raises InvalidInput if it cannot be read or is no TOML.
    """
    asked = named or (Path(given) if (given := os.environ.get(f"{PREFIX}_CONFIG")) else None)
    path = asked or default_file()
    if path is None or (asked is None and not path.exists()):
        return None, {}
    what = "--config" if named else f"{PREFIX}_CONFIG" if asked else "settings"
    try:
        with path.open("rb") as file:
            text = file.read(MAXIMUM_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{what}: {path} cannot be read: {error.strerror}", "give a TOML file") from None
    if len(text) > MAXIMUM_BYTES:
        raise InvalidInput(f"{what}: {path} has more than {MAXIMUM_BYTES} bytes", "give a TOML file of settings")
    try:
        return path, tomllib.loads(text.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{what}: {path} is no TOML: {printable(str(error))}", "see https://toml.io") from None


@dataclass(frozen=True)
class CommandSettings:
    """A file of settings, checked as a whole, and the environment. commands: those of typer, by name.

    Raises InvalidInput for a table or a key that is not known, naming the nearest that is, and for values of a wrong
    type or out of bounds, naming file, key, value and bound.
    """

    path: Path | None
    tables: Mapping[str, Any]
    commands: Mapping[str, Any]

    def __post_init__(self) -> None:
        for table, content in self.tables.items():
            if not isinstance(content, dict):
                raise InvalidInput(
                    f"{self.path}: {printable(table)} stands in no table",
                    f"put it under [{COMMON}] or a command's name",
                )
            if table in TABLES:
                self.table(table)
            elif table == COMMON:
                for key in content:
                    takers = [known for known in map(known_settings, self.commands.values()) if key in known]
                    if not takers:
                        raise not_known(
                            key, {k for c in self.commands.values() for k in known_settings(c)}, self._in(table)
                        )
                    for known in takers:
                        self._checked(known[key], content[key], table)
            elif table in self.commands:
                known = known_settings(self.commands[table])
                for key in content:
                    if key not in known:
                        raise not_known(key, known, self._in(table))
                    self._checked(known[key], content[key], table)
            else:
                raise not_known(table, {*self.commands, *TABLES, COMMON}, str(self.path), of="table")

    def of(self, verb: str) -> dict[str, Setting]:
        """Return what is set for a command, by the names of its parameters, each with its source."""
        return {known.name: found for known in self.known(verb).values() if (found := self._found(verb, known))}

    def known(self, verb: str) -> dict[str, Known]:
        """Return what can be set of a command, by key."""
        return known_settings(self.commands[verb])

    def table(self, name: str) -> Any:
        """Return one of TABLES as it is read; if the file has none, what an empty one gives."""
        return TABLES[name](self.tables.get(name, {}), str(self.path))

    def _found(self, verb: str, known: Known) -> Setting | None:
        for variable in variables(verb, known.key):
            if text := os.environ.get(variable):
                try:
                    return Setting(known.from_text(text), variable)
                except ValidationError as error:
                    raise unusable(variable, text, error, secret=known.secret) from None
        for table in (verb, COMMON):
            if known.key in self.tables.get(table, {}):
                return Setting(self._checked(known, self.tables[table][known.key], table), self._in(table))
        return None

    def _checked(self, known: Known, value: Any, table: str) -> Any:
        try:
            return known.from_file(value)
        except ValidationError as error:
            raise unusable(f"{self._in(table)}: {known.key}", value, error, secret=known.secret) from None

    def _in(self, table: str) -> str:
        return f"{self.path} [{table}]"


def variables(verb: str, key: str) -> tuple[str, str]:
    """Return the environment variables of an option: for its command, then for all."""
    return tuple("_".join(parts).upper().replace("-", "_") for parts in ((PREFIX, verb, key), (PREFIX, key)))  # type: ignore[return-value]


def not_known(name: str, known: Mapping[str, Any] | set[str], where: str, of: str = "setting") -> InvalidInput:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return InvalidInput(f"{where}: unknown {of} {printable(name)!r}", hint)


def unusable(where: str, value: Any, error: ValidationError, *, secret: bool) -> InvalidInput:
    said = error.errors(include_url=False, include_context=False)[0]["msg"]
    shown = "(not shown)" if secret else repr(value) if not isinstance(value, str) else repr(printable(value))
    return InvalidInput(f"{where} = {shown}: {said[0].lower()}{said[1:]}", "see the command's --help for what it takes")


# what a command is started with


def configured(context: typer.Context, settings: CommandSettings) -> None:
    """Let the command that is invoked take its settings, and keep them for it."""
    context.obj = settings
    if context.invoked_subcommand:
        found = settings.of(context.invoked_subcommand)
        context.default_map = {context.invoked_subcommand: {name: each.value for name, each in found.items()}}


def settings_of(context: typer.Context) -> CommandSettings:
    """Return the settings that ``configured`` kept."""
    found = context.obj
    assert isinstance(found, CommandSettings)
    return found


def is_said(context: typer.Context, parameter: str) -> bool:
    """Tell whether a parameter was set: on the command line, by a variable or in the file."""
    found = context.get_parameter_source(parameter)
    return found is not None and found.name != "DEFAULT"


def can_show(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it: with ``--show-config``, which prints its settings instead of running it.

    A parameter named after one of TABLES is no option, and gets that table; one of the type typer.Context gets that.
    typer reads the signature.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    tables = [name for name in parameters if name in TABLES]
    contexts = [name for name, p in parameters.items() if p.annotation is typer.Context]
    rest = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in parameters.values()
        if p.name not in (*tables, *contexts)
    ]
    added = [
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        inspect.Parameter("show_config", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_SHOW),
    ]

    def run(context: typer.Context, show_config: bool, **given: Any) -> None:
        if show_config:
            write("\n".join(shown(context, tables)) + "\n")
        else:
            given |= {name: settings_of(context).table(name) for name in tables} | dict.fromkeys(contexts, context)
            command(**given)

    run.__signature__ = inspect.Signature([*rest, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*rest, *added]}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


_SHOW = Annotated[
    bool, typer.Option("--show-config", help="Print each option, its value and where it was set, as TOML; do no more.")
]


def shown(context: typer.Context, tables: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a TOML table of a command's options, each with its source; what is not set is a comment."""
    settings, verb = settings_of(context), str(context.info_name)
    found = settings.of(verb)
    yield f"[{verb}]"
    for key, known in settings.known(verb).items():
        value = _plain(context.params.get(known.name))
        said = context.get_parameter_source(known.name)
        typed = getattr(said, "name", "") == "COMMANDLINE"
        source = COMMAND_LINE if typed else found[known.name].source if known.name in found else DEFAULT
        if value is None or value in ((), []):
            yield f"# {key} is not set"
        else:
            yield f"{key} = {'(not shown)' if known.secret else toml(value)}  # {source}"
    for name in tables:
        yield from _table(name, settings.tables.get(name, {}), str(settings.path))


def _table(name: str, content: Mapping[str, Any], source: str) -> Iterator[str]:
    """Yield a table of the file as it stands there, and the tables in it; nothing of an empty one."""
    values = {key: value for key, value in content.items() if not isinstance(value, dict)}
    if values:
        yield f"[{name}]"
        yield from (f"{key} = {toml(value)}  # {source}" for key, value in values.items())
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _table(f"{name}.{json.dumps(key)}", value, source)


def toml(value: Any) -> str:
    """Write a value of a setting as TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else json.dumps(str(_plain(value)), ensure_ascii=False)

"""The process that renders one chat template: it is started by ``chat.rendered``, and imports nothing of this project.

It reads a JSON object from standard input and writes one: {"text"}, or {"said"}, what the template said was wrong.
Before it runs the template it bounds its own memory, processor time and files. It fails without a word otherwise.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

MEMORY = 1 << 29  # bytes of address space, of which the interpreter and Jinja take a tenth


def main() -> int:
    given = json.loads(sys.stdin.buffer.read())
    sys.path[:0] = given["packages"]
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Unmarked(Extension):
        """{% generation %} ... {% endgeneration %}, which marks answers for training, and changes no text."""

        tags = {"generation"}  # noqa: RUF012 - as in Jinja's base class

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Refused(TemplateError):
        pass

    def refuse(message: object) -> None:
        refused = Refused(str(message))
        raise refused

    def in_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **other: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=bool(other.get("sort_keys")))

    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, int(given["seconds"]) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Unmarked, loopcontrols]
    )
    environment.filters["tojson"] = in_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    size, parts = 0, list[str]()
    try:
        for part in environment.from_string(given["template"]).generate(**given["variables"]):
            size += len(part)
            if size > given["most"]:
                return 1
            parts.append(part)
        found = {"text": "".join(parts)}
    except Refused as error:
        found = {"said": str(error)[:1000]}
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        sys.exit(1)

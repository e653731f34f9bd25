"""Chat templates: from messages to the text that a model continues.

A template is a program in Jinja, which a server chooses and a client runs. transformers runs it in Jinja's sandbox,
which keeps it from the interpreter and from files, but not from endless loops and gigabytes. So it runs in a process of
its own, in the same sandbox, which is ended after SECONDS, and whose memory, files and output are bounded by the
operating system and by reading no more than MAXIMUM_TEXT. What is not bounded: how long a template takes, up to
SECONDS, may depend on the messages. A session therefore waits for its pace, and doubles that if it is exceeded, so that
a server could learn one of some six values in this way, and nothing else.

The process is started anew for each conversation, gets messages by its standard input, and has no environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secure.errors import InvalidInput, MissingPackage, printable
from secure.models.settings import WritingSettings

SECONDS = 5.0
"""The most seconds that a template may take, the start of its process among them, which takes a tenth of one."""

MAXIMUM_TEXT = 1 << 20
"""The most characters of messages together, and bytes of what a template makes of them."""

MAXIMUM_MESSAGES = 1 << 10
ROLE, CONTENT = "role", "content"
_RENDERING = Path(__file__).with_name("chat_process.py")


def check_messages(messages: object) -> list[dict[str, str]]:
    """Return chat messages as they were given. Raises InvalidInput unless each is {"role": text, "content": text}."""
    hint = 'a list such as [{"role": "user", "content": "Hello"}]'
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidInput(f"messages are a {type(messages).__name__}", hint)
    if not 0 < len(messages) <= MAXIMUM_MESSAGES:
        raise InvalidInput(f"{len(messages)} messages", f"1 to {MAXIMUM_MESSAGES}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.keys() != {ROLE, CONTENT}:
            raise InvalidInput(f"message {number} has not the keys role and content alone", hint)
        if not all(isinstance(text, str) for text in message.values()):
            raise InvalidInput(f"the role or content of message {number} is no text", hint)
    return [dict(message) for message in messages]


def rendered(settings: WritingSettings, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the text that a model's template makes of messages, up to where the model's answer begins.

    Raises InvalidInput for a model without a template, for messages of more than MAXIMUM_TEXT characters, and where the
    template fails, takes too long or makes too much; MissingPackage without Jinja.
    """
    if not settings.template:
        raise InvalidInput("this model has no chat template", "give the prompt as a text")
    if sum(len(message[CONTENT]) + len(message[ROLE]) for message in messages) > MAXIMUM_TEXT:
        raise InvalidInput("the messages are too long", f"{MAXIMUM_TEXT} characters together")
    if (jinja := find_spec("jinja2")) is None:
        raise MissingPackage("jinja2 is not installed\nhint: pip install jinja2")
    parts = [found.origin for found in (jinja, find_spec("markupsafe")) if found and found.origin]
    given = {
        "template": settings.template,
        "most": MAXIMUM_TEXT,
        "seconds": SECONDS,
        "packages": [str(Path(part).parent.parent) for part in parts],
        "variables": {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "bos_token": settings.bos,
            "eos_token": settings.eos,
        },
    }
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", str(_RENDERING)],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=SECONDS,
            env={},
            cwd="/",
            check=False,
        )
        found: Any = json.loads(ended.stdout) if ended.returncode == 0 else {}
    except subprocess.TimeoutExpired:
        raise InvalidInput(f"the chat template takes longer than {SECONDS:g} s", _HINT) from None
    except ValueError:
        found = {}
    if isinstance(found.get("said"), str):  # by raise_exception
        raise InvalidInput(f"the chat template refuses these messages: {printable(found['said'])[:200]}", _HINT)
    if not isinstance(found.get("text"), str):
        raise InvalidInput("the chat template fails on these messages", _HINT)
    return str(found["text"])


_HINT = "ask the server's owner, or give the prompt as a text"

"""Prompts: texts that a client puts before its own, as sentence-transformers does with those of a model's directory.

They travel as labels of a Program, whose digest covers them: one for each prompt, and one that names the default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secure.errors import InvalidInput, printable
from secure.models.checkpoints import Hear, unheard
from secure.models.tokens import read_json

PROMPT = "prompt"  # the label that names the default; "prompt:NAME" is the label of the prompt NAME
MAXIMUM_NAME, MAXIMUM_TEXT, MAXIMUM_PROMPTS = 64, 500, 32  # characters, as written in JSON; a Program has 64 labels


@dataclass(frozen=True)
class Prompts:
    """A model's prompts by name, and the name of the one that is used where a client names none; "" for none."""

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str = ""

    def __bool__(self) -> bool:
        return any(self.texts.values())

    def text(self, name: str | None) -> str:
        """Return the prompt of a name; None stands for the default, and "" for no prompt. Raises InvalidInput."""
        chosen = self.default if name is None else name
        if not chosen:
            return ""
        if chosen not in self.texts:
            known = ", ".join(map(printable, self.texts)) or "the model has no prompts"
            raise InvalidInput(f"no prompt is called {printable(chosen)[:80]!r}", known)
        return self.texts[chosen]

    def labels(self) -> dict[str, str]:
        """Return the labels of a Program that hold these prompts."""
        found = {f"{PROMPT}:{name}": json.dumps(text) for name, text in self.texts.items()}
        return {**found, **({PROMPT: self.default} if self.default else {})}

    def lines(self) -> list[str]:
        """Say what the prompts are, for people."""
        if not self:
            return []
        said = ", ".join(f"{printable(name)} ({printable(json.dumps(text))})" for name, text in self.texts.items())
        return [f"prompts: {said}; by default {printable(self.default) or 'none'}"]


def prompts_from(labels: Mapping[str, str]) -> Prompts:
    """Return the prompts in a Program's labels. Raises InvalidInput for labels that are none."""
    texts = dict[str, str]()
    for label, value in labels.items():
        kind, colon, name = label.partition(":")
        if kind != PROMPT or not colon:
            continue
        try:
            text = json.loads(value)
        except (ValueError, RecursionError):
            text = None
        if not isinstance(text, str) or len(value) > MAXIMUM_TEXT + 2:
            raise InvalidInput(f"the server's prompt {printable(name)[:80]!r} is no text", "ask the server's owner")
        texts[name] = text
    default = labels.get(PROMPT, "")
    if default and default not in texts:
        raise InvalidInput(f"the server's default prompt {printable(default)[:80]!r} is none", "ask the server's owner")
    return Prompts(texts, default)


def read_prompts(directory: Path, told: Hear = unheard) -> Prompts:
    """Read the prompts of ``config_sentence_transformers.json``; none if there are none.

    Empty ones that nobody would miss are left out, and so are those that no label holds, which ``told`` hears. Raises
    InvalidInput for other things than texts, and for a default that is not there or that no label holds.
    """
    path = directory / "config_sentence_transformers.json"
    settings = read_json(path)
    given, default = settings.get("prompts") or {}, settings.get("default_prompt_name") or ""
    if not isinstance(given, dict) or not isinstance(default, str):
        raise InvalidInput(f"{path} has prompts that are no texts by name", "see sentence-transformers for their form")
    texts = {str(name): "" if text is None else text for name, text in given.items()}
    if wrong := next((name for name, text in texts.items() if not isinstance(text, str)), None):
        raise InvalidInput(f"{path} has the prompt {printable(wrong)[:80]!r}, which is no text", "give a text")
    if default and default not in texts:
        raise InvalidInput(f"{path} names the default prompt {printable(default)[:80]!r}, which is not there", "add it")
    fits = {name: text for name, text in texts.items() if _fits(name, text)}
    fits = dict(sorted(fits.items(), key=lambda entry: entry[0] != default)[:MAXIMUM_PROMPTS])
    if default and default not in fits:
        raise InvalidInput(
            f"{path} has a default prompt of {len(texts[default])} characters", f"at most {MAXIMUM_TEXT}, in JSON"
        )
    if not any(fits.values()):
        return Prompts()
    if left := [name for name in texts if name not in fits]:
        told(f"prompts left out, as they are too long or too many: {', '.join(map(printable, left))[:200]}")
    return Prompts(fits, default)


def _fits(name: str, text: str) -> bool:
    return 0 < len(name) <= MAXIMUM_NAME and name.isprintable() and len(json.dumps(text)) <= MAXIMUM_TEXT + 2

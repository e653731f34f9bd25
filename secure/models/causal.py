"""Models that write text, as transformers saves them: the model, its tokenizer, its chat template, where texts end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secure.errors import InvalidInput, printable
from secure.models.chat import CONTENT, ROLE, rendered
from secure.models.checkpoints import Hear, load_checkpoint, quiet_transformers, unheard
from secure.models.decoder import vocabulary
from secure.models.detokenizer import Detokenizer
from secure.models.served_tokenizer import load_tokenizers
from secure.models.settings import MAXIMUM_TEMPLATE, TOKEN, TaskSettings, WritingSettings
from secure.models.text import model_directory
from secure.models.tokens import TextTokenizer
from secure.polynomial.swap import restore

CONVERSATIONS = (
    (("user", "Who wrote it?"),),
    (("system", "You answer in one word."), ("user", "Who wrote it?"), ("assistant", "Ada."), ("user", "When?")),
)
"""Messages on which a template is compared with transformers, as pairs of role and content."""


@dataclass(frozen=True, eq=False, repr=False)
class CausalModel:
    """A loaded model that writes text. settings: what its clients need. about: lines for its owner."""

    name: str
    module: nn.Module
    tokenizer: TextTokenizer
    tokenizer_json: bytes
    settings: TaskSettings
    about: tuple[str, ...] = ()


def load_causal(model: str) -> CausalModel:
    """Load a causal language model and its tokenizer from a directory.

    Raises ModelNotFound, MissingPackage, and InvalidInput for a model, a tokenizer or a chat template that cannot be
    served as it is.
    """
    directory, about = model_directory(model), list[str]()
    module = load_language_model(directory, about.append)
    tokenizer, document, original = load_tokenizers(directory, vocabulary(module))
    Detokenizer(tokenizer)  # raises for one that makes no text
    template = _template(original)
    writing = WritingSettings(
        ends_of(module, original.eos_token_id),
        template,
        *(str(token or "") for token in (original.bos_token, original.eos_token)),
    )
    if template:
        _check_template(writing, original)
        about.append("clients get its chat template")
    settings = TaskSettings(TOKEN, writing=writing)
    _ = settings.encoded  # which clients would refuse
    return CausalModel(directory.name, module, tokenizer, document, settings, tuple(about))


def load_language_model(directory: Path, told: Hear = unheard) -> nn.Module:
    """Load a causal language model, in polynomial form if there is a recipe beside its weights.

    Raises as ``load_checkpoint``, and for a recipe of another model.
    """
    return restore(load_checkpoint(directory, "AutoModelForCausalLM", told=told), directory)


def ends_of(model: nn.Module, *more: int | None) -> tuple[int, ...]:
    """Return the tokens that end a text of a model: those of its settings for writing and of its configuration."""
    found, known = {*more}, vocabulary(model)
    for place in ("generation_config", "config"):
        said: Any = getattr(getattr(model, place, None), "eos_token_id", None)
        found |= {*said} if isinstance(said, Iterable) else {said}
    return tuple(sorted(id for id in found if isinstance(id, int) and 0 <= id < known))


def _template(original: Any) -> str:
    """Return the chat template of a tokenizer; "" if it has none. Of several by name, it is the default one."""
    found = getattr(original, "chat_template", None)
    if isinstance(found, Mapping):
        found = found.get("default")
    if found is not None and len(str(found)) > MAXIMUM_TEMPLATE:
        raise InvalidInput(f"the chat template has {len(str(found))} characters", f"{MAXIMUM_TEMPLATE} at most")
    return str(found or "")


def _check_template(writing: WritingSettings, original: Any) -> None:
    """Refuse a template that makes another text at clients than in transformers."""
    for conversation in CONVERSATIONS:
        messages, reason = [{ROLE: role, CONTENT: content} for role, content in conversation], ""
        with quiet_transformers():
            try:
                theirs = original.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # the template's own, and those of Jinja
                theirs, reason = None, printable(str(error))[:200]
        try:
            ours = rendered(writing, messages)
        except InvalidInput as error:
            if theirs is None:
                continue  # both refuse, such as messages of the system
            raise InvalidInput(f"clients do not run the chat template: {error}") from None
        if ours != theirs:
            said = "other text" if theirs is not None else f"text where that refuses ({reason})"
            raise InvalidInput(
                f"the chat template makes {said} at clients than in transformers", "take what it does not need out"
            )

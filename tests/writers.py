"""Tiny models that write text, their tokenizers, and a link that says what a script says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from secure.cost.traffic import ONLINE, Traffic
from secure.errors import InvalidInput, OutOfRange
from secure.lowering.client_inputs import GENERATE, MOST_ROWS, SETTINGS, TASK
from secure.models.decoder import DRAFT_LENGTH, STEPWISE
from secure.models.settings import TOKEN, TaskSettings, WritingSettings
from secure.models.tokenizer_document import read_tokenizer
from secure.models.tokens import TextTokenizer
from secure.session.link import Link, Offer, Report
from secure.session.session import Session

END, BEGIN = "<|end|>", "<|begin|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WORDS = (
    "once upon a time there was",
    "the cat sat on the mat",
    "naïve café in Zürich 🙂🙃",
    "한국어 문장",
    " and then",
)


@cache
def made_tokenizer(kind: str) -> Any:
    """A tokenizer of the library: "bytes", of byte pairs as GPT-2's; "pieces", as sentencepiece makes them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=[BEGIN, END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
        )
        tokenizer.train_from_iterator(WORDS, trainer)
        return tokenizer
    vocab = {"<unk>": 0, BEGIN: 1, END: 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = list[tuple[str, str]]()
    for letter in "▁abcdefghijklmnopqrstuvwxyz.é":
        vocab[letter] = len(vocab)
    for pair in (("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("n", "d"), ("▁a", "nd")):
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (BEGIN, END)])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return tokenizer


def tokenizer_of(kind: str) -> TextTokenizer:
    """The same as clients read it."""
    return TextTokenizer(read_tokenizer(made_tokenizer(kind).to_str().encode())[0], 0)


def write_writer(directory: Path, kind: str = "bytes", template: str = TEMPLATE, scale: float = 5.0) -> Path:
    """Write a LLaMA of one layer with random weights and its tokenizer, as ``save_pretrained`` does."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made_tokenizer(kind),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(directory)
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.save_pretrained(directory)
    return directory


class _Program:
    """A Program that passes its inputs on. refuses: tokens on which its client's graph fails."""

    publishes, rows = True, 40

    def __init__(self, length: int, labels: Mapping[str, str], refuses: frozenset[int]) -> None:
        self.labels = {**labels, "length": str(length)}
        self.digest, self.refuses = f"digest {length}", refuses
        self.output_shapes = {"token": (1, 1)}
        self.rows -= length - 1 if length == int(labels.get(DRAFT_LENGTH, 0)) else 0

    def clear_values(self, inputs: Mapping[str, Any], tables: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.refuses & {*inputs["input_ids"].flatten().tolist()}:
            raise InvalidInput("the graph fails")
        return inputs

    def encode(self, values: Mapping[str, Any], tables: Mapping[str, Any]) -> Mapping[str, Any]:
        return values

    def decode(self, results: Sequence[Any]) -> dict[str, Any]:
        if STEPWISE in self.labels:  # the client chooses by scores
            return {"output": torch.nn.functional.one_hot(results[0], int(self.labels["vocabulary"])).double()}
        return {"token": results[0]}

    def check_results(self, results: Sequence[Any]) -> None:
        if isinstance(results[0], Exception):
            raise results[0]


class ScriptLink(Link):
    """A link whose answers are the tokens of a script, or of a pass a list of them, or what it returns for the inputs.

    An exception in it is raised, but for OutOfRange, which is the result. asked: inputs of each query.
    """

    deployment = "script"

    def __init__(self, program: Any, tokenizer: TextTokenizer | None, state: Any) -> None:
        self.program, self.tables, self.tokenizer, self._state = program, {}, tokenizer, state

    def converse(self, capacity: int) -> Any:
        return None

    def go_on(
        self, conversation: Any, values: Mapping[str, Any], number: int, **_: Any
    ) -> tuple[Sequence[Any], Report]:
        self._state.asked.append({name: value.clone() for name, value in values.items()})
        script = self._state.script
        token = script(values) if callable(script) else script[len(self._state.asked) - 1] if script else 0
        if isinstance(token, BaseException) and not isinstance(token, OutOfRange):
            raise token
        result = (
            token if isinstance(token, OutOfRange) else torch.tensor([token if isinstance(token, list) else [token]])
        )
        return [result], Report(1, (Traffic("a", "b", 1, ONLINE),), 0.1, 0.0, 0.0, 0.0, number)

    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Any], Report]:
        raise AssertionError("a text is written by conversations")

    def close(self) -> None:
        pass


def scripted(
    script: Sequence[int | list[int] | BaseException] | Callable[[Mapping[str, Any]], list[int]],
    tokenizer: TextTokenizer | None = None,
    *,
    template: str = TEMPLATE,
    ends: Sequence[int] = (),
    lengths: Sequence[int] = (16, 8),
    refuses: Sequence[int] = (),
    pace: float = 0.0,
    capacity: int = 40,
    draft_length: int = 0,
    stepwise: bool = False,
) -> tuple[Session, list[Mapping[str, Any]]]:
    """A session whose model says what the script says, and the inputs of the queries that it was asked.

    stepwise: prompts are read token by token.
    """
    lengths = () if stepwise else lengths
    vocabulary = tokenizer.tokenizer.get_vocab_size() if tokenizer else 60
    settings = TaskSettings(TOKEN, writing=WritingSettings(tuple(ends), template, BEGIN, END))
    labels = {TASK: GENERATE, SETTINGS: settings.encoded, MOST_ROWS: str(capacity), "vocabulary": str(vocabulary)}
    labels |= {DRAFT_LENGTH: str(draft_length)} if draft_length else {}
    labels |= {STEPWISE: "scores"} if stepwise else {}
    state = SimpleNamespace(script=script if callable(script) else list(script), asked=[])
    links = {}
    for length in (*lengths, 1, *([draft_length] if draft_length else [])):
        program = _Program(length, labels, frozenset(refuses))
        links[program.digest] = ScriptLink(program, tokenizer, state)
    offers = [Offer.of(link.program) for link in links.values()]
    main = links[f"digest {max(lengths, default=1)}"]
    return Session(main, pace=pace, open=links.__getitem__, offers=offers), state.asked

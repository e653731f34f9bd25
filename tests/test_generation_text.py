"""Text in, text out: prompts, chat templates, pieces that can be printed, and where a text stops."""

from __future__ import annotations

import gc
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import secure
from secure.deployments.compilation import Compilation
from secure.deployments.deployment import CompileOptions
from secure.deployments.generator import build_generator, held_out_texts
from secure.deployments.self_test import self_test
from secure.deployments.two_party import TwoParty
from secure.errors import InputTooLong, InvalidInput, InvalidProgram, PeerLost
from secure.models import chat
from secure.models.causal import load_causal
from secure.models.chat import rendered
from secure.models.detokenizer import Detokenizer, StopStrings
from secure.models.settings import MAXIMUM_TEMPLATE, TOKEN, TaskSettings, WritingSettings, settings_of
from secure.models.tokenizer_document import read_tokenizer
from secure.models.tokens import TextTokenizer
from secure.session.generation import Prepared
from secure.tasks.generate import Generate
from tests.writers import BEGIN, END, TEMPLATE, made_tokenizer, scripted, tokenizer_of, write_writer

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

KINDS = ("bytes", "pieces")
TEXTS = ("Once upon a time", "naïve café 🙂", "  two  spaces\n\nand lines\t", "", "한국어 🙂🙃", "�", "the end.")


# pieces


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_are_what_is_made_of_all_tokens(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    token = st.integers(0, tokenizer.tokenizer.get_vocab_size() + 2)
    before, ids = data.draw(st.lists(token, max_size=6)), data.draw(st.lists(token, max_size=30))
    made = Detokenizer(tokenizer, before)
    pieces = [made.add(id) for id in ids]
    pieces.append(made.end())
    all_of_it = tokenizer.tokenizer.decode([*before, *ids], skip_special_tokens=True)
    known = tokenizer.tokenizer.decode(before, skip_special_tokens=True).rstrip("\ufffd")
    assert "".join(pieces) == all_of_it[len(known) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_has_half_a_character(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    made = Detokenizer(tokenizer)
    pieces = [made.add(id) for id in ids]
    if text != "�":
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + made.end() == text


def test_a_prompt_and_its_answer_are_one_text() -> None:
    """A token of a new word brings its space with it, other than at the beginning of a text."""
    tokenizer = tokenizer_of("pieces")
    (the,) = tokenizer.tokenizer.encode("the", add_special_tokens=False).ids
    assert Detokenizer(tokenizer).add(the) == "the"
    assert Detokenizer(tokenizer, [the]).add(the) == " the"


def test_a_tokenizer_that_makes_no_text_is_refused() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(InvalidInput, match="makes no text of tokens"):
        Detokenizer(TextTokenizer(Tokenizer(models.WordLevel({"a": 0}, "a")), 0))


# stop strings


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)]
    return text


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab\n", max_size=20),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=20),
)
def test_a_text_ends_before_a_stop_string_whatever_its_pieces(text: str, stops: list[str], sizes: list[int]) -> None:
    held, given, at = StopStrings(stops), "", 0
    for size in itertools.islice(itertools.cycle([*sizes, 1]), 500):
        given += held.add(text[at : at + size])
        at += size
        assert cut(text, stops).startswith(given)
        # no more is held back than may become a stop string
        left = cut(text[:at], stops)[len(given) :]
        assert held.found or any(stop.startswith(left) for stop in (*stops, ""))
    assert given + held.end() == cut(text, stops)
    assert held.found == (cut(text, stops) != text)


# templates

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi é"}]


def written_by(template: str, messages: Any = MESSAGES) -> str:
    return rendered(WritingSettings(template=template, bos=BEGIN, eos=END), messages)


def test_a_template_makes_what_transformers_makes() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made_tokenizer("bytes"), bos_token=BEGIN, eos_token=END
    )
    templates = (
        TEMPLATE,
        "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n  {%- set ns.n = ns.n + 1 %}\n{{ ns.n }} "
        "{{ m.content | trim | tojson }}{% if loop.last %}{% break %}{% endif %}\n{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m['content'].split()[0] }}{% endgeneration %}{% endfor %}",
        "{% macro show(m) %}{{ m.role|upper }}{% endmacro %}{{ messages | map(attribute='role') | join(',') }}"
        "{{ show(messages[0]) }}",
    )
    for template in templates:
        tokenizer.chat_template = template
        theirs = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert written_by(template) == theirs


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", "refuses these messages: no system"),
        ("{{ ''.__class__.__mro__ }}", "fails"),
        ("{{ self.__init__.__globals__ }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ 'a' * 10 ** 10 }}", "fails"),
        ("{{ 'a' * (2 * 10 ** 6) }}", "fails"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "fails"),
        ("{% for", "fails"),
        ("", "no chat template"),
    ],
)
def test_hostile_templates_end(template: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        written_by(template)


def test_an_endless_template_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1.5)
    began = time.monotonic()
    with pytest.raises(InvalidInput, match=r"takes longer than 1\.5 s"):
        written_by("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert time.monotonic() - began < 30


def test_a_template_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1234")
    assert written_by("{{ environ is defined }}{{ os is defined }}") == "FalseFalse"


def test_settings_out_of_bounds_are_refused() -> None:
    for wrong in (
        WritingSettings(template="a" * (MAXIMUM_TEMPLATE + 1)),
        WritingSettings(ends=(-1,)),
        WritingSettings(ends=tuple(range(65))),
        WritingSettings(bos="a" * 513),
    ):
        with pytest.raises(InvalidInput, match="clients would refuse this model"):
            _ = TaskSettings(TOKEN, writing=wrong).encoded


# a session


def ids_of(kind: str, text: str) -> list[int]:
    found: list[int] = tokenizer_of(kind).tokenizer.encode(text, add_special_tokens=False).ids
    return found


ENDS = {"bytes": 1, "pieces": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_continued(kind: str) -> None:
    answer = " and then 🙂."
    script = [*ids_of(kind, f"a{answer}")[len(ids_of(kind, "a")) :], ENDS[kind]]
    session, asked = scripted(script, tokenizer_of(kind), ends=[ENDS[kind]])
    text = session.generate("the cat", 24)
    pieces = list(text)
    assert "".join(pieces) == text.text == answer
    assert len(pieces) > 3
    assert text.ids == script
    assert text.finish_reason == "stop"
    assert len(asked) == len(script)
    prompt = tokenizer_of(kind).tokenizer.encode("the cat").ids
    length = 8 if len(prompt) <= 8 else 16
    assert asked[0]["input_ids"][0].tolist() == [0] * (length - len(prompt)) + prompt


def test_messages_are_rendered() -> None:
    tokenizer = tokenizer_of("bytes")
    session, asked = scripted([5] * 9, tokenizer, lengths=(64, 16), capacity=80)
    session.generate([{"role": "user", "content": "the cat"}], 2).complete()
    ids = asked[0]["input_ids"][0].tolist()
    expected = tokenizer.tokenizer.encode(f"{BEGIN}user: the cat{END}assistant: ", add_special_tokens=False).ids
    assert ids[-len(expected) :] == expected
    assert expected[0] == 0  # the token that begins texts, once


def test_token_ids_give_token_ids() -> None:
    session, _ = scripted([7, 8, 9], ends=[9])
    text = session.generate([1, 2], 5)
    assert list(text) == text.ids == [7, 8, 9]
    assert (text.text, text.finish_reason) == ("", "stop")
    session, _ = scripted([7, 9, 9], ends=[9])
    text = session.generate([1, 2], 3, ignore_end=True).complete()
    assert (text.ids, text.finish_reason) == ([7, 9, 9], "length")


def test_a_stop_string_over_several_tokens() -> None:
    script = ids_of("bytes", "a mat.\n\nUser: and then")
    session, asked = scripted(script, tokenizer_of("bytes"))
    text = session.generate("the", 24, stop=["User:", "mats"])
    pieces = list(text)
    assert "".join(pieces) == text.text == "a mat.\n\n"
    assert text.finish_reason == "stop"
    assert len(asked) == len(text.ids) < len(script)


def test_what_only_begins_a_stop_string_is_given_in_the_end() -> None:
    script = ids_of("bytes", "a User")
    session, _ = scripted(script, tokenizer_of("bytes"))
    text = session.generate("the", len(script), stop="User:").complete()
    assert (text.text, text.finish_reason) == ("a User", "length")


def test_the_name_of_a_special_token_stops() -> None:
    session, _ = scripted([*ids_of("bytes", "a"), 1, 5], tokenizer_of("bytes"))
    text = session.generate("the", 3, stop=END).complete()
    assert (text.text, text.finish_reason, text.ids[-1]) == ("a", "stop", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a", "stop": ""}, "stop string is empty"),
        ({"prompt": "a", "stop": ["b", ""]}, "stop string is empty"),
        ({"prompt": "a", "stop": [1.5]}, "stop holds a float"),
        ({"prompt": "a", "stop": [None]}, "stop holds a NoneType"),
        ({"prompt": "a", "stop": ["b", False]}, "stop holds a bool"),
        ({"prompt": "a", "stop": 5}, "stop is a int"),
        ({"prompt": b"a"}, "the prompt is a bytes"),
        ({"prompt": [{"role": "user"}]}, "message 1 has not the keys role and content"),
        ({"prompt": [{"role": "user", "content": 5}]}, "content of message 1 is no text"),
        ({"prompt": "a", "max_new_tokens": 0}, "0 new tokens"),
        ({"prompt": "a", "max_new_tokens": 40}, "33 at most"),
    ],
)
def test_mistakes_that_no_server_decides_show_at_once(arguments: dict[str, Any], message: str) -> None:
    session, asked = scripted([5], tokenizer_of("bytes"))
    with pytest.raises(InvalidInput, match=message):
        session.generate(**{"max_new_tokens": 3, **arguments})
    assert not asked


def test_without_a_tokenizer_there_are_ids_alone() -> None:
    session, _ = scripted([5])
    for prompt, stop in (("a", ()), ([1], ["b"])):
        with pytest.raises(InvalidInput, match="has no tokenizer"):
            session.generate(prompt, 3, stop=stop)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"prompt": "the cat sat on the mat " * 9}, InputTooLong, "tokens, at most 16 fit"),
        ({"prompt": "a" * 5000}, InputTooLong, "5000 characters"),
        ({"prompt": "\ud800"}, InvalidInput, "surrogate"),
        ({"prompt": ""}, InvalidInput, "no token"),
        ({"prompt": "the cat sat in Zürich", "max_new_tokens": 30}, InvalidInput, "25 at most"),
        ({"prompt": [{"role": "user", "content": "a"}]}, InvalidInput, "no chat template"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_what_a_tokenizer_decides_costs_what_a_prompt_costs(
    arguments: dict[str, Any], kind: type[Exception], message: str, hidden: bool
) -> None:
    session, asked = scripted([], tokenizer_of("bytes"), template="")
    count = arguments.get("max_new_tokens", 4)
    with pytest.raises(kind, match=message):
        session.generate(**{"max_new_tokens": 4, **arguments, "hide_length": hidden}).complete()
    assert len(asked) == (count if hidden else 1)
    length = 16 if count == 4 else 8
    assert asked[0]["input_ids"].shape == (1, length)
    assert asked[0]["position_ids"].tolist() == [list(range(length))], "positions are shown, and tell nothing"


def test_a_string_that_the_model_cannot_write() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"?": 0, "a": 1, "b": 2}, [], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    session, asked = scripted([1], TextTokenizer(tokenizer, 0))
    with pytest.raises(InvalidInput, match="never writes the stop string 'ü'"):
        session.generate("a", 3, stop="ü").complete()
    assert len(asked) == 1


def test_tokens_on_which_the_graph_fails_show_in_nothing_that_is_sent() -> None:
    """A server chooses the graph. A failing prompt is replaced by another one, with the same positions."""
    session, asked = scripted([], refuses=[7])
    with pytest.raises(InvalidInput, match="the graph fails"):
        session.generate([1, 7], 4).complete()
    assert 7 not in asked[0]["input_ids"]
    assert asked[0]["position_ids"].tolist() == [list(range(8))]


def test_hidden_lengths_take_all_steps() -> None:
    session, asked = scripted([5, 1, 7, 8, 9, 10], tokenizer_of("bytes"), ends=[1])
    text = session.generate("a", 6, hide_length=True)
    seen = [(piece, len(asked)) for piece in text]
    assert text.ids == [5, 1]
    assert seen[-1][1] <= 2, "the text is there before the steps that hide its length"
    assert (text.finish_reason, len(asked)) == ("stop", 6)
    positions = [each["position_ids"].tolist() for each in asked[1:]]
    assert positions == [[[8 + step]] for step in range(5)]
    assert [each["input_ids"].item() for each in asked[1:]] == [5, 0, 0, 0, 0]


def test_the_time_of_steps_does_not_depend_on_the_text() -> None:
    session, _ = scripted([5, 1, 7, 8], tokenizer_of("bytes"), ends=[1], pace=0.05)
    began = time.monotonic()
    session.generate("a", 4, hide_length=True).complete()
    assert time.monotonic() - began >= 0.05 + 3 * 0.01


def test_a_lost_party_leaves_what_was_written() -> None:
    script: list[Any] = [*ids_of("bytes", "a mat"), PeerLost("the server was silent", "try again")]
    session, _ = scripted(script, tokenizer_of("bytes"))
    text, given = session.generate("the", 20), list[str]()
    with pytest.raises(PeerLost, match=r"after \d+ tokens: the server was silent") as caught:
        given.extend(text)
    assert "ask again with all of it behind the prompt" in str(caught.value)
    assert "".join(given) == text.text == "a mat"
    assert text.finish_reason is None


def test_two_texts_grow_side_by_side() -> None:
    session, _ = scripted([5, 6, 7, 8])
    first, second = session.generate([1], 2), session.generate([2], 2)
    assert list(zip(first, second, strict=True)) == [(5, 6), (7, 8)]


def test_the_greatest_length_alone() -> None:
    session, asked = scripted([5, 6])
    only = secure.Session(session.link, pace=0.0, open=session._links._open, offers=session.sizes, fixed_length=True)
    only.generate([1], 2).complete()
    assert asked[0]["input_ids"].shape == (1, 16)


# models


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_writer(tmp_path_factory.mktemp("writer") / "tiny")


def test_a_directory_has_all_that_clients_need(directory: Path) -> None:
    found = load_causal(str(directory))
    writing = found.settings.writing
    assert writing is not None
    assert (writing.template, writing.bos, writing.eos, writing.ends) == (TEMPLATE, BEGIN, END, (1,))


def test_a_template_that_clients_do_not_run_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_writer(tmp_path, template="{{ messages[0].content }}{{ tools is none }}{{ date_string is defined }}")
    load_causal(str(tmp_path))
    write_writer(tmp_path, template="{{ pad_token is defined }}")  # transformers defines it
    with pytest.raises(InvalidInput, match="makes other text at clients"):
        load_causal(str(tmp_path))


def test_a_compiled_directory_writes_as_transformers_does(directory: Path) -> None:
    import transformers

    compiled = secure.compile_generator(str(directory), prompt=24, capacity=40)
    assert settings_of(compiled.program.labels)[1].writing is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "the"}]
    prompt_ids: Any = tokenizer("the cat sat")["input_ids"]
    chat_ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]  # type: ignore[index, call-overload]
    with secure.insecure_in_process(compiled) as session:
        asked: list[tuple[Any, list[int]]] = [("the cat sat", prompt_ids), (messages, chat_ids)]
        for prompt, ids in asked:
            text = session.generate(prompt, 8, ignore_end=True).complete()
            with torch.no_grad():
                expected = list(ids)
                for _ in range(8):
                    expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
            assert text.ids == expected[len(ids) :]
            assert (
                text.text
                == tokenizer.decode(expected, skip_special_tokens=True)[
                    len(tokenizer.decode(ids, skip_special_tokens=True)) :
                ]
            )
        with pytest.raises(InvalidInput, match="is for the task 'generate', not for 'embed'"):
            session.embed(["a"])


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"type": "Strip", "content": " ", "start": 0, "stop": 1}, "1 at the end"),
        ({"type": "Strip", "content": " ", "start": 99, "stop": 0}, "strips 99 characters"),
        ({"type": "Replace", "pattern": {"String": "a"}, "content": "bb"}, "not for one character"),
        ({"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"}, "not for one character"),
        ({"type": "Fuse", "more": 1}, "has the field 'more'"),
    ],
)
def test_decoders_that_clients_do_not_run(decoder: dict[str, Any], message: str) -> None:
    document = json.loads(made_tokenizer("bytes").to_str())
    for part in (decoder, {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, decoder]}):
        with pytest.raises(InvalidInput, match=message):
            read_tokenizer(json.dumps({**document, "decoder": part}).encode())
    # an encoder's decoder of another kind is not run, and does not matter
    made, _ = read_tokenizer(json.dumps({**document, "decoder": {"type": "WordPiece", "x": 1}}).encode())
    assert made.decoder is None


def test_a_causal_model_is_no_encoder_unless_asked_for(directory: Path) -> None:
    with pytest.raises(
        InvalidInput, match=r"generates text\nhint: secure\.compile_generator compiles it; task='embed'"
    ):
        secure.compile_text_model(str(directory), 16)


def test_a_model_that_writes_other_tokens_is_refused(tmp_path: Path) -> None:
    """The self-test compares the token after texts that calibrated nothing, at a temperature of 0 if it has one."""
    directory = write_writer(tmp_path / "tiny")
    for temperature in (None, 1.0):
        compilation = Compilation(str(directory), TwoParty(), (8,), capacity=16, temperature=temperature)
        assert "self-test: 3 of 3 tokens are the original's, on 3 inputs" in compilation.run().about
    loaded = Generate().load(str(directory))
    compiled = build_generator(loaded, TwoParty(), CompileOptions(), (8,), 16)
    with torch.no_grad():
        head: Any = loaded.module.get_parameter("lm_head.weight")
        head.neg_()
    with pytest.raises(InvalidInput, match=r"gives other answers .* of 3 tokens are the original's"):
        self_test(compiled, held_out_texts(loaded, None))


# prompts that are read token by token


@pytest.mark.parametrize(
    "wanted",
    [
        {"prompt": "a" * 80},
        {"prompt": [{"role": "user", "content": "a"}], "template": "{{ raise_exception('no') }}"},
    ],
    ids=["too long", "the template refuses"],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_prompt_that_a_tokenizer_refuses_takes_steps_as_others_do(wanted: dict[str, Any], hidden: bool) -> None:
    given = dict(wanted)
    session, asked = scripted([], tokenizer_of("bytes"), stepwise=True, template=given.pop("template", TEMPLATE))
    with pytest.raises(InvalidInput):
        session.generate(**given, max_new_tokens=4, hide_length=hidden).complete()
    assert [int(each["input_ids"]) for each in asked] == [0] * (40 if hidden else 1)
    assert {each["attention_mask"].shape[-1] for each in asked} == {41}


def test_a_text_that_its_client_cannot_read_hides_its_length_too(monkeypatch: pytest.MonkeyPatch) -> None:
    session, asked = scripted([9] * 40, tokenizer_of("bytes"), stepwise=True)

    def broken(*_: Any) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr(Prepared, "add", broken)
    with pytest.raises(InvalidProgram, match="fails on this input: ZeroDivisionError"):
        session.generate([5, 7], 4, hide_length=True).complete()
    assert len(asked) == 40


def test_the_time_of_steps_on_ciphertexts_does_not_depend_on_the_text() -> None:
    session, asked = scripted([9] * 40, tokenizer_of("bytes"), stepwise=True, pace=0.05)
    began = time.monotonic()
    session.generate([5, 7], 3, ignore_end=True).complete()
    assert len(asked) == 4
    assert time.monotonic() - began >= 0.05 + 3 * 0.01


def test_a_text_that_is_left_gives_up_its_place_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = scripted([9] * 40, stepwise=True)
    left = list[Any]()
    monkeypatch.setattr(type(session.link), "leave", lambda self, conversation: left.append(conversation))
    gc.disable()
    try:
        text = session.generate([5], 4)
        next(text)
        assert not left
        del text
        assert len(left) == 1
        text = session.generate([5], 4)
        next(text)
        text.close()
        assert (len(left), text.ids, list(text)) == (2, [9], [])
    finally:
        gc.enable()

"""Chat templates, against transformers' rendering of the same ones, and what a hostile one may not do."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from moekernels.tokenizers import AutoTokenizer, PreTrainedTokenizerFast, templates
from tests.tokenizers.builders import neox_json, olmoe, phimoe

#: The forms that the templates of the models here have, and those of larger families.
PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no role ' + message['role']) }}"
    "{% endif %}\n"
    "    {%- if loop.index0 == 3 %}{% break %}{% endif %}\n"
    "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% generation %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}{% endgeneration %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for document in documents or [] %}[{{ document.title }}] {{ document['text'] }}{{ '-' * 3 }}{% endfor %}"
    "{% if when %}{{ strftime_now('%Y') | length }}{{ when }}{% endif %}"
)
USER, ASSISTANT = {"role": "user", "content": "2 < 3? "}, {"role": "assistant", "content": " Yes & no\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"a": ["<b>", None, True]}}}]


def both(directory: Path) -> tuple[Any, Any]:
    ours = AutoTokenizer.from_pretrained(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return ours, theirs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return both(phimoe(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"tools": TOOLS},
        {"documents": [{"title": "T", "text": "x"}]},
        {"when": "now", "eos_token": "END"},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
@pytest.mark.parametrize("template", [PHI, STRICT], ids=["phi", "strict"])
def test_text_and_ids(pair: tuple[Any, Any], template: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = pair
    for messages in ([USER], [USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT, USER]):
        text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
        if "continue_final_message" in kwargs and "break" in template and len(messages) > 3:
            continue  # the template leaves the last message out
        assert ours.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs) == text
        ids = ours.apply_chat_template(messages, chat_template=template, **kwargs)
        assert ids == theirs.apply_chat_template(messages, chat_template=template, **kwargs)
        assert ids == ours(text, add_special_tokens=False).input_ids


def test_batches(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    ours.chat_template = theirs.chat_template = PHI
    batch = [[SYSTEM, USER, ASSISTANT], [USER]]
    options = {"padding": True, "return_tensors": "pt", "return_dict": True, "add_generation_prompt": True}
    got, expected = (tokenizer.apply_chat_template(batch, **options) for tokenizer in (ours, theirs))
    assert torch.equal(got.input_ids, expected.input_ids) and torch.equal(got.attention_mask, expected.attention_mask)
    assert got.attention_mask.min() == 0
    short = {"truncation": True, "max_length": 5, "tokenizer_kwargs": {"return_length": True}, "return_dict": True}
    got = ours.apply_chat_template(batch, **short)
    assert got.input_ids == theirs.apply_chat_template(batch, **short)["input_ids"] and got.length == [5, 5]
    assert ours.apply_chat_template(batch, tokenize=False) == theirs.apply_chat_template(batch, tokenize=False)


def test_the_words_of_the_model(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    both_ways: dict[str, Any] = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
    chat = [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    got = ours.apply_chat_template(chat, **both_ways)
    assert dict(got) == dict(theirs.apply_chat_template(chat, **both_ways))
    words = [index for index, own in zip(got.input_ids, got.assistant_masks, strict=True) if own]
    assert ours.decode(words).count("Yes & no") == 2 and "2 < 3" not in ours.decode(words)
    both_ways.update(padding=True, return_tensors="pt", truncation=True, max_length=60)
    got, expected = (t.apply_chat_template([chat, [USER]], **both_ways) for t in pair)
    assert torch.equal(got.assistant_masks, expected["assistant_masks"])
    assert got.assistant_masks.any(dim=1).tolist() == [True, False]


def test_parts_of_a_message(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    template = "{% for m in messages %}{% for part in m.content %}{{ part.text or '' }}|{% endfor %}{% endfor %}"
    messages = [{"role": "assistant", "content": [{"text": "one"}, {"text": "two "}, {"type": "image"}]}]
    options = {"tokenize": False, "continue_final_message": True}
    text = ours.apply_chat_template(messages, chat_template=template, **options)
    assert text == theirs.apply_chat_template(messages, chat_template=template, **options) == "one|two "


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": name, "template": name} for name in ("default", "tool_use", "rag")]
    for directory in (tmp_path / "listed", tmp_path / "files"):
        directory.mkdir()
    olmoe(tmp_path / "listed", chat_template=named)
    olmoe(tmp_path / "files", chat_template="replaced")
    (tmp_path / "files" / "chat_template.jinja").write_text("default")
    (tmp_path / "files" / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (tmp_path / "files" / "additional_chat_templates" / f"{name}.jinja").write_text(name)
    for directory in (tmp_path / "listed", tmp_path / "files"):
        for kwargs in ({}, {"tools": TOOLS}, {"chat_template": "rag"}, {"chat_template": "{{ 2 + 1 }}"}):
            got, expected = (t.apply_chat_template([USER], tokenize=False, **kwargs) for t in both(directory))
            assert got == expected
        ours, _ = both(directory)
        ours.save_pretrained(tmp_path / "again")
        assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == ours.chat_template
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == ours.chat_template
    del ours.chat_template["default"]
    with pytest.raises(ValueError, match="no default chat template; pass one of rag, tool_use"):
        ours.apply_chat_template([USER])


def test_a_file_of_its_own(tmp_path: Path) -> None:
    olmoe(tmp_path, chat_template="replaced")
    (tmp_path / "chat_template.jinja").write_text(PHI, encoding="utf-8")
    got, expected = (t.apply_chat_template([SYSTEM, USER], tokenize=False) for t in both(tmp_path))
    assert got == expected and "Be brief." in got


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ (''|attr('__class__')) }}",
        "{{ ''['__class__'] }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
        "{{ lipsum.__globals__['os'].popen('touch executed').read() }}",
        "{% include 'tokenizer.json' %}",
        "{% import '/etc/passwd' as p %}{{ p }}",
        "{% extends 'base' %}",
        "{{ open('executed', 'w') }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_template(
    pair: tuple[Any, Any], template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    messages = [dict(USER)]
    with pytest.raises(ValueError, match=r"the chat template failed: ."):
        pair[0].apply_chat_template(messages, chat_template=template, tokenize=False)
    assert messages == [USER] and not list(tmp_path.iterdir())


def test_errors(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair
    ours.chat_template = STRICT
    for messages, kwargs, message in (
        ([SYSTEM], {}, "the chat template failed: no role system"),
        ([USER], {"chat_template": "{% for %}"}, "the chat template is not valid Jinja, line 1"),
        ([{"role": "user"}], {"chat_template": PHI}, "'dict object' has no attribute 'content'"),
        ([], {}, "there are no messages"),
        ([USER], {"add_generation_prompt": True, "continue_final_message": True}, "pass one of them"),
        ([USER], {"chat_template": "nothing", "continue_final_message": True}, "does not show the last message"),
        ([{"content": [{}]}], {"chat_template": "-", "continue_final_message": True}, "no text to continue"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ours.apply_chat_template(messages, tokenize=False, **kwargs)
    with pytest.raises(TypeError, match="tools must be dictionaries, got function"):
        ours.apply_chat_template([USER], tools=[both])
    with pytest.raises(ValueError, match="return_assistant_tokens_mask needs tokenize and return_dict"):
        ours.apply_chat_template([USER], return_assistant_tokens_mask=True)
    ours.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat_template"):
        ours.apply_chat_template([USER])

    templates._compiled.cache_clear()
    load = builtins.__import__

    def without_jinja(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "jinja2":
            raise ImportError(name)
        return load(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_jinja)
    with pytest.raises(ImportError, match=r"pip install 'moekernels\[chat\]'"):
        ours.apply_chat_template([USER], chat_template=PHI)


def test_tojson_does_not_escape(pair: tuple[Any, Any]) -> None:
    text = pair[0].apply_chat_template([USER], chat_template="{{ tools | tojson }}", tools=TOOLS, tokenize=False)
    assert json.loads(text) == TOOLS and "<b>" in text and "größe" in text


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def assistant_tokens(
    tokenizer: PreTrainedTokenizerFast, words: list[str], **kwargs: Any
) -> tuple[list[int], list[int]]:
    """Ids and mask of a chat in which a question stands before each of the assistant's words."""
    messages = [
        {"role": role, "content": text} for word in words for role, text in (("user", "a?"), ("assistant", word))
    ]
    got = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )
    assert len(got.input_ids) == len(got.assistant_masks)
    return got.input_ids, got.assistant_masks


def byte_level() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(neox_json()), pad_token="<|padding|>")


@pytest.mark.parametrize(
    "words", [["Yes", "No"], ["yes \U0001f680"], ["\U0001f680", "\U0001f468\u200d\U0001f680 no", "x"], [" ", "b"]]
)
def test_assistant_tokens_are_those_of_the_words(words: list[str]) -> None:
    """Also the further tokens of a last character that takes several."""
    tokenizer = byte_level()
    ids, mask = assistant_tokens(tokenizer, words)
    own = [index for index, bit in zip(ids, mask, strict=True) if bit]
    assert tokenizer.decode(own) == "".join(words)


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_tokens_of_what_truncation_left(side: str) -> None:
    tokenizer = byte_level()
    words = ["Yes \U0001f680", "No, certainly not", "Well"]
    ids, mask = assistant_tokens(tokenizer, words)
    tokenizer.truncation_side = side
    for length in range(1, len(ids) + 1):
        kept = slice(len(ids) - length, None) if side == "left" else slice(0, length)
        assert assistant_tokens(tokenizer, words, truncation=True, max_length=length) == (ids[kept], mask[kept])
        padded = {"padding": "max_length", "truncation": True, "max_length": length + 3}
        padded_ids, padded_mask = assistant_tokens(tokenizer, words, **padded)
        assert padded_ids.count(tokenizer.pad_token_id) == max(length + 3 - len(ids), 0)
        assert sum(padded_mask) == sum(mask[slice(-length - 3, None) if side == "left" else slice(0, length + 3)])


def test_assistant_tokens_that_end_in_what_the_tokenizer_drops() -> None:
    """White space has no token of its own there, and what comes after it is not the assistant's."""
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(["?", "yes", "no", "a", "<", ">"])}, "?")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    for words in (["yes \n", "no  "], ["  yes", " no"], ["  ", "no"]):
        ids, mask = assistant_tokens(tokenizer, words)
        assert [i for i, bit in zip(ids, mask, strict=True) if bit] == tokenizer(" ".join(words)).input_ids

"""Chat templates against transformers' own rendering, and how they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from aserve.errors import ConfigError, InvalidRequestError
from aserve.tokenizer.chat import render_chat, resolve_chat_template
from aserve.tokenizer.loader import load_tokenizer

CHATML = (
    "{% for message in messages %}\n"
    "    {% if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] + '<end_of_turn>\\n' }}{% endfor %}"
)
TOOLS = (
    "{%- if tools %}{{ tools | tojson }}{% endif -%}{%- if documents %}{{ documents[0].title }}{% endif -%}"
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if thinking is defined and thinking %}<think>{% endif %}"
)
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "  Hi <b>&amp; é日 "},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "x"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("template", [CHATML, GEMMA, TOOLS])
def test_equals_transformers_byte_for_byte(
    template: str, prompted: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    options: dict[str, Any] = {"tools": [TOOL], "documents": [{"title": "T", "text": "t"}]}
    expected = tokenizer.apply_chat_template(
        TALK, chat_template=template, tokenize=False, add_generation_prompt=prompted, thinking=True, **options
    )
    rendered = render_chat(
        tokenizer,
        TALK,
        chat_template=template,
        add_generation_prompt=prompted,
        template_kwargs={"thinking": True},
        **options,
    )
    assert rendered == expected and "é" in rendered


def test_template_of_a_gguf_file(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_path))
    assert render_chat(tokenizer, TALK[2:]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_tokenizers_template_is_the_default(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}|{{ eos_token }}"
    assert render_chat(tokenizer, TALK[2:]) == "x|</s>"
    assert render_chat(tokenizer, TALK[2:], chat_template="other") == "other"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "no chat template; start the server with --chat-template"),
        (GEMMA, TALK[1:], "Conversation roles must alternate user/assistant"),
        ("{{ missing.field }}", TALK, "'missing' is undefined"),
        ("{{ 'a' + messages }}", TALK, "can only concatenate str"),
        ("{% if %}", TALK, "Expected an expression"),
        (CHATML, [], "empty conversation"),
        ("{{ ''.__class__.__mro__ }}", TALK, "unsafe"),
        ("{{ messages.append(1) }}", TALK, "unsafe|append"),
        ("{{ cycler.__init__.__globals__.os.popen('x') }}", TALK, "unsafe|undefined"),
        ("{% include '/etc/passwd' %}", TALK, "no loader"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", TALK, "Range too big"),
        ("{{ 1 / 0 }}", TALK, "division by zero"),
    ],
)
def test_failures_are_the_requests(
    template: str | None, messages: list[dict[str, Any]], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        render_chat(tokenizer, messages, chat_template=template)


@pytest.mark.parametrize(
    "name", ["tokenize", "chat_template", "conversation", "messages", "tokenizer_kwargs", "raise_exception"]
)
def test_a_request_cannot_set_the_renderers_options(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidRequestError, match=f"chat_template_kwargs may not set {name}"):
        render_chat(tokenizer, TALK, chat_template=CHATML, template_kwargs={name: True})


def test_messages_are_not_changed(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "x", "name": None}]
    render_chat(tokenizer, messages, chat_template=CHATML)
    assert messages == [{"role": "user", "content": "x", "name": None}]


def test_template_argument(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ 'é\\n' }}\n", encoding="utf-8")
    assert resolve_chat_template(None) is None
    assert resolve_chat_template(str(file)) == "{{ 'é\\n' }}\n"
    assert resolve_chat_template("{{ x }}\\né日") == "{{ x }}\né日"
    assert resolve_chat_template("plain\ntext") == "plain\ntext"


def test_bad_template_argument(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="looks like a file path"):
        resolve_chat_template(str(tmp_path / "absent.jinja"))
    with pytest.raises(ConfigError, match="looks like a file path"):
        resolve_chat_template(str(tmp_path))
    with pytest.raises(ConfigError, match="truncated"):
        resolve_chat_template("{{ '\\x1' }}")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        resolve_chat_template(str(binary))


def test_the_last_message_can_be_gone_on_with() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I"}]
    prompt = render_chat(
        tokenizer, talk, chat_template=CHATML, add_generation_prompt=False, continue_final_message=True
    )
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell, I"

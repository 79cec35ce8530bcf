"""Chat templates: where they come from, and messages to a prompt."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aserve.errors import ConfigError, InvalidRequestError, without_private

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolve_chat_template(arg: str | None) -> str | None:
    """The template ``--chat-template`` means: the content of a file, or the text itself.

    Text must hold a brace or a line break, and has its backslash escapes decoded. ConfigError: neither.
    """
    if arg is None:
        return None
    if os.path.isfile(arg):
        try:
            with open(arg, encoding="utf-8") as source:
                return source.read()
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat_template: cannot read {arg}: {error}", param="chat_template") from error
    if not any(character in arg for character in "{}\n"):
        raise ConfigError(
            f"chat_template: {arg!r} looks like a file path, and there is no such file; "
            "a template itself holds a brace or a line break",
            param="chat_template",
        )
    # unicode_escape reads bytes as Latin-1: what Latin-1 lacks is escaped first, so that it survives.
    try:
        return arg.encode("latin-1", errors="backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template: {error}", param="chat_template") from error


def template_text(
    tokenizer: Any, chat_template: str | None = None, *, with_tools: bool = False
) -> str | None:
    """The text of ``chat_template``, or of the tokenizer's own, which may be one of several by name.

    with_tools: the one that is rendered when there are tools. None: there is no template.
    """
    named = getattr(tokenizer, "chat_template", None)
    if isinstance(named, dict):
        if chat_template in named:
            return str(named[chat_template])
        named = named.get("tool_use") if with_tools and "tool_use" in named else named.get("default")
    return chat_template or named or None


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt that ``chat_template`` (default: the tokenizer's) makes of ``messages``.

    Rendered by transformers in its immutable Jinja sandbox, so it is what ``apply_chat_template`` gives.
    continue_final_message: the prompt ends where the text of the last message does.

    ``template_kwargs`` are variables for the template. InvalidRequestError: there is no template, it
    refuses the messages or fails on them (the message is the template's own), or ``template_kwargs``
    names an argument of the renderer.
    """
    if chat_template is None and not tokenizer.chat_template:
        raise InvalidRequestError(
            "this model has no chat template; start the server with --chat-template, "
            "or send a plain prompt to /v1/completions"
        )
    variables = dict(template_kwargs or {})
    _check_variables(tokenizer, variables)
    try:
        prompt = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            documents=None if documents is None else [dict(document) for document in documents],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            continue_final_message=continue_final_message,
            **variables,
        )
    except Exception as error:  # a template is a program: it can fail in any way, and only this request
        reason = without_private(str(error)) or type(error).__name__
        raise InvalidRequestError(f"chat template: {reason}", param="messages") from error
    return str(prompt)


def _check_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
    """Keeps a request from switching the renderer's own options, such as ``tokenize``."""
    if not variables:
        return
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    reserved |= {"messages", "raise_exception", "strftime_now"}
    clash = sorted(reserved.intersection(variables))
    if clash:
        raise InvalidRequestError(
            f"chat_template_kwargs may not set {', '.join(clash)}", param="chat_template_kwargs"
        )

"""Chat template: messages → text, by the program that a tokenizer carries.

    [user "Hi", assistant "Hello"]    →    <|user|>Hi<|end|><|assistant|>Hello<|end|>

Choices made here:
- a template is a program and may refuse a conversation in any way: that is TemplateRefuses;
- `{% generation %}` marks, where a template has them, come with the text;
- a template that takes contents only as lists of blocks, as those of vision models, gets them so;
- the arguments of a tool call are an object; a template that cannot join an object with a text, or
  writes it as Python does, gets them as JSON text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from prism_select.data.template_date import TemplateDate

__all__ = ["ChatTemplate", "Message", "Rendering", "Span", "TemplateRefuses"]

Message: TypeAlias = Mapping[str, Any]
Span: TypeAlias = tuple[int, int]  # start and end of some characters

_MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class TemplateRefuses(Exception):
    """Its text says why."""


class Rendering(NamedTuple):
    """`marks` are the spans of `{% generation %}` blocks; None where the template has none."""

    text: str
    marks: Sequence[Span] | None


class ChatTemplate:
    def __init__(self, tokenizer: Any, date: TemplateDate) -> None:
        self.tokenizer, self.date = tokenizer, date
        template = tokenizer.chat_template
        sources = list(template.values()) if isinstance(template, Mapping) else [template]
        self.sources: Sequence[str] = [str(source) for source in sources]
        self.marked = any(map(_MARK.search, self.sources))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), prompt: bool = False
    ) -> str:
        """With `prompt`, up to where an answer begins. Raises TemplateRefuses."""
        return self._rendered(messages, tools, prompt, False).text

    def render_marked(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Rendering:
        """Raises TemplateRefuses."""
        return self._rendered(messages, tools, False, self.marked)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of keys and variables that the template mentions."""
        return frozenset(name for source in self.sources for name in _names_in(source))

    @cached_property
    def special_tokens(self) -> Sequence[str]:
        """All but the one that begins a text."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special}
        eos = self.tokenizer.eos_token
        return sorted(tokens - {self.tokenizer.bos_token} | ({eos} if eos else set()))

    @cached_property
    def added_tokens(self) -> Sequence[str]:
        """The special ones, and others that are no part of a word."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        return sorted(added - {self.tokenizer.bos_token} | set(self.special_tokens))

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Any], prompt: bool, marked: bool
    ) -> Rendering:
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        try:
            rendering = self._run(messages, tools, prompt, marked)
            if not any(_is_python(call, rendering.text) for call in calls):
                return rendering
        except TemplateRefuses:
            if not calls:
                raise
            try:
                return self._run(_with_json(messages), tools, prompt, marked)
            except TemplateRefuses:
                pass
            raise
        return self._run(_with_json(messages), tools, prompt, marked)

    @cached_property
    def _takes_blocks(self) -> bool:
        """Whether it shows a text only within a block."""
        probe = "Prism␟zQ"
        for blocks in (False, True):
            content = _in_blocks(probe) if blocks else probe
            with suppress(TemplateRefuses):
                if probe in self._apply([{"role": "user", "content": content}], (), False):
                    return blocks
        return False

    def _run(
        self, messages: Sequence[Message], tools: Sequence[Any], prompt: bool, marked: bool
    ) -> Rendering:
        if self._takes_blocks:
            messages = [{**m, "content": _in_blocks(m["content"])} for m in messages]
        if marked:
            return self._with_marks(messages, tools)
        return Rendering(self._apply(messages, tools, prompt), None)

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any], prompt: bool) -> str:
        try:
            with self.date.fixed():
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **self.date.arguments,
                )
        except Exception as error:  # a template is a program: it may fail in any way
            raise TemplateRefuses(_reason(error)) from None
        return str(text)

    def _with_marks(self, messages: Sequence[Message], tools: Sequence[Any]) -> Rendering:
        """As `apply_chat_template` does it for `return_assistant_tokens_mask`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with self.date.fixed():
                texts, marks = render_jinja_template(
                    conversations=[list(messages)],
                    tools=list(tools) or None,
                    chat_template=self.tokenizer.get_chat_template(None, list(tools) or None),
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                    **self.date.arguments,
                )
        except Exception as error:
            raise TemplateRefuses(_reason(error)) from None
        return Rendering(str(texts[0]), [(start, end) for start, end in marks[0]])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _in_blocks(text: str) -> list[Message]:
    return [{"type": "text", "text": text}]


def _names_in(source: str) -> set[str]:
    from jinja2 import Environment, TemplateSyntaxError, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_MARK.sub("", source))
    except TemplateSyntaxError:
        return set(re.findall(r"\w+", source))
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {node.name for node in tree.find_all(nodes.Name)}
    return names | {str(node.value) for node in tree.find_all(nodes.Const)}


def _is_python(call: Mapping[str, Any], text: str) -> bool:
    """Whether a template wrote the arguments of a call as Python does: {'city': 'Rome'}."""
    arguments = call["function"].get("arguments")
    return bool(arguments) and "'" in repr(arguments) and repr(arguments) in text


def _with_json(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of their tool calls as JSON text."""
    return [
        {**message, "tool_calls": [_json_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _json_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}

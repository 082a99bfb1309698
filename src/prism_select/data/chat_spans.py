"""Chat spans: which characters of a rendered conversation are supervised. The one place that
decides it.

    the conversation     <|user|>Hi<|end|><|assistant|>Hello<|end|>
    another answer in it <|user|>Hi<|end|><|assistant|>Prism␟zQ<|end|>      head, stand-in, tail
    up to the answer     <|user|>Hi<|end|><|assistant|>                     generation prompt
    supervised                                         ^^^^^^^^^^^^

Choices made here:
- a template with `{% generation %}` marks has decided already: the marks count;
- else the span of an answer is proved: with another text as answer, the conversation must be the
  same before and behind it;
- an answer begins where its generation prompt ends: a thought or an empty one that the template
  writes there is the model's own; without a generation prompt, where another text would begin;
- an answer ends with its end-of-turn token: the first token behind it that also stands there when a
  user goes on, and opens no header; a second one at the very end of a text is not the answer's;
- what holds for the roles of a conversation is proved once and kept: a row that reads like the
  proof with its own texts in it needs no other rendering;
- what the template leaves out (thoughts, system texts, names) is told with the spans.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from prism_select.data.chat_closing import Closing
from prism_select.data.chat_template import ChatTemplate, Message, Span, TemplateRefuses
from prism_select.data.records import Example, Role, Turn

__all__ = ["ChatSpans", "NotProved", "Spanned", "thought_in"]

KEPT_SHAPES = 1024
STAND_IN = "Prism␟{}␟zQ"  # begins and ends in letters that its reverse does not
_STAND_IN = re.compile("Prism␟([0-9]+)␟zQ")
_THOUGHT_END = "</think>"


class NotProved(Exception):
    """The template changes an answer so that nobody can tell what in the text it is."""


@dataclass(frozen=True, slots=True)
class Spanned:
    """A rendered conversation. `losses` names what the template leaves out of it, once for each
    time: thought, answer, a role, or a key of a message. `thoughts` counts answers with one."""

    text: str
    spans: Sequence[Span]
    losses: tuple[str, ...] = ()
    thoughts: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """Where an answer stands in a text: from `start` to `end`, and to `stop` with its end of turn.
    If it begins with `opening`, the generation prompt has written that already."""

    start: int
    end: int
    stop: int
    opening: str = ""

    def moved(self, span: Span, text: str) -> "Answer":
        """This one, relative to the span of a text, in another conversation."""
        start, end = span[0] + self.start, span[1] + self.stop
        if self.opening and text.startswith(self.opening, start):
            start += len(self.opening)
        return Answer(start, span[1], end)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the template makes of conversations with certain roles: `literals[i]`, the text of turn
    `order[i]`, and so on. `answers` are relative to the text of their own turn."""

    literals: Sequence[str]
    order: Sequence[int]
    answers: Mapping[int, Answer]

    def match(self, turns: Sequence[Turn], text: str) -> dict[int, Span] | None:
        """The spans of the turns' texts, if `text` is this shape with these texts in it, or with
        the white space around them trimmed."""
        spans, position = dict[int, Span](), len(self.literals[0])
        if not text.startswith(self.literals[0]):
            return None
        for index, literal in zip(self.order, self.literals[1:], strict=True):
            for content in _trimmed(turns[index].text):
                end = position + len(content)
                if text.startswith(content, position) and text.startswith(literal, end):
                    break
            else:
                return None
            spans[index] = (position, end)
            position = end + len(literal)
        return spans if position == len(text) else None


def _trimmed(content: str) -> Iterator[str]:
    yield content
    if content != content.strip():
        yield from (content.strip(), content.lstrip(), content.rstrip())
        yield from (content.strip("\n"), content.lstrip("\n"), content.rstrip("\n"))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools, rendered with changes; None where the template refuses one."""

    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[Any] = ()

    def prompt(self, index: int) -> str | None:
        """Up to where turn `index` begins."""
        return self._try(self.messages[:index], True) if index else None

    def before(self, index: int) -> str | None:
        """The turns before turn `index`, without a generation prompt."""
        return self._try(self.messages[:index])

    def with_turn(self, index: int, message: Message, last: bool = False) -> str | None:
        """With another message as turn `index`; as the last one with `last`."""
        later = () if last else self.messages[index + 1 :]
        return self._try([*self.messages[:index], message, *later])

    def _try(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        try:
            return self.template.render(messages, self.tools, prompt)
        except TemplateRefuses:
            return None


class ChatSpans:
    """Raises NotProved for an answer that cannot be found."""

    def __init__(self, template: ChatTemplate, skip_end: bool = False) -> None:
        self.template, self.skip_end = template, skip_end
        self._shape = lru_cache(maxsize=KEPT_SHAPES)(self._prove_shape)

    def __call__(self, example: Example) -> Spanned:
        """Raises TemplateRefuses, and NotProved."""
        turns, tools = example.turns, example.tools
        conversation = Conversation(self.template, [turn.message for turn in turns], tools)
        if self._marks_hold:
            return self._marked(example, conversation)
        text = self.template.render(conversation.messages, tools)
        supervised = example.supervised_turns
        if not tools and not any([turn.beside for turn in turns]):
            shape = self._shape(tuple(turn.role for turn in turns))
            texts = shape.match(turns, text) if shape else None
            if shape and texts and shape.answers.keys() >= set(supervised):
                answers = {i: shape.answers[i].moved(texts[i], text) for i in supervised}
                return self._spanned(example, text, answers, texts.keys())
        answers = {index: self._prove(conversation, index, text, turns) for index in supervised}
        return self._spanned(example, text, answers)

    @cached_property
    def closing(self) -> Closing:
        return Closing.of(self.template)

    @cached_property
    def _marks_hold(self) -> bool:
        """Whether the template has marks, and they stand around answers: within a macro or a loop
        of its own, transformers puts them elsewhere."""
        if not self.template.marked:
            return False
        answers = [STAND_IN.format(index) for index in range(2)]
        messages = [
            message
            for answer in answers
            for message in (
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": answer},
            )
        ]
        try:
            text, marks = self.template.render_marked(messages)
        except TemplateRefuses:
            return True
        return bool(marks) and all(
            any(answer in text[start:end] for answer in answers) for start, end in marks or ()
        )

    def _marked(self, example: Example, conversation: Conversation) -> Spanned:
        """The marked blocks of supervised turns."""
        text, marks = self.template.render_marked(conversation.messages, example.tools)
        marks, supervised = list(marks or ()), example.supervised_turns
        spoken = [index for index, turn in enumerate(example.turns) if turn.role == "assistant"]
        if self.skip_end:
            marks = [(start, self.closing.without(text, start, end)) for start, end in marks]
        if len(marks) == len(spoken):
            answers = {
                index: Answer(start, end, end)
                for index, (start, end) in zip(spoken, marks, strict=True)
                if index in supervised
            }
            return self._spanned(example, text, answers)
        if supervised != spoken:
            answers = {i: self._prove(conversation, i, text, example.turns) for i in supervised}
            marks = [
                (start, end)
                for start, end in marks
                if any(start < answer.stop and end > answer.start for answer in answers.values())
            ]
        losses, thoughts = self._losses(example, text, {})
        return Spanned(text, marks, losses, thoughts)

    def _spanned(
        self,
        example: Example,
        text: str,
        answers: Mapping[int, Answer],
        verbatim: Any = (),
    ) -> Spanned:
        """`verbatim` are the turns whose texts stand there as they are."""
        ends = [(a.start, a.end if self.skip_end else a.stop) for a in answers.values()]
        losses, thoughts = self._losses(example, text, answers, verbatim)
        return Spanned(text, ends, losses, thoughts)

    def _losses(
        self, example: Example, text: str, answers: Mapping[int, Answer], verbatim: Any = ()
    ) -> tuple[tuple[str, ...], int]:
        losses, thoughts = list[str](), 0
        for index, turn in enumerate(example.turns):
            answer = answers.get(index)
            shown = text[answer.start : answer.end] if answer else text
            thought, spoken = thought_in(turn)
            thoughts += bool(thought)
            if index not in verbatim:
                if thought and thought not in shown:
                    losses.append("thought")
                if not _shows(shown, spoken):
                    losses.append("answer" if answer else turn.role)
            losses += ["name"] * self._hides_name(turn, text)
        if example.tools and "tools" not in self.template.names:
            losses.append("tools")
        return tuple(losses), thoughts

    def _hides_name(self, turn: Turn, text: str) -> bool:
        """Whether the template does not show who speaks; a tool's name is with its call."""
        name = turn.message.get("name") if turn.beside and turn.role != "tool" else None
        return name is not None and ("name" not in self.template.names or name not in text)

    def _prove_shape(self, roles: tuple[Role, ...]) -> Shape | None:
        """By stand-ins for all texts. None where the template refuses them."""
        turns = [Turn(role, STAND_IN.format(index)) for index, role in enumerate(roles)]
        conversation = Conversation(self.template, [turn.message for turn in turns])
        try:
            text = self.template.render(conversation.messages)
        except TemplateRefuses:
            return None
        matches = list(_STAND_IN.finditer(text))
        order = [int(match[1]) for match in matches]
        bounds = [0, *(edge for match in matches for edge in match.span()), len(text)]
        literals = [text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        answers = dict[int, Answer]()
        for position, index in enumerate(order):
            if roles[index] != "assistant" or order.count(index) > 1:
                continue
            start, end = matches[position].span()
            try:
                answer = self._prove(conversation, index, text, turns)
            except NotProved:
                continue
            within = (
                bounds[2 * position] <= answer.start and answer.stop <= bounds[2 * position + 3]
            )
            if within and answer.start <= start and answer.end == end:
                begins = answer.start - start
                answers[index] = Answer(begins, 0, answer.stop - end, answer.opening)
        return Shape(literals, order, answers)

    def _prove(
        self, conversation: Conversation, index: int, text: str, turns: Sequence[Turn]
    ) -> Answer:
        """Raises NotProved."""
        answer = self._by_text(conversation, index, text, bool(thought_in(turns[index])[0]))
        if turns[index].calls:
            answer = answer or self._by_call(conversation, index, text)
            names = [call["function"]["name"] for call in turns[index].calls]
            shown = text[answer.start : answer.stop] if answer else text
            if any(name not in shown for name in names):
                raise NotProved(f"does not show the tool call of turn {index + 1}")
        if not answer:
            raise NotProved(f"changes turn {index + 1} beyond recognition")
        return answer

    def _by_text(
        self, conversation: Conversation, index: int, text: str, thinks: bool
    ) -> Answer | None:
        """Another text as the answer, and the rest the same. An answer that `thinks` may begin
        where it leaves a generation prompt with an empty thought."""
        stand_in = _absent_from(text)
        message = {"role": "assistant", "content": stand_in}
        head, match, tail = (conversation.with_turn(index, message) or "").partition(stand_in)
        if not match or stand_in in tail or not text.endswith(tail):
            return None
        end, opening = len(text) - len(tail), ""
        prompt = conversation.prompt(index) if self.closing.has_prompt else None
        if prompt is None:
            head = head.rstrip(" ")
        elif text.startswith(prompt):
            head = prompt
        else:  # earlier turns look otherwise once there are later ones
            ended = conversation.with_turn(index, message, last=True) or ""
            before = ended.partition(stand_in)[0]
            if before.startswith(prompt):
                head = head.removesuffix(before[len(prompt) :])
            elif prompt.startswith(head):
                opening = prompt[len(head) :]
            elif head.endswith(self.closing.header + self.closing.lead):
                head = head.removesuffix(self.closing.lead)
        if prompt is not None and thinks and not text.startswith(head):
            earlier, head = (
                conversation.before(index) or prompt,
                os.path.commonprefix([text, prompt]),
            )
            if len(earlier) >= len(head):
                return None
        if not text.startswith(head) or len(head) > end:
            return None
        return Answer(len(head), end, end + self.closing.length(tail), opening)

    def _by_call(self, conversation: Conversation, index: int, text: str) -> Answer | None:
        """The same tool call with other arguments, and the rest the same."""
        stand_in, message = _absent_from(text), conversation.messages[index]
        changed = [_other_call(message, name) for name in (stand_in, stand_in[::-1])]
        texts = [text, *(conversation.with_turn(index, other) or "" for other in changed)]
        start = self._start_of_call(conversation, index, texts, changed)
        if not all(texts) or start is None:
            return None
        ended = [conversation.with_turn(index, other, last=True) or "" for other in changed]
        tail = _common_end(texts)
        end, stop = self.closing.of_call(os.path.commonprefix([tail, _common_end(ended)]))
        return Answer(start, len(text) - len(tail) + end, len(text) - len(tail) + stop)

    def _start_of_call(
        self,
        conversation: Conversation,
        index: int,
        texts: Sequence[str],
        changed: Sequence[Message],
    ) -> int | None:
        """Where a tool call begins in the first of `texts`, which differ in it alone."""
        prompt = conversation.prompt(index) if self.closing.has_prompt else None
        if prompt is None:  # as a text would begin there
            message = {"role": "assistant", "content": STAND_IN}
            written = conversation.with_turn(index, message, last=True) or ""
            prompt = written.partition(STAND_IN)[0].rstrip(" ")
        if prompt and texts[0].startswith(prompt):
            return len(prompt)
        alike = [conversation.messages[index], *changed]
        ended = [conversation.with_turn(index, other, last=True) or "" for other in alike]
        head, before = os.path.commonprefix(texts), os.path.commonprefix(ended)
        written = before.removeprefix(prompt)
        if not prompt or not before.startswith(prompt) or not head.endswith(written):
            return None
        return len(head) - len(written)


def thought_in(turn: Turn) -> tuple[str, str]:
    """The thought of an answer, and what it says after it."""
    if turn.role != "assistant":
        return "", turn.text.strip()
    before, end, after = turn.text.rpartition(_THOUGHT_END)
    thought = before.strip().removeprefix("<think>").strip() if end else ""
    return thought or turn.thought.strip(), after.strip()


def _shows(text: str, content: str) -> bool:
    """Whether a text has a content as it is, or as JSON."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _absent_from(text: str) -> str:
    """A stand-in that does not occur in the text."""
    number = 0
    while (stand_in := STAND_IN.format(number)) in text or stand_in[::-1] in text:
        number += 1
    return stand_in


def _other_call(message: Message, text: str) -> Message:
    """The message with a text as the argument of each call. Their names stay: some templates repeat
    them with the result."""
    calls = [
        {**call, "function": {**call["function"], "arguments": {text: text}}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _common_end(texts: Sequence[str]) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]

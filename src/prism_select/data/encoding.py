"""Encoding: an example to tokens, and which of them are supervised.

    chat    <|user|>1 + 1?<|end|><|assistant|>2<|end|>      supervised: 2<|end|>
    plain   <s>1 + 1?⏎2</s>                                 supervised: 2</s>

Choices made here:
- chat is the tokenizer's own template, rendered once; an assistant turn is supervised from the end
  of its generation prompt to its end-of-turn token;
- plain is BOS (if the tokenizer adds one), the turns, a line break after a prompt that does not end
  in white space, and EOS after each answer; a bare text is supervised from end to end;
- a special token that the text already carries is not doubled;
- `skip_end` leaves end-of-turn tokens in the text, but not supervised;
- a long row loses its end.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prism_select.data.records import Example, Turn
from prism_select.run.errors import BadModel, BadRow, MissingChatTemplate

__all__ = ["Encoded", "Encoder"]

STAND_IN = "␟prism␟"  # an answer that no template changes or contains


@dataclass(frozen=True, slots=True)
class Encoded:
    """`tokens[i]` is supervised where `supervised[i]`; `targets` counts the supervised tokens that
    have a context."""

    tokens: Sequence[int]
    supervised: Sequence[bool]
    truncated: bool

    @property
    def targets(self) -> int:
        return sum(self.supervised[1:])


class Encoder:
    """Examples to tokens. Raises MissingChatTemplate where `template` is chat and the tokenizer has
    none, and BadModel for a token that is not among the `vocabulary` tokens of the model."""

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        max_length: int,
        vocabulary: int | None = None,
        skip_end: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.vocabulary = tokenizer, max_length, vocabulary
        self.skip_end = skip_end
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.explicit = template != "auto"
        self.template = template if self.explicit else ("chat" if has_template else "plain")
        if self.template == "chat" and not has_template:
            raise MissingChatTemplate(
                "--template chat: the tokenizer has no chat template; try --template plain"
            )
        if not tokenizer.is_fast:
            raise BadModel(
                f"{type(tokenizer).__name__} is a slow tokenizer without token offsets; save it as "
                "a fast one"
            )
        bare, marked = self._ids("a"), list(tokenizer("a").input_ids)
        self.prefix = marked[: marked.index(bare[0])] if bare and bare[0] in marked else []

    def encode(self, example: Example) -> Encoded:
        """Raises BadRow where no supervised token remains, or the chat template refuses the
        conversation."""
        raw_text = example.turns[0].role == "text"
        tokens, supervised = (
            self._chat if self.template == "chat" and not raw_text else self._plain
        )(example)
        row = Encoded(
            tokens[: self.max_length], supervised[: self.max_length], len(tokens) > self.max_length
        )
        if not row.targets:
            what = "nothing is supervised"
            if row.truncated:
                length = f"{len(tokens)} tokens after cutting to {self.max_length}"
                what = f"nothing supervised is left of {length}"
            raise _bad(example, what, "raise --max-length or shorten the prompt")
        if self.vocabulary is not None and max(row.tokens) >= self.vocabulary:
            raise BadModel(
                f"{example.file}:{example.line}: the tokenizer makes token {max(row.tokens)} of "
                f"it, and the model knows {self.vocabulary}; they do not belong together: give a "
                "folder with the model's own tokenizer"
            )
        return row

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _plain(self, example: Example) -> tuple[list[int], list[bool]]:
        if example.conversation and not self.explicit:
            raise MissingChatTemplate(
                f"{example.file}:{example.line}: {len(example.turns)} turns of conversation, and "
                "the tokenizer has no chat template; use a tokenizer with one, or --template plain "
                "to join the turns as they are"
            )
        tokens: list[int] = []
        supervised: list[bool] = []
        for index, turn in enumerate(example.turns):
            ids = self._ids(turn.text + _gap(example.turns[index : index + 2]))
            if index == 0 and ids[: len(self.prefix)] != self.prefix:
                tokens, supervised = list(self.prefix), [False] * len(self.prefix)
            answer = turn.role in ("assistant", "text")
            target = answer and index >= example.prompt_turns
            end = self.tokenizer.eos_token_id
            if answer and end is not None and ids[-1:] != [end]:
                ids.append(end)
            tokens += ids
            supervised += [target] * len(ids)
            if self.skip_end and target and ids[-1:] == [end]:
                supervised[-1] = False
        return tokens, supervised

    def _render(self, example: Example, turns: Sequence[Turn], prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a program: it may fail in any way
            what = " ".join(str(error).split())[:300] or type(error).__name__
            what = f"the chat template refuses it: {what}"
            raise _bad(example, what, "mend the turns, or --template plain") from None
        return str(text)

    def _chat(self, example: Example) -> tuple[list[int], list[bool]]:
        rendered = self._render(example, example.turns)
        spans = [
            self._span(example, index, rendered)
            for index, turn in enumerate(example.turns)
            if turn.role == "assistant" and index >= example.prompt_turns
        ]
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        # a token is supervised if a letter of it is in a span: it may begin with the prompt's space
        supervised = [
            any(start < b and end > a for a, b in spans) and end > start
            for start, end in encoded.offset_mapping
        ]
        return list(encoded.input_ids), supervised

    def _span(self, example: Example, index: int, rendered: str) -> tuple[int, int]:
        """Start and end of an assistant turn in the rendered conversation: from the end of its
        generation prompt to the end of its end-of-turn token, without the white space after it. The
        text around the turn is that around a stand-in, since a short answer may occur in it."""
        earlier, content = example.turns[:index], example.turns[index].text.strip()
        head, stand_in, tail = self._render(
            example, (*earlier, Turn("assistant", STAND_IN))
        ).rpartition(STAND_IN)
        prompt = (
            self._render(example, earlier, prompt=True)
            if earlier and self._prompts
            else head.rstrip(" ")
        )
        start = next((len(text) for text in (prompt, head) if rendered.startswith(text)), None)
        since = len(head) if rendered.startswith(head) else start or 0
        if (differs := start is None) and rendered.startswith(
            plain := self._render(example, earlier) if earlier else ""
        ):
            since = len(plain)  # a generation prompt unlike the header of an answered turn
            start = max(since, len(os.path.commonprefix([rendered, prompt])))
        answers = (
            content,
            content.rpartition("</think>")[2].strip(),
        )  # some templates drop thoughts
        matches = (
            (at, at + len(text)) for text in answers if (at := rendered.find(text, since)) >= 0
        )
        match = next(matches, None)
        if not stand_in or start is None or match is None:
            what = f"the chat template changes turn {index + 1} beyond recognition"
            raise _bad(example, what, "try --template plain")
        start, end = min(start, match[0]) if differs else start, match[1]
        if self.skip_end:
            return start, end
        ending = r"\s*" + re.escape(tail.strip()) if tail.strip() else re.escape(tail)
        closing = re.compile(ending).match(rendered, end)
        if not closing and index + 1 < len(example.turns):
            header = prompt[len(self._render(example, earlier)) :] if earlier else head
            if ends := [re.escape(token) for token in self._special if token not in header]:
                closing = re.compile(r"\s*(?:" + "|".join(ends) + ")").match(rendered, end)
        return start, closing.end() if closing else end

    @cached_property
    def _prompts(self) -> bool:
        """Whether the chat template has a generation prompt."""
        probe = Example((Turn("user", STAND_IN),), "", "", "", 0)
        try:
            return self._render(probe, probe.turns, prompt=True) != self._render(probe, probe.turns)
        except BadRow:
            return True

    @cached_property
    def _special(self) -> list[str]:
        return [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special and token.content != self.tokenizer.bos_token
        ]


def _gap(turns: Sequence[Turn]) -> str:
    """The text between a turn and the next in plain text. Without it "2 + 2?" and "4" would be one
    word."""
    if len(turns) < 2 or turns[0].role == "assistant" or not turns[0].text:
        return ""
    return "" if turns[0].text[-1].isspace() or turns[1].text[:1].isspace() else "\n"


def _bad(example: Example, what: str, advice: str) -> BadRow:
    return BadRow(example.file, example.line, what, advice)

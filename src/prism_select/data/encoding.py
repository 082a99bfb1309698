"""TODO."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prism_select.data.records import Example, Turn
from prism_select.run.errors import BadModel, BadRow, MissingChatTemplate

__all__ = ["Encoded", "Encoder"]

STAND_IN = "␟prism␟"  # a text that no template changes and no template holds


@dataclass(frozen=True, slots=True)
class Encoded:
    """`tokens[i]` is supervised where `supervised[i]`; `targets` counts those that have a
    context."""

    tokens: Sequence[int]
    supervised: Sequence[bool]
    truncated: bool

    @property
    def targets(self) -> int:
        return sum(self.supervised[1:])


class Encoder:
    """Examples to tokens. Raises MissingChatTemplate when `template` is chat and the tokenizer has
    none, and BadModel for a token that is not among the first `vocabulary`: those that the model
    knows."""

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
                f"{type(tokenizer).__name__} is a slow tokenizer without token offsets; save it as a fast one"
            )
        bare, marked = self._ids("a"), list(tokenizer("a").input_ids)
        self.prefix = marked[: marked.index(bare[0])] if bare and bare[0] in marked else []

    def encode(self, example: Example) -> Encoded:
        """Raises BadRow when nothing supervised is left, or the chat template refuses the
        conversation."""
        raw_text = example.turns[0].role == "text"
        tokens, supervised = (
            self._chat if self.template == "chat" and not raw_text else self._plain
        )(example)
        kept = Encoded(
            tokens[: self.max_length], supervised[: self.max_length], len(tokens) > self.max_length
        )
        if not kept.targets:
            why = f"nothing supervised is left of {len(tokens)} tokens after cutting to {self.max_length}"
            what = why if kept.truncated else "nothing is supervised"
            raise _bad(example, what, "raise --max-length or shorten the prompt")
        if self.vocabulary is not None and max(kept.tokens) >= self.vocabulary:
            raise BadModel(
                f"{example.file}:{example.line}: the tokenizer makes token {max(kept.tokens)} of it, and the model "
                f"knows {self.vocabulary}; they do not belong together: give a folder with the model's own tokenizer"
            )
        return kept

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _plain(self, example: Example) -> tuple[list[int], list[bool]]:
        if example.conversation and not self.explicit:
            raise MissingChatTemplate(
                f"{example.file}:{example.line}: {len(example.turns)} turns of conversation, and the tokenizer has no "
                "chat template; use a tokenizer with one, or --template plain to join the turns as they are"
            )
        tokens: list[int] = []
        supervised: list[bool] = []
        for place, turn in enumerate(example.turns):
            ids = self._ids(turn.text + _gap(example.turns[place : place + 2]))
            if place == 0 and ids[: len(self.prefix)] != self.prefix:
                tokens, supervised = list(self.prefix), [False] * len(self.prefix)
            learned = turn.role in ("assistant", "text") and place >= example.prompt_turns
            end = self.tokenizer.eos_token_id
            if turn.role in ("assistant", "text") and end is not None and ids[-1:] != [end]:
                ids.append(end)
            tokens += ids
            supervised += [learned] * len(ids)
            if self.skip_end and learned and ids[-1:] == [end]:
                supervised[-1] = False
        return tokens, supervised

    def _render(self, example: Example, turns: Sequence[Turn], prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            )
        except (
            Exception
        ) as error:  # a template is a program of the model's folder: it may fail in every way
            what = " ".join(str(error).split())[:300] or type(error).__name__
            raise _bad(
                example,
                f"the chat template refuses it: {what}",
                "mend the turns, or --template plain",
            ) from None

    def _chat(self, example: Example) -> tuple[list[int], list[bool]]:
        whole = self._render(example, example.turns)
        spans = [
            self._span(example, place, whole)
            for place, turn in enumerate(example.turns)
            if turn.role == "assistant" and place >= example.prompt_turns
        ]
        coded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        # a token of which a part is inside, since a word may begin with a space that is still the
        # prompt's
        inside = [
            any(start < b and end > a for a, b in spans) and end > start
            for start, end in coded.offset_mapping
        ]
        return list(coded.input_ids), inside

    def _span(self, example: Example, place: int, whole: str) -> tuple[int, int]:
        """Where an assistant turn stands in the rendered conversation: after its generation prompt,
        up to and with its end-of-turn token but without the white space that follows it. What
        stands around a turn is seen on a stand-in for it, since a short answer may also occur
        there."""
        earlier, content = example.turns[:place], example.turns[place].text.strip()
        head, there, tail = self._render(
            example, (*earlier, Turn("assistant", STAND_IN))
        ).rpartition(STAND_IN)
        before = (
            self._render(example, earlier, prompt=True)
            if earlier and self._prompts
            else head.rstrip(" ")
        )
        start = next((len(text) for text in (before, head) if whole.startswith(text)), None)
        since = len(head) if whole.startswith(head) else start or 0
        if (other := start is None) and whole.startswith(
            plain := self._render(example, earlier) if earlier else ""
        ):
            since = len(plain)  # a prompt that goes on otherwise in a conversation
            start = max(since, len(os.path.commonprefix([whole, before])))
        answers = (
            content,
            content.rpartition("</think>")[2].strip(),
        )  # some templates drop what was thought before it
        found = next(
            ((at, at + len(text)) for text in answers if (at := whole.find(text, since)) >= 0), None
        )
        if not there or start is None or found is None:
            raise _bad(
                example,
                f"the chat template changes turn {place + 1} beyond recognition",
                "try --template plain",
            )
        start, end = min(start, found[0]) if other else start, found[1]
        if self.skip_end:
            return start, end
        closing = re.compile(
            r"\s*" + re.escape(tail.strip()) if tail.strip() else re.escape(tail)
        ).match(whole, end)
        if not closing and place + 1 < len(example.turns):
            header = before[len(self._render(example, earlier)) :] if earlier else head
            ends = [token for token in self._special if token not in header]
            closing = (
                re.compile(r"\s*(?:" + "|".join(map(re.escape, ends)) + ")").match(whole, end)
                if ends
                else None
            )
        return start, closing.end() if closing else end

    @cached_property
    def _prompts(self) -> bool:
        """Whether the chat template knows a generation prompt."""
        asked = Example((Turn("user", STAND_IN),), "", "", "", 0)
        try:
            return self._render(asked, asked.turns, prompt=True) != self._render(asked, asked.turns)
        except BadRow:
            return True

    @cached_property
    def _special(self) -> list[str]:
        known = self.tokenizer.added_tokens_decoder.values()
        return [
            token.content
            for token in known
            if token.special and token.content != self.tokenizer.bos_token
        ]


def _gap(turns: Sequence[Turn]) -> str:
    """What stands between a turn and the next in plain text. Without it "2 + 2?" and "4" would be
    one word."""
    if len(turns) < 2 or turns[0].role == "assistant" or not turns[0].text:
        return ""
    return "" if turns[0].text[-1].isspace() or turns[1].text[:1].isspace() else "\n"


def _bad(example: Example, what: str, advice: str) -> BadRow:
    return BadRow(example.file, example.line, what, advice)

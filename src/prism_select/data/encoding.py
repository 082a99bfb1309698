"""Encoding: an example to tokens, and which of them are supervised.

    chat    <|user|>1 + 1?<|end|><|assistant|>2<|end|>      supervised: 2<|end|>
    plain   <s>1 + 1?⏎2</s>                                 supervised: 2</s>

Choices made here:
- chat is the tokenizer's own template, rendered once; `chat_spans.py` finds the answers in it;
- plain is BOS (if the tokenizer adds one), the turns, a line break after a prompt that does not end
  in white space, and EOS after each answer; a bare text is supervised from end to end;
- a text is tokenised once, as a whole; a token with a letter of an answer is supervised;
- a special token that the text already carries is not doubled;
- `skip_end` leaves end-of-turn tokens in the text, but not supervised;
- a long row loses its end.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import eq
from typing import Any

from prism_select.data.chat_spans import ChatSpans, NotProved, Spanned, thought_in
from prism_select.data.chat_template import ChatTemplate, Span, TemplateRefuses
from prism_select.data.records import Example, Turn
from prism_select.data.template_date import TemplateDate
from prism_select.run.errors import BadModel, BadRow, MissingChatTemplate

__all__ = ["Encoded", "Encoder"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """`tokens[i]` is supervised where `supervised[i]`; `targets` counts the supervised tokens that
    have a context. `losses` and `thoughts` are those of `Spanned`."""

    tokens: Sequence[int]
    supervised: Sequence[bool]
    truncated: bool
    losses: tuple[str, ...] = ()
    thoughts: int = 0

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
        date: str | None = None,
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
        self.date = TemplateDate(tokenizer if self.template == "chat" else None, date)
        if not tokenizer.is_fast:
            raise BadModel(
                f"{type(tokenizer).__name__} is a slow tokenizer without token offsets; save it as "
                "a fast one"
            )
        if self.template == "chat":
            self._chat = ChatSpans(ChatTemplate(tokenizer, self.date), skip_end)
        bare, marked = self._ids("a"), list(tokenizer("a").input_ids)
        self.prefix = marked[: marked.index(bare[0])] if bare and bare[0] in marked else []

    def encode(self, example: Example) -> Encoded:
        """Raises BadRow where no supervised token remains, or the chat template refuses the
        conversation."""
        spanned = self._spanned(example)
        coded = self.tokenizer(spanned.text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, supervised = list(coded.input_ids), _covered(coded.offset_mapping, spanned.spans)
        if not self._is_chat(example) and tokens[: len(self.prefix)] != self.prefix:
            tokens, supervised = (
                [*self.prefix, *tokens],
                [False] * len(self.prefix) + supervised,
            )
        row = Encoded(
            tokens[: self.max_length],
            supervised[: self.max_length],
            len(tokens) > self.max_length,
            spanned.losses,
            spanned.thoughts,
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

    def misread(self, example: Example) -> str | None:
        """How the text of an example differs when it is read back from its tokens; None where it
        does not. With a chat template white space does not count: the template's own tokens may
        take some. Raises BadRow."""
        text = self._spanned(example).text
        decoded = str(
            self.tokenizer.decode(
                self._ids(text), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        if self._is_chat(example):
            text, decoded = "".join(text.split()), "".join(decoded.split())
        if text == decoded:
            return None
        differ = (i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b)
        start = max(0, next(differ, min(len(text), len(decoded))) - 12)
        return f"{text[start : start + 24]!r} reads back as {decoded[start : start + 24]!r}"

    def _is_chat(self, example: Example) -> bool:
        return self.template == "chat" and example.turns[0].role != "text"

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _spanned(self, example: Example) -> Spanned:
        """The text of an example, and its supervised spans."""
        if not self._is_chat(example):
            return self._plain(example)
        try:
            return self._chat(example)
        except TemplateRefuses as refusal:
            what = f"the chat template refuses it: {refusal}"
            raise _bad(example, what, "mend the turns, or --template plain") from None
        except NotProved as why:
            raise _bad(example, f"the chat template {why}", "try --template plain") from None

    def _plain(self, example: Example) -> Spanned:
        if example.conversation and not self.explicit:
            raise MissingChatTemplate(
                f"{example.file}:{example.line}: {len(example.turns)} turns of conversation, and "
                "the tokenizer has no chat template; use a tokenizer with one, or --template plain "
                "to join the turns as they are"
            )
        text, spans, losses = "", list[Span](), list[str]()
        supervised, end = example.supervised_turns, self.tokenizer.eos_token or ""
        for index, turn in enumerate(example.turns):
            if turn.beside and turn.calls:
                advice = "write the call into the content, as text, or use a chat template"
                raise _bad(example, f"turn {index + 1} is a tool call, which is not text", advice)
            if turn.beside:
                losses += ["thought"] * bool(turn.thought)
                losses += ["name"] * ("name" in turn.message and turn.role != "tool")
            start = len(text)
            text += turn.text + _gap(example.turns[index : index + 2])
            if turn.role in ("assistant", "text"):
                text += "" if end and text[start:].endswith(end) else end
            if index in supervised:
                stop = len(text) - len(end) if self.skip_end and end else len(text)
                spans.append((start, stop))
        losses += ["tools"] * bool(example.tools)
        thoughts = sum(bool(thought_in(turn)[0]) for turn in example.turns)
        return Spanned(text, spans, tuple(losses), thoughts)


def _gap(turns: Sequence[Turn]) -> str:
    """The text between a turn and the next in plain text. Without it "2 + 2?" and "4" would be one
    word."""
    if len(turns) < 2 or turns[0].role == "assistant" or not turns[0].text:
        return ""
    return "" if turns[0].text[-1].isspace() or turns[1].text[:1].isspace() else "\n"


def _covered(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token has a character of a span. A token may begin with the space of the prompt;
    one without characters, as some tokenizers have them for white space, has those between its
    neighbours, or stands before the next character."""
    covered = [False] * len(offsets)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    if any(map(eq, starts, ends)):
        starts, ends = _widened(starts, ends)
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        covered[first:last] = [True] * max(0, last - first)
    return covered


def _widened(starts: Sequence[int], ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """The offsets with the characters between two tokens given to those between them."""
    before = list(accumulate(ends, max, initial=0))
    real = [start if start < end else None for start, end in zip(starts, ends, strict=True)]
    widened_starts, widened_ends, following = list[int](), list[int](), ends[-1] + 1
    for index in reversed(range(len(starts))):
        start = real[index]
        if start is not None:
            following = start
        widened_starts.append(min(before[index], following) if start is None else start)
        widened_ends.append(max(following, before[index] + 1) if start is None else ends[index])
    return widened_starts[::-1], widened_ends[::-1]


def _bad(example: Example, what: str, advice: str) -> BadRow:
    return BadRow(example.file, example.line, what, advice)

"""Chat closing: what a chat template writes when an answer is over.

    at the end          … Prism␟1␟zQ<|end|>⏎<|eos|>
    before a user       … Prism␟1␟zQ<|end|>⏎<|user|>…       both: <|end|>
    a user at the end   … Prism␟0␟zQ<|end|>⏎

Choices made here:
- the end of turn is the first token behind an answer, with white space before it or not, that
  stands there at the end of a conversation and before another turn, with those that touch it;
- where the two places differ, each has its own; the token that opens a header is none;
- a template without such a token may close with a text, or with white space, which then counts.
"""

import os
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from prism_select.data.chat_template import ChatTemplate, Message, Span, TemplateRefuses

__all__ = ["Closing"]

USER, ANSWER, NEXT, SYSTEM = (f"Prism␟{name}␟zQ" for name in ("user", "answer", "next", "system"))


@dataclass(frozen=True)
class Closing:
    """`tokens` close an answer, each one token or several in a row; `others` may, and `literal`
    does where there are no tokens. `has_prompt` tells whether the template knows a generation
    prompt; if so, `header` is what that adds, and `lead` what stands between it and an answer."""

    tokens: Sequence[str]
    literal: str
    others: Sequence[str]
    has_prompt: bool
    header: str
    lead: str

    @classmethod
    def of(cls, template: ChatTemplate) -> "Closing":
        """By three short conversations."""
        user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        asked = _render(template, [user])
        prompted = _render(template, [user], prompt=True)
        answered = _render(template, [user, answer])
        at_end = _after(answered, ANSWER)
        before_user = _after(
            _render(template, [user, answer, {**user, "content": NEXT}]), ANSWER
        ).partition(NEXT)[0]
        opened = _render(template, [{"role": "system", "content": SYSTEM}, user])
        has_prompt = prompted != asked or not asked
        openers = _first(template, asked.partition(USER)[0])
        openers |= _first(template, opened.partition(SYSTEM)[0]) if SYSTEM in opened else set()
        # some templates write the header of an answer behind every conversation
        after_user = _after(asked, USER).rstrip()
        headed = (
            not has_prompt
            and bool(after_user and at_end.strip())
            and _after(answered, USER).partition(ANSWER)[0].rstrip() == after_user
            and bool(os.path.commonprefix([at_end.rstrip()[::-1], after_user[::-1]]).strip())
            and not before_user.startswith(at_end.rstrip())
        )
        shared = os.path.commonprefix([at_end, before_user])
        header = prompted.removeprefix(asked) if prompted.startswith(asked) else ""
        headers = openers | _last(template, asked.partition(USER)[0]) | _all(template, header)
        tokens = set[str]()
        if token := _next(template, shared, openers if headed else set()):
            tokens = {token}
        elif not _next(template, shared):
            places = {at_end: openers, before_user: headers} if not headed else {}
            tokens = {token for t, no in places.items() if (token := _next(template, t, no))}
        before = answered.partition(ANSWER)[0]
        lead = before.removeprefix(prompted) if has_prompt and before.startswith(prompted) else ""
        literal = at_end
        if tokens:
            literal = ""
        elif headed:
            literal = shared[: len(shared) - len(shared.lstrip())]
        others = [token for token in template.special_tokens if token not in headers]
        longest_first = sorted(tokens, key=len, reverse=True)
        return cls(longest_first, literal, others, has_prompt, header, lead)

    def length(self, after: str) -> int:
        """The length of the closing with which the text after an answer begins."""
        ending = r"\s*" + re.escape(self.literal.strip())
        if not self.literal.strip():
            ending = re.escape(self.literal)
        patterns = [_of(self.tokens), ending if self.literal else "", _of(self.others)]
        for pattern in filter(None, patterns):
            if match := re.compile(pattern).match(after):
                return match.end()
        return 0

    def of_call(self, text: str) -> Span:
        """Where the end of turn begins and ends in the text between the last argument of a tool
        call and the next turn, or the end. Where it has none, both are its end."""
        if self.tokens and (match := re.compile(_of(self.tokens)).search(text)):
            return match.span()
        end = len(text.rstrip())
        return self.without(text, 0, end), end

    def without(self, text: str, start: int, end: int) -> int:
        """The end of a span without the closing at its end."""
        for tokens in (self.tokens, self.others):
            pattern = re.compile(rf"{_of(tokens)}\s*\Z") if tokens else None
            if pattern and (match := pattern.search(text[start:end])):
                return start + match.start()
        return end


def _of(tokens: Sequence[str]) -> str:
    return rf"\s*(?:{'|'.join(map(re.escape, tokens))})" if tokens else ""


def _render(template: ChatTemplate, messages: Sequence[Message], prompt: bool = False) -> str:
    """The empty text where the template refuses them."""
    try:
        return template.render(messages, prompt=prompt)
    except TemplateRefuses:
        return ""


def _after(text: str, stand_in: str) -> str:
    return text.rpartition(stand_in)[2] if stand_in in text else ""


def _next(template: ChatTemplate, text: str, openers: Set[str] = frozenset()) -> str:
    """The tokens with which a text begins after white space, up to one of `openers`."""
    tokens = [token for token in template.added_tokens if token not in openers]
    match = re.match(f"(?:{'|'.join(map(re.escape, tokens)) or '(?!)'})+", text.lstrip())
    return match[0] if match else ""


def _all(template: ChatTemplate, text: str) -> set[str]:
    return set(re.findall("|".join(map(re.escape, template.added_tokens)) or "(?!)", text))


def _first(template: ChatTemplate, text: str) -> set[str]:
    match = re.search("|".join(map(re.escape, template.added_tokens)) or "(?!)", text)
    return {match[0]} if match else set()


def _last(template: ChatTemplate, text: str) -> set[str]:
    return set(re.findall("|".join(map(re.escape, template.added_tokens)) or "(?!)", text)[-1:])

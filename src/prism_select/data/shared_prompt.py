"""Shared prompt: the prompt of two answers that both begin with it.

    chosen    "…Human: Hi\n\nAssistant: Hello"      prompt "…Human: Hi\n\nAssistant:"
    rejected  "…Human: Hi\n\nAssistant: Go away"    answers " Hello", " Go away"

Choices made here:
- texts part after the last dialogue marker that they share, else after the last shared word;
- conversations part at the first turn that differs;
- something of each answer must remain.
"""

import os.path
import re
from itertools import takewhile

from prism_select.data.records import Turn
from prism_select.data.row_content import RowContent, Turns, stripped

__all__ = ["without_shared_prompt"]

_HH_MARKER = "\n\nAssistant:"  # of Anthropic's HH-RLHF


def without_shared_prompt(row: RowContent) -> tuple[Turns, Turns, Turns]:
    """Prompt, chosen and rejected. Raises BadRow where they share no prompt."""
    chosen, rejected = row.answer("chosen"), row.answer("rejected")
    texts = [
        value for value in (row.value("chosen"), row.value("rejected")) if isinstance(value, str)
    ]
    if len(texts) == 1:
        raise row.bad("chosen and rejected: one is text, the other messages")
    if stripped(chosen) == stripped(rejected):
        return (), chosen, rejected
    if texts:
        end = _prompt_length(*texts)
        prompt: Turns = (Turn("user", texts[0][:end]),) if texts[0][:end].strip() else ()
        chosen, rejected = ((Turn("assistant", text[end:]),) for text in texts)
    else:
        steps = zip(chosen, rejected, strict=False)
        prompt = tuple(turn for turn, _ in takewhile(lambda step: step[0] == step[1], steps))
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if any(turns and turns[0].role != "assistant" for turns in (chosen, rejected)):
            raise row.bad("chosen and rejected answer different prompts")
    if not prompt:
        raise row.bad(
            "chosen and rejected share no prefix, so there is no prompt", "add a prompt to each row"
        )
    return prompt, row.supervised(chosen, "chosen"), row.supervised(rejected, "rejected")


def _prompt_length(chosen: str, rejected: str) -> int:
    """Number of letters in the prompt."""
    shared = os.path.commonprefix([chosen, rejected])
    marker = shared.rfind(_HH_MARKER)
    if marker >= 0:
        return marker + len(_HH_MARKER)
    longest = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    for boundary in (r".*\s", r".*\W"):
        if match := re.match(boundary, shared[:longest], re.DOTALL):
            return match.end()
    return 0

"""Messages: one message of a conversation, as files write them, as a turn.

    {"role": "assistant", "content": "4", "weight": 0}   →   Turn("assistant", "4", "", False)
    {"from": "gpt", "value": "4"}                        →   Turn("assistant", "4")
    {"role": "assistant", "tool_calls": […]}             →   Turn("assistant", "", '{"tool_calls"…')

Choices made here:
- `weight` 0 (OpenAI, Mistral), `train` or `training` false (Axolotl), `loss` false (ms-swift) and
  their like leave an answer in the conversation, and not supervised; a weight between 0 and 1 is
  refused;
- a thought (`reasoning_content`, `thinking`, `reasoning`), tool calls, the id of a call and a name
  go to the chat template under their own names;
- the arguments of a tool call become an object, as servers hand them to the template;
- whatever else a message has is named by `unread_keys`.
"""

import json
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prism_select.data.fields import is_empty, without_nulls
from prism_select.data.records import BESIDE, THOUGHTS, Role, Turn, is_text

__all__ = ["BadMessage", "turn_of", "type_in_words", "unread_keys"]

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
CALL_ROLE = "function_call"  # of ShareGPT files: an assistant whose text is the call, as JSON
FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "step_loss_mask")
PLAIN = {"role", "from", "content", "value"}
READ = {*PLAIN, "function_call", *BESIDE, *FLAGS}
_TYPES = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
    list: "a list",
}
_MEND = "mend the row or remove it"
_CALL_ADVICE = 'write it as {"function": {"name": …, "arguments": {…}}}'


class BadMessage(Exception):
    """`what` goes on from the name of the message: `messages[2]` + `: no role`."""

    def __init__(self, what: str, advice: str = _MEND) -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


def turn_of(value: object, in_table: Callable[[], bool] = lambda: False) -> Turn:
    """The turn that a message is. A table fills in null wherever an object lacks a key; `in_table`
    is asked for tool calls alone. Raises BadMessage for whatever cannot be read."""
    if not isinstance(value, Mapping):
        raise BadMessage(f": {type_in_words(value)} where a message was expected")
    name, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if len(value) == 2 and isinstance(content, str) and isinstance(name, str) and name in ROLES:
        return Turn(ROLES[name], _string(content, " content"))  # most messages
    message = {key: content for key, content in value.items() if not is_empty(content)}
    if message.get("role", message.get("from")) == CALL_ROLE:
        call = message.get("content", message.get("value"))
        message = {**message, "from": "assistant", "function_call": _parsed(call), "content": ""}
        message.pop("role", None)
    role = _role(message.get("role", message.get("from")))
    extras = {key: message[key] for key in BESIDE if key in message}
    if extras or "function_call" in message:
        extras = _checked(message, extras, in_table)
    content = message.get("content", message.get("value"))
    if content is None and ("tool_calls" in extras or extras.keys() & set(THOUGHTS)):
        content = ""
    beside = json.dumps(extras, ensure_ascii=False) if extras else ""
    supervised = role != "assistant" or _is_supervised(message)
    return Turn(role, text_of(content), beside, supervised)


def _role(name: object) -> Role:
    if isinstance(name, str) and (role := ROLES.get(name)):
        return role
    what = "no role" if name is None else f"unknown role {reprlib.repr(name)}"
    raise BadMessage(f": {what}", f"use one of {', '.join(ROLES)}")


def text_of(content: object) -> str:
    """The text of a message, which may be a list of blocks of text."""
    if not isinstance(content, list):
        return _string(content, " content")
    blocks = [
        block if isinstance(block, Mapping) else {"type": type_in_words(block)} for block in content
    ]
    types = [block.get("type") for block in blocks if block.get("type") != "text"]
    if types:
        what = f"a part of type {reprlib.repr(types[0])} where text was expected"
        raise BadMessage(f" content: {what}")
    return "".join(_string(block.get("text"), " content") for block in blocks)


def _string(value: object, label: str) -> str:
    if not isinstance(value, str):
        raise BadMessage(f"{label}: {type_in_words(value)} where text was expected")
    if not is_text(value):
        raise BadMessage(f"{label}: not valid text: lone surrogate")
    return value


def _is_supervised(message: Mapping[str, object]) -> bool:
    """Whether no key of an assistant's message says otherwise."""
    for key in FLAGS:
        value = message.get(key, True)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadMessage(
                f": {key} {reprlib.repr(value)} where 0, 1, true or false was expected",
                "an answer counts or it does not; nothing is weighted in between",
            )
        if not value:
            return False
    return True


def _checked(
    message: Mapping[str, Any], extras: Mapping[str, Any], in_table: Callable[[], bool]
) -> dict[str, Any]:
    """What a message says beside its content, with its tool calls in their common form."""
    checked = {
        key: _string(value, f" {key}") for key, value in extras.items() if key != "tool_calls"
    }
    calls = extras.get("tool_calls", [])
    if "function_call" in message:
        calls = [message["function_call"]]
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise BadMessage(f" tool_calls: {type_in_words(calls)} where a list was expected")
    if calls:
        filled = in_table()
        return {**checked, "tool_calls": [_call(call, filled) for call in calls]}
    return checked


def _call(value: object, filled: bool) -> dict[str, Any]:
    """A tool call with its arguments as an object; a bare function gets the form of a call."""
    call: Any = without_nulls(value) if filled else value
    if isinstance(call, Mapping) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadMessage(": a tool call without the name of a function", _CALL_ADVICE)
    arguments = _parsed(function.get("arguments") or {})
    called = {**dict(call), "function": {**function, "arguments": arguments}}
    try:
        text = json.dumps(called, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BadMessage(f": a tool call that is no JSON ({error})", _CALL_ADVICE) from None
    if not is_text(text):
        raise BadMessage(": a tool call, not valid text: lone surrogate")
    return called


def _parsed(value: object) -> object:
    """The JSON object that a text is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, Mapping):
        what = f": a tool call whose text is no JSON object: {reprlib.repr(value)}"
        raise BadMessage(what, _CALL_ADVICE)
    return parsed


def unread_keys(messages: Iterable[object]) -> list[str]:
    """The keys of messages that nothing reads, in the order in which they come up; a key that asks
    to supervise a turn that is no answer is one of them."""
    keys: dict[str, None] = {}
    for message in messages:
        if not isinstance(message, Mapping) or message.keys() <= PLAIN:
            continue
        role = message.get("role", message.get("from"))
        answers = role == CALL_ROLE or (isinstance(role, str) and ROLES.get(role) == "assistant")
        for key, value in message.items():
            if is_empty(value):
                continue
            if key not in READ:
                keys[key] = None
            elif key in FLAGS and value and not answers:
                keys[f"{key} of {role}"] = None
    return list(keys)


def type_in_words(value: object) -> str:
    if isinstance(value, float) and is_empty(value):
        return "NaN"
    return (
        "an object" if isinstance(value, Mapping) else _TYPES.get(type(value), type(value).__name__)
    )

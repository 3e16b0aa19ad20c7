"""Conversations: what a record must hold, the template that turns it into text, and the tokens that are learnt.

A turn is `<|im_start|>role`, a newline, the content, `<|im_end|>` and a newline; the two markers are settings. Each
part is tokenized by itself. So no token spans the border between a prompt and an answer, and text in a message that
looks like a marker remains text.

What is no plain text becomes content. Tools stand in the first system turn, one JSON object per line between `<tools>`
and `</tools>`. A call is `{"name": ..., "arguments": ...}` between `<tool_call>` and `</tool_call>`, after what the
assistant says; its result is a turn of the role `tool`. Reasoning stands between `<think>` and `</think>` before the
answer. Ids are left out, because calls and results are in order. A record with a field that would be lost, such as an
image, is refused.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from train.data.files import shown

if TYPE_CHECKING:  # the config reads the names of the formats, of which these are some
    from train.config import DataConfig
    from train.data.tokenizer import Tokenizer

SYSTEM, USER, LEARNT, TOOL = "system", "user", "assistant", "tool"
CALL = "function_call"  # ShareGPT's role of an assistant's turn that is a call
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": LEARNT, "tool": TOOL, "function": TOOL}
SHAREGPT_ROLES = {**ROLES, "human": USER, "gpt": LEARNT, "observation": TOOL, CALL: LEARNT}
REASONING = ("reasoning_content", "reasoning", "thinking")
IDS = ("id", "tool_call_id")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # of records; their text would be learnt without them


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str
    weight: int = 1  # 0: not learnt, even though it is the assistant's

    @property
    def learnt(self) -> bool:
        """Whether its content and the end of its turn are learnt."""
        return self.role == LEARNT and self.weight == 1


class Layout(NamedTuple):
    """One of the ways in which people write conversations down."""

    fields: tuple[str, ...]  # that a record must have
    parse: Callable[[dict[str, Any]], list[Message]]


def parse(record: Any, layout: str = "chat") -> list[Message]:
    """The messages of a record, with its system prompt and its tools.

    Args:
      record: of the layout "chat": `{"messages": [{"role": ..., "content": ...}, ...]}`, as of OpenAI and Hugging Face;
        "sharegpt": `{"conversations": [{"from": ..., "value": ...}, ...]}`; "prompt-completion": `{"prompt": ...,
        "completion": ...}`, of strings or of lists of messages, of which only the completion's are learnt. Any may have
        "system" (text) and "tools" (a list, or the JSON of one) beside these. Other fields say something about the
        conversation and are not read.
      layout: its name in `LAYOUTS`.

    Raises:
      ValueError: there are no messages, one has something that cannot be learnt as text, or nothing is to be learnt.
    """
    record = record if isinstance(record, dict) else {}
    own = LAYOUTS[layout]
    if any(record.get(field) is None for field in own.fields):
        others = [name for name, other in LAYOUTS.items() if all(record.get(field) for field in other.fields)]
        hint = f": it looks like data.format = {others[0]}" if others else ""
        what = "no list of messages in field" if len(own.fields) == 1 else "nothing in one of the fields"
        raise ValueError(f"{what} {' and '.join(map(repr, own.fields))}{hint}")
    for field in MEDIA:
        if record.get(field):
            raise ValueError(f"field {field!r}, which is not text")
    if record.get("label") is False:
        raise ValueError("field 'label' is false: an answer that is not to be learnt")
    messages = _opening(record) + own.parse(record)
    if all(message.role != LEARNT for message in messages):
        raise ValueError(f"no message of role {LEARNT!r}")
    if not any(message.learnt for message in messages):
        raise ValueError(f"every message of role {LEARNT!r} has weight 0")
    return _with_tools(messages, record)


def fields_of(layout: str) -> tuple[str, ...]:
    """All fields of a record that `parse` reads."""
    return (*LAYOUTS[layout].fields, "system", "tools", "functions", "label", *MEDIA)


def _chat(record: dict[str, Any]) -> list[Message]:
    return _messages(record["messages"], "messages")


def _sharegpt(record: dict[str, Any]) -> list[Message]:
    return _messages(record["conversations"], "conversations", SHAREGPT_ROLES, {"from": "role", "value": "content"})


def _prompt_completion(record: dict[str, Any]) -> list[Message]:
    sides = []
    for field, role in (("prompt", USER), ("completion", LEARNT)):
        found = record[field]
        sides.append([Message(role, found)] if isinstance(found, str) else _messages(found, field))
    prompt, completion = sides
    return [message._replace(weight=0) if message.role == LEARNT else message for message in prompt] + completion


LAYOUTS = {
    "chat": Layout(("messages",), _chat),
    "sharegpt": Layout(("conversations",), _sharegpt),
    "prompt-completion": Layout(("prompt", "completion"), _prompt_completion),
}


def _opening(record: dict[str, Any]) -> list[Message]:
    system = record.get("system")
    if not isinstance(system, str | None):
        raise ValueError(f"field 'system' is {shown(system)}, not text")
    return [Message(SYSTEM, system)] if system else []


def _with_tools(messages: list[Message], record: dict[str, Any]) -> list[Message]:
    """The messages with the record's tools at the end of the first system turn."""
    tools = record.get("tools") or record.get("functions")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"field 'tools' is no JSON: {error}") from error
    if not tools:
        return messages
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"field 'tools' is {shown(tools)}, not a list of objects")
    listed = "\n".join(["<tools>", *map(_dump, tools), "</tools>"])
    if messages[0].role != SYSTEM:
        return [Message(SYSTEM, listed), *messages]
    return [messages[0]._replace(content=f"{messages[0].content}\n\n{listed}"), *messages[1:]]


def _messages(
    found: Any, field: str, roles: Mapping[str, str] = ROLES, names: Mapping[str, str] = MappingProxyType({})
) -> list[Message]:
    """The messages of a list; `names` says which of our fields other names stand for."""
    if not isinstance(found, list) or not found:
        raise ValueError(f"no list of messages in field {field!r}")
    messages = []
    for i, message in enumerate(found):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is no object with role and content")
        # Tables have every field in every row, so that a field without a value is one that is not there.
        values = {names.get(key, key): x for key, x in message.items() if x is not None and x != []}
        try:
            messages.append(_message(values, roles))
        except ValueError as error:
            raise ValueError(f"message {i} has {error}") from error
    return messages


def _message(values: dict[str, Any], roles: Mapping[str, str]) -> Message:
    """A message; ValueError says what it has that is wrong."""
    said = values.pop("role", None)
    if not isinstance(said, str) or said not in roles:
        raise ValueError(f"role {shown(said)}, not one of {', '.join(roles)}")
    role = roles[said]
    weight = values.pop("weight", 1)
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise ValueError(f"weight {shown(weight)}, not 0 or 1")
    for key in IDS:
        values.pop(key, None)
    if role == TOOL:
        values.pop("name", None)  # of the function, which the call names
    content = _content(values)
    if said == CALL:
        content = _tagged_call(content)
    if role == LEARNT:
        content = _answer(content, values)
    if content is None:
        raise ValueError("no text in field 'content'")
    if values:
        raise ValueError(f"field {shown(next(iter(values)))}, which would be lost")
    return Message(role, content, int(weight) if role == LEARNT else 1)


def _content(values: dict[str, Any]) -> str | None:
    content = values.pop("content", None)
    if isinstance(content, str | None):
        return content
    if not isinstance(content, list):
        raise ValueError("no text in field 'content'")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise ValueError(f"a part of type {shown(kind)}, not text")
        texts.append(part[kind])
    return "".join(texts)


def _answer(content: str | None, values: dict[str, Any]) -> str | None:
    """What the assistant thinks, says and calls."""
    refusal = values.pop("refusal", None)
    thoughts = [values.pop(key) for key in REASONING if values.get(key)]
    calls = values.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise ValueError(f"tool calls {shown(calls)}, not a list")
    calls = calls + [call for call in [values.pop("function_call", None)] if call]
    for text in (refusal, *thoughts):
        if not isinstance(text, str | None):
            raise ValueError(f"{shown(text)}, which is not text")
    said = [text for text in (content, refusal) if text]
    tagged = [_tagged_call(call) for call in calls]
    thought = "".join(f"<think>\n{text}\n</think>\n\n" for text in thoughts)
    if content is None and not (said or tagged or thought):
        return None
    return thought + "\n".join([*said, *tagged])


def _tagged_call(call: Any) -> str:
    """A call as text, from OpenAI's object, from one of name and arguments, or from the JSON of one."""
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError as error:
            raise ValueError(f"a call that is no JSON: {error}") from error
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a call without the name of a function: {shown(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # models write what is no JSON, and the text is what is learnt
            arguments = json.loads(arguments)
    called = _dump({"name": function["name"], "arguments": {} if arguments is None else arguments})
    return f"<tool_call>\n{called}\n</tool_call>"


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # a table can hold times and bytes
        raise ValueError(f"{shown(value)}, which is no JSON") from error


def to_document(messages: Sequence[Message]) -> bytes:
    """A conversation as a document of a corpus; `from_document` reads it back."""
    return _dump([message[:2] if message.weight == 1 else message for message in messages]).encode("utf-8")


def from_document(document: bytes) -> list[Message]:
    """The conversation that `to_document` wrote."""
    return [Message(*message) for message in json.loads(document)]


def encode(
    messages: Sequence[Message], tokenizer: "Tokenizer", config: "DataConfig"
) -> tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """Token ids of a conversation, and which of them are learnt: content and end of messages that are `learnt`."""
    parts = []
    for message in messages:
        parts += [(part, False) for part in _header(message.role, tokenizer, config)]
        parts.append((tokenizer.encode(message.content), message.learnt))
        parts.append((tokenizer.encode_marker(config.chat_end), message.learnt))
        parts.append((tokenizer.encode("\n"), False))
    ids = np.concatenate([part for part, _ in parts])
    return ids, np.repeat([learnt for _, learnt in parts], [len(part) for part, _ in parts])


def encode_prompt(messages: Sequence[Message], tokenizer: "Tokenizer", config: "DataConfig") -> list[int]:
    """The prompt that a model trained on conversations continues with its answer, with the beginning of text."""
    ids, _ = encode(messages, tokenizer, config)
    return np.concatenate([[tokenizer.bos_id], ids, *_header(LEARNT, tokenizer, config)]).tolist()


def _header(role: str, tokenizer: "Tokenizer", config: "DataConfig") -> list[np.ndarray]:
    return [tokenizer.encode_marker(config.chat_start), tokenizer.encode(f"{role}\n")]

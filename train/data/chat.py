"""Conversations: what a record must hold, the template that turns it into text, and the tokens that are learnt.

A turn is `<|im_start|>role`, a newline, the content, `<|im_end|>` and a newline; the two markers are settings. Each
part is tokenized by itself. So no token spans the border between a prompt and an answer, and text in a message that
looks like a marker remains text.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

if TYPE_CHECKING:  # the config reads the names of the formats, of which this is one
    from train.config import DataConfig
    from train.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
LEARNT = "assistant"


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


def parse(record: Any) -> list[Message]:
    """The messages of a record `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Raises ValueError where there are none, one has an unknown role or content that is no string, or none is the
    assistant's.
    """
    found = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(found, list) or not found:
        raise ValueError("no list of messages in field 'messages'")
    messages = []
    for i, message in enumerate(found):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is no object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {i} has role {role!r}, not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {i} has no text in field 'content'")
        messages.append(Message(role, content))
    if all(message.role != LEARNT for message in messages):
        raise ValueError(f"no message of role {LEARNT!r}")
    return messages


def to_document(messages: Sequence[Message]) -> bytes:
    """A conversation as a document of a corpus; `from_document` reads it back."""
    return json.dumps(messages, ensure_ascii=False).encode("utf-8")


def from_document(document: bytes) -> list[Message]:
    """The conversation that `to_document` wrote."""
    return [Message(*message) for message in json.loads(document)]


def encode(
    messages: Sequence[Message], tokenizer: "Tokenizer", config: "DataConfig"
) -> tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """Token ids of a conversation, and which of them are learnt: the assistant's content and the end of its turn."""
    parts = []
    for message in messages:
        learnt = message.role == LEARNT
        parts += [(part, False) for part in _header(message.role, tokenizer, config)]
        parts += [(tokenizer.encode(message.content), learnt), (tokenizer.encode_marker(config.chat_end), learnt)]
        parts.append((tokenizer.encode("\n"), False))
    ids = np.concatenate([part for part, _ in parts])
    return ids, np.repeat([learnt for _, learnt in parts], [len(part) for part, _ in parts])


def encode_prompt(messages: Sequence[Message], tokenizer: "Tokenizer", config: "DataConfig") -> list[int]:
    """The prompt that a model trained on conversations continues with its answer, with the beginning of text."""
    ids, _ = encode(messages, tokenizer, config)
    return np.concatenate([[tokenizer.bos_id], ids, *_header(LEARNT, tokenizer, config)]).tolist()


def _header(role: str, tokenizer: "Tokenizer", config: "DataConfig") -> list[np.ndarray]:
    return [tokenizer.encode_marker(config.chat_start), tokenizer.encode(f"{role}\n")]

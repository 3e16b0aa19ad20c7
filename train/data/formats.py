"""The formats of data: how a file becomes documents, and a document tokens.

A new format is a `Format` with its name in `FORMATS`. `train.data.files` has the kinds of files, `train.data.chat` the
layouts of conversations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32

from train.data import chat
from train.data.files import RECORD_FILES, JsonLinesFile, Layout, Skip, Source, TextFile, ending, shown

if TYPE_CHECKING:  # the config reads the names of `FORMATS`
    from train.config import DataConfig
    from train.data.tokenizer import Tokenizer

Encoded = tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]


def encode_text(document: bytes, tokenizer: "Tokenizer", config: "DataConfig") -> Encoded:
    """Token ids of a document of plain text, all of which are learnt."""
    ids = tokenizer.encode(document)
    return ids, np.ones(len(ids), dtype=bool)


def encode_conversation(document: bytes, tokenizer: "Tokenizer", config: "DataConfig") -> Encoded:
    """Token ids of a conversation, and which of them are learnt (`train.data.chat`)."""
    return chat.encode(chat.from_document(document), tokenizer, config)


def conversation_texts(document: bytes) -> list[bytes]:
    """What is said in a conversation, without the template."""
    return [message.content.encode("utf-8") for message in chat.from_document(document)]


@dataclasses.dataclass(frozen=True)
class Format:
    """How files of one format are read."""

    open: Callable[[str, "DataConfig"], Source]  # a file by its path
    endings: tuple[str, ...] = ()  # of the files that `data.format = auto` reads so; documents of these are plain text
    encode: Callable[[bytes, "Tokenizer", "DataConfig"], Encoded] = (
        encode_text  # ids of a document, and which are learnt
    )
    texts: Callable[[bytes], list[bytes]] = lambda document: [document]  # what a tokenizer is learnt from
    learns_end: bool = True  # whether the end-of-text token behind a document is learnt


def _texts_in(kind: str) -> Format:
    """Records with the text in one field, in files with an ending of `RECORD_FILES` or of the same kind."""
    file = RECORD_FILES[kind]

    def open_file(path: str, config: "DataConfig") -> Source:
        field = config.text_field
        extract = functools.partial(_field_text, field=field)
        return file(path, Layout((field,), extract, needs=(field,), plain=True))

    return Format(open_file, endings=tuple(end for end, same in RECORD_FILES.items() if same is file))


def _conversations(layout: str) -> Format:
    """Records with a conversation, in a file of the kind that its ending says, otherwise in JSON lines."""
    needs, fields = chat.LAYOUTS[layout].fields, chat.fields_of(layout)
    extract = functools.partial(_conversation, layout=layout)

    def open_file(path: str, config: "DataConfig") -> Source:
        return RECORD_FILES.get(ending(path), JsonLinesFile)(path, Layout(fields, extract, needs, plain=False))

    return Format(open_file, encode=encode_conversation, texts=conversation_texts, learns_end=False)


def _field_text(record: Any, field: str) -> bytes:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = f"; the fields are {', '.join(map(shown, list(record)[:9]))}" if isinstance(record, dict) else ""
        raise Skip(f"null in field {field!r}" if record == {field: None} else f"no text in field {field!r}{fields}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise Skip(f"field {field!r} is not valid Unicode") from error


def _conversation(record: Any, layout: str) -> bytes:
    try:
        return chat.to_document(chat.parse(record, layout))
    except UnicodeEncodeError as error:
        raise Skip("a message is not valid Unicode") from error
    except (ValueError, RecursionError) as error:
        raise Skip(str(error)) from error


FORMATS = {
    "text": Format(lambda path, config: TextFile(path)),
    "jsonl": _texts_in(".jsonl"),
    "json": _texts_in(".json"),
    "parquet": _texts_in(".parquet"),
    "arrow": _texts_in(".arrow"),
    "chat": _conversations("chat"),
    "sharegpt": _conversations("sharegpt"),
    "prompt-completion": _conversations("prompt-completion"),
}


def format_of(config: "DataConfig", path: str = "") -> Format:
    """The format that the config names or, where that is "auto", that of the file's ending, which may be plain text."""
    if config.format != "auto":
        return FORMATS[config.format]
    return next((found for found in FORMATS.values() if ending(path) in found.endings), FORMATS["text"])

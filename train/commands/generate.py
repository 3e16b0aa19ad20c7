"""Continues a prompt with the model of a run: `python -m train generate --run FOLDER --prompt TEXT`."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from train.checkpoints.saved import SavedModel, load_model
from train.config import KVDtype
from train.data import chat
from train.data.tokenizer import HuggingFaceTokenizer
from train.generation.generator import LENGTH_MULTIPLE, Generator
from train.generation.sampling import Sampling, check
from train.pretrained import chat_template


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Continues a prompt with the model of a run."""

    run: Path  # the run's folder
    prompt: tuple[str, ...] = ("",)  # the text to continue; with --chat, what the user says, turn by turn
    chat: bool = False  # talks with a model trained on conversations, and prints its answer to every prompt
    system: str | None = None  # with --chat: the system prompt
    num_samples: int = 1  # continuations, with seeds from `seed` on
    tensor: int | None = None  # GPUs that split heads, MLP and vocabulary; None: as in training, if there are so many
    drafts: int = 0  # tokens from earlier in the text that a step verifies: the same text, in fewer steps if it repeats
    kv_dtype: KVDtype | None = None  # int8: a cache of half the bytes, with keys and values rounded to 8 bits
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()


def generate(arguments: Arguments) -> None:
    """Prints the continuation of a prompt as it is made, or several one after the other.

    Raises:
      ValueError: there is no such run, or a setting is impossible.
      CheckpointError: the run has no checkpoint that can be read.
    """
    for name, least in (("num_samples", 1), ("drafts", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} = {getattr(arguments, name)}: expected at least {least}")
    if not arguments.prompt:
        raise ValueError("prompt: expected some text")
    if not arguments.chat and len(arguments.prompt) > 1:
        raise ValueError(f"prompt has {len(arguments.prompt)} texts: expected one, or --chat, where each is a turn")
    if not arguments.chat and arguments.system is not None:
        raise ValueError(f"system = {arguments.system!r}: expected --chat, whose first turn this is")
    saved = load_model(arguments.run, tensor=arguments.tensor)
    check(arguments.sampling, saved.tokenizer.vocab_size)
    writer = _Writer(saved, drafts=arguments.drafts, kv_dtype=arguments.kv_dtype)
    for number in range(arguments.num_samples):
        sampling = dataclasses.replace(arguments.sampling, seed=arguments.sampling.seed + number)
        if arguments.chat:
            _talk(writer, _chat_of(saved, arguments.run), arguments, sampling)
        else:
            (prompt,) = arguments.prompt
            print(prompt, end="", flush=True)
            _print(writer.write([saved.tokenizer.bos_id, *saved.tokenizer.encode(prompt).tolist()], sampling))


class _Chat(NamedTuple):
    """How a model was taught to talk."""

    encode_prompt: Callable[[list[chat.Message]], list[int]]
    end: str  # of an answer


def _chat_of(saved: SavedModel, run: Path) -> _Chat:
    """The template that came with a pretrained model, and otherwise that of the trainer."""
    tokenizer, data = saved.tokenizer, saved.config.data
    own = chat_template.load(run)
    if own is None:
        return _Chat(lambda messages: chat.encode_prompt(messages, tokenizer, data), data.chat_end)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return _Chat(lambda messages: own.encode_prompt(messages, tokenizer), own.eos_token or data.chat_end)


def _talk(writer: "_Writer", talk: _Chat, arguments: Arguments, sampling: Sampling) -> None:
    """Prints the model's answer to every prompt; what was said before stands before each."""
    end = writer.saved.tokenizer.encode_marker(talk.end).tolist()
    sampling = dataclasses.replace(
        sampling,
        stop=(*sampling.stop, talk.end),
        # A special token has no text that could be found.
        stop_tokens=(*sampling.stop_tokens, *(end if len(end) == 1 else ())),
    )
    messages = [] if arguments.system is None else [chat.Message(chat.SYSTEM, arguments.system)]
    answer = ""  # whose tokens are counted below; without answers some templates refuse a second prompt
    turns = [(chat.Message(chat.USER, said), chat.Message(chat.LEARNT, answer)) for said in arguments.prompt]
    all_said = [*messages, *itertools.chain.from_iterable(turns)][:-1]
    writer.reserve(len(talk.encode_prompt(all_said)) + len(arguments.prompt) * sampling.max_tokens)
    for turn, said in enumerate(arguments.prompt):
        if len(arguments.prompt) > 1:
            print(f"> {said}")
        messages.append(chat.Message(chat.USER, said))
        # Another seed in every turn and every sample: with the same one they would be drawn with the same noise.
        drawn = dataclasses.replace(sampling, seed=sampling.seed + turn * arguments.num_samples)
        answer = _print(writer.write(talk.encode_prompt(messages), drawn))
        messages.append(chat.Message(chat.LEARNT, answer))


class _Writer:
    """A model with a cache that grows with what it is to continue."""

    def __init__(self, saved: SavedModel, **options: Any):
        self.saved = saved
        self._options = options  # of the generator
        self._generator: Generator | None = None
        self._size = 0

    def reserve(self, size: int) -> None:
        """Makes room for as many tokens. A cache of another size compiles anew, so one reserves what all turns take."""
        if self._generator is None or size > self._size:
            self._size = -(-size // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
            options = {"slots": 1, "max_length": self._size, **self._options}
            saved = self.saved
            self._generator = Generator(saved.params, saved.model, saved.tokenizer, **options, mesh=saved.mesh)

    def write(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        """The continuation of some tokens, piece by piece."""
        self.reserve(len(prompt) + sampling.max_tokens)
        assert self._generator is not None
        self._generator.submit(prompt, sampling)
        while self._generator.busy:
            for piece in self._generator.step():
                yield piece.text


def _print(pieces: Iterator[str]) -> str:
    """Prints text as it comes, and a newline; returns the text."""
    parts = []
    for piece in pieces:
        print(piece, end="", flush=True)
        parts.append(piece)
    print()
    return "".join(parts)

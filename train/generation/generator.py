"""Text from a model: continuous batching over the slots of one cache. Requests join and leave, nothing recompiles.

One program samples several tokens of every request, so that the device does not wait for the host between them. The
host says beforehand how many each request may get, which tokens end it, and which are forced on it.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.cache import put_row, take_row
from train.config import KVDtype
from train.data.tokenizer import UNFINISHED, Tokenizer
from train.generation.drafts import repeat
from train.generation.sampling import Draw, Sampling, check, sample
from train.model.transformer import (
    Caches,
    Transformer,
    decoding_parameters,
    extend,
    init_caches,
    logits,
    rollback_caches,
)
from train.parallel.sharding import activation

LENGTH_MULTIPLE = 64  # of a cache, so that prompts of different lengths share a compiled program
SHORTEST_CHUNK = 64  # of a prompt, for the same reason
LONGEST_CHARACTER = 4  # bytes of UTF-8
NOT_FORCED = -1  # in place of a token that is forced on a request


class NoFreeSlotError(RuntimeError):
    """Every slot is taken, and the request was not to wait."""


class Piece(NamedTuple):
    """What a token adds to a request."""

    request: int
    text: str  # may be empty
    finished: str | None  # "end of text", "stop" or "length"; None: it goes on


@dataclasses.dataclass
class _Request:
    number: int
    tokens: list[int]  # the prompt, then what was sampled
    prompt_length: int
    sampling: Sampling
    context: str  # of the prompt, for the thinking budget
    read: int  # tokens whose text has been taken
    anchor: int  # where to decode from, so that the tokens from `read` on have their neighbours
    shown: int = 0  # characters of the tokens from `read` on whose text has been taken nevertheless
    held: str = ""  # text that may be the beginning of a stop string
    thought: int = 0  # tokens sampled in the span of thinking that is open
    forced: collections.deque[int] = dataclasses.field(default_factory=collections.deque)

    @property
    def num_sampled(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def limit(self) -> int:
        """Tokens that it may get before the host must look at its text: no budget of thinking is spent sooner."""
        most = self.sampling.max_tokens - self.num_sampled
        if self.forced:
            return min(most, len(self.forced))
        if self.sampling.max_thinking_tokens is not None:
            return min(most, max(1, self.sampling.max_thinking_tokens - self.thought + 1))
        return most


class Generator:
    """A model that continues up to `slots` prompts at a time.

    Example:
      generator = Generator(params, model, tokenizer, slots=4, max_length=4096)
      number = generator.submit("def ", Sampling(max_tokens=100))
      while generator.busy:
          for piece in generator.step():
              print(piece.text, end="")

    Args:
      params: of `model`.
      model: the decoder.
      tokenizer: whose tokens the model was trained on.
      slots: requests that run at a time.
      max_length: the most tokens of a request: beginning of text, prompt and continuation.
      chunk: the most tokens of a prompt that are processed at a time. What is left of a prompt is padded to a power of
        two.
      stride: decoding steps of one call of `step`, in one program. Requests join between two calls.
      drafts: tokens that a decoding step verifies besides the one that it is given, and of which it keeps those that
        the model would have sampled. They are what followed the last tokens where these stood before in the request.
      kv_dtype: "int8" for a cache of half the bytes; None: that of the model's computation.
      mesh: of the axes of `train.parallel.sharding`, on which `params` lie; only "tensor" may have more than one
        device. Each of these has the caches of its K/V heads, and decodes with them. None: there is one device.
    """

    def __init__(
        self,
        params: Any,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int,
        max_length: int,
        chunk: int = 8192,
        stride: int = 8,
        drafts: int = 0,
        kv_dtype: KVDtype | None = None,
        mesh: Mesh | None = None,
    ):
        sizes = (("slots", slots, 1), ("max_length", max_length, 1), ("chunk", chunk, 2), ("stride", stride, 1))
        for name, value, least in (*sizes, ("drafts", drafts, 0)):
            if value < least:
                raise ValueError(f"{name} = {value}: expected at least {least}")
        if mesh is not None and mesh.size > mesh.shape["tensor"]:
            raise ValueError(f"mesh = {dict(mesh.shape)}: expected one device along every axis except tensor")
        self._mesh = mesh
        self._model, self._tokenizer, self._max_length = model, tokenizer, max_length
        self._chunk, self._drafts = chunk, drafts
        self._most = stride * (1 + drafts)  # tokens that a request can get in one call
        seen, ends = jnp.zeros((2, slots, model.vocab_size), bool)
        history = jnp.zeros((slots, max_length if drafts else 0), jnp.int32)
        with self._on_mesh():
            self._params = decoding_parameters(params, model.config)
            lengths = {"max_length": max_length, "step_tokens": 1 + drafts}
            caches = init_caches(model.config, batch_size=slots, **lengths, kv_dtype=kv_dtype)
        self._rows = Rows(caches, seen, ends, history)
        self._running: list[_Request | None] = [None] * slots
        self._waiting: collections.deque[_Request] = collections.deque()
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self._waiting) or any(self._running)

    def submit(self, prompt: str | Sequence[int], sampling: Sampling | None = None, *, wait: bool = True) -> int:
        """Adds a request and returns its number.

        Args:
          prompt: text, which gets a beginning of text before it and may be empty; or tokens, taken as they are.
          sampling: how to continue it; None: the defaults.
          wait: for a slot, if none is free.

        Raises:
          ValueError: a setting is impossible, the prompt has no tokens or unknown ones, or it is too long.
          NoFreeSlotError: no slot is free and `wait` is False. Other requests are not affected in either case.
        """
        sampling = sampling or Sampling()
        check(sampling, self._model.vocab_size)
        tokens = self._encode(prompt)
        if len(tokens) + sampling.max_tokens > self._max_length:
            raise ValueError(
                f"prompt of {len(tokens)} tokens and max_tokens = {sampling.max_tokens}: expected at most max_length = "
                f"{self._max_length} together"
            )
        if not wait and len(self._waiting) >= self._running.count(None):
            raise NoFreeSlotError(f"all {len(self._running)} slots are taken")
        context = prompt if isinstance(prompt, str) else self._tokenizer.decode(tokens)
        size = len(tokens)
        request = _Request(self._submitted, tokens, size, sampling, context, size, max(0, size - LONGEST_CHARACTER))
        self._submitted += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Drops a request that waits or runs; others go on.

        Raises:
          ValueError: there is none of this number.
        """
        for request in (*self._waiting, *self._running):
            if request is not None and request.number == number:
                if request in self._waiting:
                    self._waiting.remove(request)
                else:
                    self._running[self._running.index(request)] = None
                return
        raise ValueError(f"number = {number}: expected a request that waits or runs")

    def step(self) -> list[Piece]:
        """Gives free slots to the requests that wait, and samples the next tokens of every request that runs."""
        with self._on_mesh():
            return self._step()

    def _on_mesh(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _step(self) -> list[Piece]:
        pieces = self._admit()
        running = [(slot, request) for slot, request in enumerate(self._running) if request is not None]
        if not running:
            return pieces
        tokens, limits = np.zeros(len(self._running), np.int32), np.zeros(len(self._running), np.int32)
        forced = np.full((len(self._running), self._most), NOT_FORCED, np.int32)
        for slot, request in running:
            tokens[slot], limits[slot] = request.tokens[-1], min(request.limit, self._most)
            given = list(request.forced)[: self._most]
            forced[slot, : len(given)] = given
        arguments = (self._params, self._rows, tokens, limits, forced, self._draw())
        sampled, counts, self._rows = advance(*arguments, model=self._model, drafts=self._drafts)
        chosen, counts = np.asarray(sampled), np.asarray(counts)
        for index in range(self._most):
            for slot, request in running:
                if index < counts[slot] and self._running[slot] is request:
                    piece = self._take(request, int(chosen[slot, index]))
                    if piece.finished is not None:
                        self._running[slot] = None
                    pieces.append(piece)
        return pieces

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return [self._tokenizer.bos_id, *(int(token) for token in self._tokenizer.encode(prompt))]
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise ValueError("prompt = []: expected at least one token")
        if not 0 <= min(tokens) <= max(tokens) < self._model.vocab_size:
            raise ValueError(
                f"prompt has tokens {min(tokens)} to {max(tokens)}: expected 0 to {self._model.vocab_size - 1}"
            )
        return tokens

    def _admit(self) -> list[Piece]:
        pieces = []
        for slot, held in enumerate(self._running):
            while held is None and self._waiting and self._running[slot] is None:
                request = self._waiting.popleft()
                if request.sampling.max_tokens == 0:
                    pieces.append(Piece(request.number, "", "length"))
                    continue
                self._prefill(slot, request)
                self._running[slot] = request
        return pieces

    def _prefill(self, slot: int, request: _Request) -> None:
        """Processes all tokens except the last, with which the first step begins."""
        tokens, (seen, ends) = request.tokens, np.zeros((2, self._model.vocab_size), bool)
        seen[tokens] = True
        ends[[self._tokenizer.eos_id, *request.sampling.stop_tokens]] = True
        history = np.zeros(self._rows.history.shape[1], np.int32)
        history[: len(tokens)] = tokens[: len(history)]
        rows = self._rows
        caches, new = rows.caches, (seen, ends, history)
        # Of a prompt of one token nothing is processed, but the slot is emptied.
        for begin in range(0, max(1, len(tokens) - 1), self._chunk):
            part = np.array(tokens[begin : min(begin + self._chunk, len(tokens) - 1)], np.int32)
            size = max(SHORTEST_CHUNK, 1 << max(0, len(part) - 1).bit_length())
            padded = np.zeros((1, min(size, self._chunk)), np.int32)
            padded[0, : len(part)] = part
            counts, options = np.array([len(part)], np.int32), {"model": self._model, "begins": begin == 0}
            caches = _prefill_slot(self._params, caches, slot, padded, counts, **options)
        self._rows = Rows(caches, *(old.at[slot].set(row) for old, row in zip(rows[1:], new, strict=True)))

    def _draw(self) -> Draw:
        """The settings of every slot; those of a free one change nothing."""
        rows, chooses = [], False
        for request in self._running:
            sampling = Sampling() if request is None else request.sampling
            index = 0 if request is None else request.num_sampled
            top_k = sampling.top_k or self._model.vocab_size
            chooses |= top_k < self._model.vocab_size or sampling.top_p < 1
            seed = sampling.seed % 2**31
            rows.append((sampling.temperature, top_k, sampling.top_p, sampling.repetition_penalty, seed, index))
        kinds = (np.float32, np.int32, np.float32, np.float32, np.int32, np.int32)
        columns = zip(zip(*rows, strict=True), kinds, strict=True)
        draw = Draw(*(jnp.asarray(column, kind) for column, kind in columns))
        return draw if chooses else draw._replace(top_k=None, top_p=None)

    def _take(self, request: _Request, token: int) -> Piece:
        """Adds a token to a request: the one sampled, unless one is forced on it. `advance` ends at the same tokens."""
        sampling = request.sampling
        if request.forced:
            token = request.forced.popleft()
        finished = None
        if token == self._tokenizer.eos_id:
            finished = "end of text"
        elif token in sampling.stop_tokens:
            finished = "stop"
        else:
            request.tokens.append(token)
            if request.num_sampled == sampling.max_tokens:
                finished = "length"
        text = request.held + self._new_text(request, final=finished is not None)
        found = [at for at in (text.find(stop) for stop in sampling.stop) if at >= 0]
        if found:
            return Piece(request.number, text[: min(found)], "stop")
        keep = 0 if finished else _beginning_of(sampling.stop, text)
        request.held = text[len(text) - keep :]
        if sampling.max_thinking_tokens is not None and not request.forced:
            self._budget(request)
        return Piece(request.number, text[: len(text) - keep], finished)

    def _new_text(self, request: _Request, *, final: bool) -> str:
        """Text of the tokens not yet read, without a last character that the next tokens may finish."""
        before = self._tokenizer.decode(request.tokens[request.anchor : request.read])
        after = self._tokenizer.decode(request.tokens[request.anchor :])
        begin = len(before.removesuffix(UNFINISHED)) + request.shown  # a prompt of tokens can end in half a character
        if final or not after.endswith(UNFINISHED):
            request.anchor, request.read, request.shown = request.read, len(request.tokens), 0
        else:
            after = after.removesuffix(UNFINISHED)
            request.shown += len(after) - begin
        request.context += after[begin:]
        return after[begin:]

    def _budget(self, request: _Request) -> None:
        """Counts the tokens of an open span of thinking, and closes it when they are spent."""
        sampling = request.sampling
        if request.context.rfind(sampling.think_start) <= request.context.rfind(sampling.think_end):
            request.thought = 0
            return
        request.thought += 1
        if request.thought > (sampling.max_thinking_tokens or 0):
            request.forced.extend(int(token) for token in self._tokenizer.encode(sampling.think_end))


def generate(
    params: Any,
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    sampling: Sampling | None = None,
) -> Any:
    """A prompt, or several in one batch, with the continuation: a string, or a list of strings.

    Args:
      params: of `model`.
      model: the decoder.
      tokenizer: whose tokens the model was trained on.
      prompt: the text to continue; may be empty.
      sampling: how; None: the defaults.

    Raises:
      ValueError: a setting is impossible.
    """
    sampling = sampling or Sampling()
    check(sampling, model.vocab_size)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        return []
    longest = max(len(tokenizer.encode(text)) for text in prompts) + 1 + sampling.max_tokens
    size = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    generator = Generator(params, model, tokenizer, slots=len(prompts), max_length=size)
    texts = {generator.submit(text, sampling): text for text in prompts}
    while generator.busy:
        for piece in generator.step():
            texts[piece.request] += piece.text
    return texts[0] if isinstance(prompt, str) else list(texts.values())


def _beginning_of(stops: tuple[str, ...], text: str) -> int:
    """Characters at the end of `text` that a stop string may begin with."""
    return max(
        (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size])),
        default=0,
    )


class Rows(NamedTuple):
    """What the device keeps of the requests between two programs."""

    caches: Caches  # without the last token of each row
    seen: Bool[Array, "B V"]  # the tokens that each row holds
    ends: Bool[Array, "B V"]  # the tokens that end it
    history: Int[Array, "B L"]  # its tokens in order; L = 0 where nothing is drafted


class _Progress(NamedTuple):
    """Of each row within a program."""

    last: Int[Array, " B"]  # its last token
    got: Int[Array, " B"]  # how many tokens
    going: Bool[Array, " B"]  # whether none of them ended it
    lengths: Int[Array, " B"]  # tokens in its caches
    sampled: Int[Array, "B S"]


@functools.partial(jax.jit, static_argnames=("model", "drafts"), donate_argnames="rows")
def advance(
    params: Any,
    rows: Rows,
    tokens: Int[Array, " B"],
    limits: Int[Array, " B"],
    forced: Int[Array, "B S"],
    draw: Draw,
    *,
    model: Transformer,
    drafts: int = 0,
) -> tuple[Int[Array, "B S"], Int[Array, " B"], Rows]:
    """Samples up to S tokens of each row, one after the other, in one loop on the device.

    A step reads the last token of each row and its drafts, and samples what comes after each. It keeps the tokens up to
    the first that is not the draft in its place. These are distributed as if they were sampled one by one, and drawn
    with the same noise: drafts say only how many of them a step finds. The number of steps is known when the loop is
    compiled. A condition on the tokens would make the host wait for each.

    Args:
      params: of `model`, as `decoding_parameters` makes them.
      rows: what is kept of the rows. The caches have `step_tokens` of 1 + drafts.
      tokens: int32 [B], the last of each row.
      limits: int32 [B], how many tokens each row may get, at most S. A row with 0 stays as it is.
      forced: int32 [B, S], tokens to take in place of those that are sampled, or `NOT_FORCED`. There are as many steps
        as give S tokens if all drafts are kept: S / (1 + drafts).
      draw: settings of the rows.
      model: the decoder.
      drafts: of a step.

    Returns:
      The tokens int32 [B, S], how many of them each row got, int32 [B], and the rows.
    """
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    offsets = jnp.arange(1 + drafts, dtype=jnp.int32)[None, :]
    up_to = jnp.tri(1 + drafts, dtype=bool)[None]  # [1, j, i]: whether token i of a step comes before j, or is it

    def step(_: int, state: tuple[Rows, _Progress]) -> tuple[Rows, _Progress]:
        (caches, seen, ends, history), (last, got, going, lengths, sampled) = state
        caches = with_lengths(caches, lengths)
        going &= got < limits
        given = last[:, None]
        if drafts:
            held = lengths + 1
            given = jnp.concatenate([given, repeat(history, held, drafts)], axis=1)
        num_tokens = jnp.where(going, jnp.minimum(1 + drafts, limits - got), 0)
        hidden, caches = extend(params, model.config, given, caches, num_tokens=num_tokens, verifies=drafts > 0)
        # Sampling takes scores that are not split. It is they that are gathered, and not the kernel that makes them.
        scores = activation(logits(params, hidden, model.config), "batch", None, "vocab")
        scores = activation(scores, "batch", None, None)[..., : model.vocab_size]  # padded rows stand for no token
        is_given = given[:, :, None] == jnp.arange(seen.shape[1], dtype=jnp.int32)[None, None, :]
        seen_by = seen[:, None] | jnp.any(is_given[:, None] & up_to[..., None], axis=2)  # [B, 1 + drafts, V]
        index = got[:, None] + offsets
        chosen = _sample(scores, seen_by, draw._replace(num_drawn=draw.num_drawn[:, None] + index))
        instead = jnp.take_along_axis(forced, jnp.minimum(index, forced.shape[1] - 1), axis=1)
        chosen = jnp.where(instead == NOT_FORCED, chosen, instead)
        ended = jnp.take_along_axis(ends, chosen, axis=1)
        # What comes after a draft counts if the draft is what was sampled in its place, and ends nothing.
        follows = jnp.concatenate([going[:, None], (chosen[:, :-1] == given[:, 1:]) & ~ended[:, :-1]], axis=1)
        kept = jnp.all(follows[:, None] | ~up_to, axis=2) & (offsets < num_tokens[:, None])
        added = jnp.sum(kept, axis=1, dtype=jnp.int32)
        at = jnp.maximum(added - 1, 0)[:, None]
        if drafts:
            caches = rollback_caches(model.config, caches, num_tokens - added)
            place = jnp.where(kept, held[:, None] + offsets, history.shape[1])
            history = history.at[row, place].set(chosen, mode="drop")
        seen_now = jnp.take_along_axis(seen_by, at[:, :, None], axis=1)[:, 0]
        seen = jnp.where(going[:, None], seen_now, seen)
        last = jnp.where(going, jnp.take_along_axis(chosen, at, axis=1)[:, 0], last)
        sampled = sampled.at[row, jnp.where(kept, index, forced.shape[1])].set(chosen, mode="drop")
        going &= ~jnp.any(kept & ended, axis=1)
        progress = _Progress(last, got + added, going, caches[0].lengths, sampled)
        return Rows(with_lengths(caches, None), seen, ends, history), progress

    def with_lengths(caches: Caches, lengths: Any) -> Caches:
        """All layers hold as many tokens. If each had lengths of its own, the loop would copy all of them in a step."""
        return tuple(cache._replace(lengths=lengths) for cache in caches)

    nothing, all_rows, lengths = jnp.zeros_like(limits), jnp.ones(tokens.shape, bool), rows.caches[0].lengths
    state = (
        rows._replace(caches=with_lengths(rows.caches, None)),
        _Progress(tokens, nothing, all_rows, lengths, jnp.zeros_like(forced)),
    )
    rows, progress = jax.lax.fori_loop(0, forced.shape[1] // (1 + drafts), step, state)
    rows = rows._replace(caches=with_lengths(rows.caches, progress.lengths))
    return progress.sampled, progress.got, rows


def _sample(scores: Float[Array, "B m V"], seen: Bool[Array, "B m V"], draw: Draw) -> Int[Array, "B m"]:
    """`sample` for several places of each row. Of `draw`, `num_drawn` is [B, m]."""
    B, m, V = scores.shape
    settings = jax.tree.map(lambda x: jnp.broadcast_to(x if x.ndim == 2 else x[:, None], (B, m)).reshape(-1), draw)
    return sample(scores.reshape(B * m, V), seen.reshape(B * m, V), settings).reshape(B, m)


@functools.partial(jax.jit, static_argnames=("model", "begins"), donate_argnames="caches")
def _prefill_slot(
    params: Any,
    caches: Caches,
    slot: Int[Array, ""],
    tokens: Int[Array, "1 T"],
    count: Int[Array, " 1"],
    *,
    model: Transformer,
    begins: bool,
) -> Caches:
    """Adds a chunk of a prompt to one row of the caches; one that begins the prompt replaces what the row held."""
    one = tuple(take_row(cache, slot) for cache in caches)
    _, one = extend(params, model.config, tokens, one, num_tokens=count, begins=begins)
    return tuple(put_row(cache, slot, row) for cache, row in zip(caches, one, strict=True))

"""Text from a model: the same whatever else is running, ended and streamed as asked."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from nsa_jax import NSAConfig
from train.config import MeshConfig, ModelConfig
from train.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from train.generation import generator as generate_module
from train.generation.drafts import LONGEST_MATCH, repeat
from train.generation.generator import NOT_FORCED, Generator, NoFreeSlotError, Rows, advance, generate
from train.generation.sampling import Draw, Sampling
from train.model.transformer import Transformer, decoding_parameters, extend, init_caches, logits
from train.parallel.communication import collectives
from train.parallel.sharding import make_mesh, tree_shardings

TOKENIZER = ByteTokenizer()


GREEDY = Sampling(max_tokens=5, temperature=0.0)


@functools.cache
def trained(attention="nsa", num_kv_heads=1):
    config = ModelConfig(
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        mlp_dim=16,
        attention=attention,
        nsa=NSAConfig(
            compress_block=4, compress_stride=2, select_block=8, num_selected=4, num_init=1, num_local=2, window=10
        ),
    )
    model = Transformer(config, TOKENIZER.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return nn.meta.unbox(params), model


SIZES = {"slots": 2, "max_length": 96, "chunk": 8}  # of every generator here, so that they share compiled programs


def make():
    return Generator(*trained(), TOKENIZER, **SIZES)


def finish(generator, pieces=()):
    """The text of every request, of which some pieces came before, and why it ended."""
    pieces = list(pieces)
    while generator.busy:
        pieces += generator.step()
    texts = {piece.request: "" for piece in pieces}
    for piece in pieces:
        texts[piece.request] += piece.text
    return texts, {piece.request: piece.finished for piece in pieces if piece.finished}


@pytest.mark.parametrize("attention", ["nsa", "full", "window"])
def test_temperature_zero_takes_the_likeliest_token_of_the_whole_forward_pass(attention):
    params, model = trained(attention)
    forward = jax.jit(lambda tokens: logits(params, model.apply({"params": params}, tokens), model.config))
    prompt = "a prompt over some blocks"
    tokens = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
    for _ in range(30):
        padded = jnp.asarray([tokens + [0] * (64 - len(tokens))])
        tokens.append(int(np.argmax(forward(padded)[0, len(tokens) - 1, : TOKENIZER.vocab_size])))
        if tokens[-1] == TOKENIZER.eos_id:
            break
    expected = TOKENIZER.decode(tokens[1 + len(prompt) :])
    sampling = dataclasses.replace(GREEDY, max_tokens=30)
    one = dataclasses.replace(sampling, temperature=1.0, top_k=1)
    for way in (sampling, one):
        assert generate(params, model, TOKENIZER, [prompt, "ab"], way)[0] == prompt + expected
    if attention == "nsa":  # a prompt by itself
        assert generate(params, model, TOKENIZER, prompt, sampling) == prompt + expected


def test_a_seed_fixes_the_text_and_another_changes_it():
    sampling = Sampling(max_tokens=20, temperature=1.0)
    texts = [generate(*trained(), TOKENIZER, "ab", dataclasses.replace(sampling, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("ab")


@settings(max_examples=6)
@given(
    st.integers(0, 10**6), st.lists(st.tuples(st.text(max_size=20), st.integers(0, 9), st.integers(0, 4)), max_size=6)
)
def test_requests_that_join_and_leave_give_the_text_they_give_alone(seed, requests):
    rng = np.random.default_rng(seed)
    made = [
        (prompt, Sampling(max_tokens=count, temperature=float(rng.choice([0.0, 1.0])), top_p=0.9, seed=number), pause)
        for number, (prompt, count, pause) in enumerate(requests)
    ]
    together, pieces = make(), []
    for prompt, sampling, pause in made:
        together.submit(prompt, sampling)
        for _ in range(pause):
            pieces += together.step()
    texts, _ = finish(together, pieces)
    for number, (prompt, sampling, _) in enumerate(made):
        alone = make()
        alone.submit(prompt, sampling)
        assert texts.get(number, "") == finish(alone)[0].get(0, ""), (prompt, sampling)


def in_turn(params, model, rows, tokens, limits, forced, draw):
    """What `advance` returns, from a call for each token."""
    sampled, going, ends = [], np.ones(len(tokens), bool), np.asarray(rows.ends)
    for index in range(forced.shape[1]):
        going &= index < limits
        one = draw._replace(num_drawn=draw.num_drawn + index)
        given = (tokens, going.astype(np.int32), forced[:, index : index + 1], one)
        new, got, rows = advance(params, rows, *given, model=model)
        assert got.tolist() == going.tolist()
        tokens = np.where(going, new[:, 0], tokens)
        sampled.append(np.where(going, tokens, -1))
        going &= ~ends[np.arange(len(tokens)), tokens]
    return np.stack(sampled, 1), rows


@functools.cache
def rows_to_continue(attention, drafts):
    """Parameters, and what `advance` takes, of six rows of all kinds."""
    params, model = trained(attention)
    params = decoding_parameters(params, model.config)
    B, S, V, rng = 6, 12, TOKENIZER.vocab_size, np.random.default_rng(3)
    draw = Draw(
        temperature=np.float32([0, 1, 2, 1, 0.5, 1]),
        top_k=np.int32([V, V, 9, V, V, V]),
        top_p=np.float32([1, 0.9, 1, 1, 0.5, 1]),
        repetition_penalty=np.float32([1, 1, 1.5, 1, 1, 1]),
        seed=np.arange(B, dtype=np.int32),
        num_drawn=np.int32([0, 5, 0, 0, 2, 0]),
    )
    forced = np.full((B, S), NOT_FORCED, np.int32)
    forced[2, :11] = [5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6]
    limits = np.int32([12, 12, 12, 0, 3, 12])
    ends = rng.random((B, V)) < np.array([0, 0.1, 0, 0, 0, 0.1])[:, None]
    held, lengths = rng.integers(0, V, (B, 40)), np.int32([20, 3, 0, 9, 12, 15])
    history = np.where(np.arange(40) <= lengths[:, None], held, 0).astype(np.int32)
    tokens = history[np.arange(B), lengths]
    caches = init_caches(model.config, batch_size=B, max_length=64, step_tokens=1 + drafts)
    _, caches = extend(params, model.config, held[:, :20], caches, num_tokens=lengths)
    rows = Rows(caches, np.zeros((B, V), bool), ends, history if drafts else history[:, :0])
    return params, model, rows, tokens, limits, forced, draw


# Whole models have shown that full attention decodes as the window does, whose cache is the harder one.
SPARSE_OR_RING = pytest.mark.parametrize(
    "attention", ["nsa", pytest.param("full", marks=pytest.mark.exhaustive), "window"]
)


@pytest.mark.exhaustive
@SPARSE_OR_RING
def test_tokens_sampled_in_one_program_are_those_sampled_one_by_one(attention):
    params, model, rows, *given = rows_to_continue(attention, 0)
    copies = jax.tree.map(jnp.array, [rows] * 2)  # because they are given away
    together, got, rows = advance(params, copies[0], *given, model=model)
    alone, expected = in_turn(params, model, copies[1], *given)
    counts = np.count_nonzero(alone >= 0, axis=1)
    assert got.tolist() == counts.tolist()
    assert counts[[0, 2, 3, 4]].tolist() == [12, 12, 0, 3]
    assert min(counts[[1, 5]]) < 12  # ended
    np.testing.assert_array_equal(np.where(alone >= 0, together, -1), alone)
    assert alone[2, :11].tolist() == given[2][2, :11].tolist()
    jax.tree.map(np.testing.assert_array_equal, rows, expected)


@pytest.mark.exhaustive
def test_a_cache_in_8_bits_takes_most_of_the_likeliest_tokens_and_gives_each_request_the_text_it_gets_alone():
    params, model = trained()
    sampling, prompts = dataclasses.replace(GREEDY, max_tokens=40), ["a prompt over some blocks", "def f(x):\n", ""]

    def texts(prompts, **options):
        generator = Generator(params, model, TOKENIZER, **SIZES, **options)
        for prompt in prompts:
            generator.submit(prompt, sampling)
        return list(finish(generator)[0].values())

    exact, held = texts(prompts), texts(prompts, kv_dtype="int8")
    assert held == [texts([prompt], kv_dtype="int8", drafts=3)[0] for prompt in prompts]
    same = [sum(a == b for a, b in zip(x, y, strict=False)) for x, y in zip(exact, held, strict=True)]
    assert sum(same) > 0.8 * sum(map(len, exact))


@SPARSE_OR_RING
def test_drafts_change_nothing_except_how_many_tokens_a_step_finds(attention):
    params, model, rows, *given = rows_to_continue(attention, 0)
    expected, got, after = advance(params, jax.tree.map(jnp.array, rows), *given, model=model)
    params, model, rows, tokens, limits, forced, draw = rows_to_continue(attention, 3)
    rows = jax.tree.map(jnp.array, rows)
    counts, found = np.zeros(6, np.int32), np.zeros_like(expected)
    calls, most = 0, 0
    while np.any(counts < got):
        one = draw._replace(num_drawn=draw.num_drawn + counts)
        left = np.where(counts < got, np.minimum(limits - counts, 4), 0)
        padded = np.pad(forced, ((0, 0), (0, 4)), constant_values=NOT_FORCED)
        given = np.take_along_axis(padded, counts[:, None] + np.arange(4), axis=1)
        new, more, rows = advance(params, rows, tokens, left, given, one, model=model, drafts=3)
        for b, n in enumerate(np.asarray(more)):
            found[b, counts[b] : counts[b] + n] = new[b, :n]
            tokens = np.where(np.arange(6) == b, new[b, n - 1], tokens) if n else tokens
        counts, calls, most = counts + np.asarray(more), calls + 1, max(most, int(np.max(more)))
    assert counts.tolist() == got.tolist()
    shown = np.arange(12) < counts[:, None]
    np.testing.assert_array_equal(np.where(shown, found, -1), np.where(shown, expected, -1))
    np.testing.assert_array_equal(rows.seen, after.seen)
    assert [cache.lengths.tolist() for cache in rows.caches] == [cache.lengths.tolist() for cache in after.caches]
    assert most == 4
    assert calls <= max(got)


@pytest.mark.exhaustive
def test_tokens_are_distributed_as_the_model_says_with_and_without_drafts():
    """All continuations of three tokens by a model of four, counted, against the product of their probabilities."""
    config, V, N = dataclasses.replace(trained()[1].config, num_layers=1), 4, 3000
    model = Transformer(config, V)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(5), jnp.zeros((1, 8), jnp.int32))["params"])
    params["embedding"] = 0.3 * params["embedding"] / jnp.std(params["embedding"])
    prompt, continuations = [1, 2, 3, 0, 1, 2], np.array(list(itertools.product(range(V), repeat=3)))
    texts = np.concatenate([np.tile(prompt, (V**3, 1)), continuations], axis=1)
    hidden = jax.jit(model.apply)({"params": params}, texts)[:, len(prompt) - 1 : -1]
    log_p = jax.nn.log_softmax(logits(params, hidden, config)[..., :V])
    p = np.exp(np.sum(np.take_along_axis(np.asarray(log_p), continuations[..., None], 2)[..., 0], axis=1))
    assert p.sum() == pytest.approx(1, abs=1e-4)

    def statistic(counts, p):
        """Pearson's: about as many as there are continuations, with a deviation of 11, if p is right."""
        return np.sum((counts - N * p) ** 2 / (N * p))

    ready = decoding_parameters(params, config)
    draw = Draw(
        *(np.full(N, value, kind) for value, kind in ((1, "f4"), (V, "i4"), (1, "f4"), (1, "f4"))),
        np.arange(N),
        np.zeros(N, np.int32),
    )
    for drafts in (0, 2):
        caches = init_caches(config, batch_size=N, max_length=16, step_tokens=1 + drafts)
        _, caches = extend(ready, config, np.tile(prompt[:-1], (N, 1)), caches)
        history = np.tile(np.pad(prompt, (0, 10)), (N, 1)).astype(np.int32)
        rows = Rows(caches, *np.zeros((2, N, V), bool), history if drafts else history[:, :0])
        last, limits = np.full(N, prompt[-1], np.int32), np.full(N, 3, np.int32)
        for steps, expected in ((1, set(range(1, 2 + drafts))), (3, {3})):
            forced, copy = np.full((N, steps * (1 + drafts)), NOT_FORCED, np.int32), jax.tree.map(jnp.array, rows)
            sampled, got, _ = advance(ready, copy, last, limits, forced, draw, model=model, drafts=drafts)
            assert set(got.tolist()) == expected
        number = np.asarray(sampled)[:, :3] @ [V**2, V, 1]
        counts = np.bincount(number, minlength=V**3)
        assert statistic(counts, p) < 64 + 5 * 11
        flatter = np.sqrt(p) / np.sum(np.sqrt(p))
        assert statistic(counts, flatter) > 64 + 20 * 11


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 4))
def test_drafts_are_what_followed_the_longest_match(tokens, count):
    best = max(
        (
            (next((n for n in range(LONGEST_MATCH) if n > at or tokens[at - n] != tokens[-1 - n]), LONGEST_MATCH), at)
            for at in range(len(tokens) - 1)
        ),
        default=(0, 0),
    )
    history = np.full((2, 24), 9, np.int32)
    history[0, : len(tokens)] = tokens
    drafts = repeat(history, np.int32([len(tokens), 1]), count)
    assert drafts.shape == (2, count)
    if best[0]:
        following = tokens[best[1] + 1 :][:count]
        assert drafts[0, : len(following)].tolist() == following


OPTIONS = (
    {"temperature": 0.0},
    {"stop_tokens": tuple(range(0, 256, 9))},
    {"stop": tuple("aeiou \ufffd"), "top_p": 0.9},
    {"max_thinking_tokens": 4, "think_start": "<", "think_end": "/>"},
    {"repetition_penalty": 1.3, "max_thinking_tokens": 0, "think_start": "o", "think_end": "ab"},
)


def test_requests_get_the_same_pieces_whatever_the_stride_and_the_drafts():
    made = {}
    for stride, drafts in ((1, 0), (3, 0), (8, 0), (2, 3)):
        generator = Generator(*trained(), TOKENIZER, **SIZES, stride=stride, drafts=drafts)
        for seed, options in itertools.product(range(2), OPTIONS):
            sampling = Sampling(max_tokens=10 + seed, temperature=1.5, seed=seed)
            generator.submit("so < it", dataclasses.replace(sampling, **options))
        pieces = []
        while generator.busy:
            pieces += generator.step()
        made[stride, drafts] = sorted(pieces, key=lambda piece: piece.request)  # those of a request stay in order
    alone = made[1, 0]
    assert all(pieces == alone for pieces in made.values())
    assert {piece.finished for piece in alone} >= {None, "stop", "length"}
    texts = {number: "".join(p.text for p in alone if p.request == number) for number in range(10)}
    assert "/>" in texts[3]
    assert texts[4].count("ab") == 1


def test_joining_and_leaving_compile_nothing():
    generator = make()
    generator.submit("a first and a next chunk", GREEDY)
    finish(generator)
    programs = [generate_module.advance, generate_module._prefill_slot]
    before = [program._cache_size() for program in programs]
    for number, prompt in enumerate(["", "a much longer prompt of several chunks", "x"]):
        generator.submit(prompt, Sampling(max_tokens=3 + number, top_k=2 + number, top_p=0.5, seed=number))
        generator.step()
    finish(generator)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize("attention", ["nsa", pytest.param("full", marks=pytest.mark.exhaustive)])
def test_a_prompt_in_chunks_gets_the_text_that_it_gets_whole(attention):
    prompt = "a prompt of eleven chunks, of which the last one is padded, and as a whole it is padded too"
    sizes = {"slots": 1, "max_length": 128}

    def text(chunk):
        generator = Generator(*trained(attention), TOKENIZER, **sizes, chunk=chunk)
        generator.submit(prompt, Sampling(max_tokens=20, temperature=0))
        return finish(generator)

    assert text(8) == text(8192)


class Scripted(Generator):
    """A generator whose model says what a test wants: the sampled tokens are replaced by a script."""

    def __init__(self, script):
        super().__init__(*trained(), TOKENIZER, **SIZES)
        self.script = iter(TOKENIZER.encode(script).tolist())

    def _take(self, request, token):
        return super()._take(request, next(self.script))


def test_stop_strings_end_the_text_before_them_and_nothing_of_them_is_streamed():
    generator = Scripted("one two th three")
    generator.submit("", Sampling(max_tokens=90, stop=("three", "zzz")))
    pieces = []
    while generator.busy:
        pieces += [piece.text for piece in generator.step()]
    assert "".join(pieces) == "one two th "
    assert all(len(piece) <= 4 for piece in pieces)


def test_the_earliest_of_several_stop_strings_ends_the_text():
    class Words:  # one token is several characters
        eos_id = -1

        def decode(self, tokens):
            return "".join(["", "ab", "END and STOP"][token] for token in tokens)

    for stop in (("STOP", "END"), ("END", "STOP")):
        assert streamed(Words(), [1, 2], stop=stop, prompt=[1]) == ["ab", ""]


def test_a_stop_token_ends_the_text_before_it_with_what_was_held_back():
    generator = Scripted("one th|ree")
    generator.submit("", Sampling(max_tokens=90, stop=("three",), stop_tokens=(ord("|"),)))
    assert finish(generator) == ({0: "one th"}, {0: "stop"})


def test_half_characters_are_never_streamed():
    generator = Scripted("aé漢🙂b")
    generator.submit("", Sampling(max_tokens=11))
    pieces = []
    while generator.busy:
        pieces += [piece.text for piece in generator.step()]
    assert [piece for piece in pieces if piece] == ["a", "é", "漢", "🙂", "b"]


class Stream:
    """What of a generator makes text of tokens."""

    _take, _new_text = Generator._take, Generator._new_text

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer


def streamed(tokenizer, tokens, prompt, **sampling):
    """The text that each token adds to a prompt of tokens."""
    stream, sampling = Stream(tokenizer), Sampling(max_tokens=len(tokens), **sampling)
    begin = max(0, len(prompt) - generate_module.LONGEST_CHARACTER)
    request = generate_module._Request(0, list(prompt), len(prompt), sampling, "", len(prompt), begin)
    return [stream._take(request, token).text for token in tokens]


@functools.cache
def byte_fallback():
    """A tokenizer like Llama 2's: characters that it does not know are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcd"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")],
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return HuggingFaceTokenizer(tokenizer.to_str(), "made here")


@pytest.mark.parametrize("make", [ByteTokenizer, byte_fallback])
def test_half_a_character_at_the_end_is_one_replacement_character(make):
    tokenizer = make()
    tokens, prompt = tokenizer.encode("\U0001f642\U0001f642").tolist()[-8:], tokenizer.encode("ab").tolist()
    for cut, text in ((8, "\U0001f642\U0001f642"), (7, "\U0001f642\ufffd"), (6, "\U0001f642\ufffd"), (4, "\U0001f642")):
        assert "".join(streamed(tokenizer, tokens[:cut], prompt)) == text
    assert "".join(streamed(tokenizer, tokens[:2], prompt)) == "\ufffd"
    assert tokenizer.decode(tokens[:6]) == "\U0001f642\ufffd"
    # A character that begins in a prompt of tokens is finished after it.
    assert streamed(tokenizer, tokens[2:4], [*prompt, *tokens[:2]]) == ["", "\U0001f642"]


@settings(max_examples=60)
@given(st.lists(st.one_of(st.integers(3, 263), st.sampled_from([0xF0 + 3, 0x9F + 3, 0x99 + 3, 0xC3 + 3, 259, 260]))))
def test_streamed_text_is_the_text_of_all_tokens_whatever_they_are(tokens):
    for tokenizer, ids in ((byte_fallback(), tokens), (TOKENIZER, [token % 256 for token in tokens])):
        prompt = tokenizer.encode("ab").tolist()
        whole = tokenizer.decode([*prompt, *ids]).removeprefix(tokenizer.decode(prompt))
        pieces = streamed(tokenizer, ids, prompt)
        assert "".join(pieces) == whole
        for count in range(len(pieces)):  # nothing that was shown is taken back
            assert tokenizer.decode([*prompt, *ids[: count + 1]])[2:].startswith("".join(pieces[: count + 1]))


def test_every_position_has_noise_of_its_own():
    """With equal logits everywhere, 80 tokens of one seed are nearly all different."""
    params, model = trained()
    generator = Generator({**params, "embedding": jnp.zeros_like(params["embedding"])}, model, TOKENIZER, **SIZES)
    generator.submit("", Sampling(max_tokens=80, temperature=1.0))
    request = generator._waiting[0]
    finish(generator)
    # Of 258 equal tokens: 69 different ones on average, with a standard deviation of 3.
    assert len(request.tokens) == 81  # the end of text was not among them
    assert len(set(request.tokens[1:])) >= 55


def test_a_thinking_budget_closes_the_span():
    generator = Scripted("<think>0123456789 more and more thoughts")
    generator.submit("", Sampling(max_tokens=40, max_thinking_tokens=5))
    text = finish(generator)[0][0]
    assert text.startswith("<think>01234</think>")
    assert text.count("</think>") == 1
    free = Scripted("<think>0123456789</think> answer")
    free.submit("", Sampling(max_tokens=32, max_thinking_tokens=50))
    assert finish(free)[0][0] == "<think>0123456789</think> answer"


def with_loud_rows(params, model, rows):
    """Parameters under which the given rows of the embedding are by far the likeliest first tokens."""
    hidden = jax.jit(model.apply)({"params": params}, jnp.full((1, 8), TOKENIZER.bos_id, jnp.int32))[0, 0]
    return {**params, "embedding": params["embedding"].at[rows].set(100 * hidden[None, :])}


def test_sampling_ends_at_the_end_of_text():
    params, model = trained()
    # The beginning of text is the same token as its end, so the input changes too; what follows the bos is what counts.
    ended = with_loud_rows(params, model, jnp.array([TOKENIZER.eos_id]))
    generator = Generator(ended, model, TOKENIZER, **SIZES)
    generator.submit("", GREEDY)
    assert finish(generator) == ({0: ""}, {0: "end of text"})


def test_rows_that_stand_for_no_token_are_never_sampled():
    params, model = trained()
    loud = with_loud_rows(params, model, jnp.arange(TOKENIZER.vocab_size, params["embedding"].shape[0]))
    generator = Generator(loud, model, TOKENIZER, **SIZES)
    generator.submit("", Sampling(max_tokens=9, temperature=1.0))
    request = generator._waiting[0]
    finish(generator)
    assert max(request.tokens) < TOKENIZER.vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": -1}, "max_tokens = -1: expected at least 0"),
        ({"temperature": -0.5}, "temperature = -0.5"),
        ({"temperature": float("inf")}, "temperature = inf: expected at least 0, and finite"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf"),
        ({"stop": "abc"}, "stop = 'abc': expected strings"),
        ({"top_k": 259}, "top_k = 259: expected 1 to 258"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"stop": ("",)}, "stop = "),
        ({"stop_tokens": (258,)}, r"stop_tokens = \(258,\): expected 0 to 257"),
        ({"max_thinking_tokens": -2}, "max_thinking_tokens = -2"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        generate(*trained(), TOKENIZER, "", Sampling(**change))


def test_requests_that_cannot_be_served_are_refused_and_the_others_unharmed():
    alone = make()
    alone.submit("ab", dataclasses.replace(GREEDY, max_tokens=9))
    expected = finish(alone)[0][0]
    generator = make()
    numbers = [generator.submit("ab", dataclasses.replace(GREEDY, max_tokens=9)) for _ in range(2)]
    pieces = generator.step()
    with pytest.raises(NoFreeSlotError, match="all 2 slots are taken"):
        generator.submit("b", GREEDY, wait=False)
    with pytest.raises(ValueError, match=r"prompt of 101 tokens and max_tokens = 5: expected at most max_length = 96"):
        generator.submit("x" * 100, GREEDY)
    with pytest.raises(ValueError, match=r"prompt = \[\]: expected at least one token"):
        generator.submit([], GREEDY)
    with pytest.raises(ValueError, match="prompt has tokens 3 to 999: expected 0 to 257"):
        generator.submit([3, 999], GREEDY)
    with pytest.raises(ValueError, match="number = 7: expected a request"):
        generator.cancel(7)
    generator.cancel(generator.submit("never", GREEDY))
    assert finish(generator, pieces=pieces)[0] == dict.fromkeys(numbers, expected)


@functools.cache
def on_two_devices(attention, **options):
    """A generator on one device, and one of the same model whose heads are split over two."""
    params, model = trained(attention, num_kv_heads=2)
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    split = jax.device_put(params, tree_shardings(boxed, mesh))
    sizes = {**SIZES, "stride": 2, **options}
    return Generator(params, model, TOKENIZER, **sizes), Generator(split, model, TOKENIZER, **sizes, mesh=mesh)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("attention", "drafts"), [("nsa", 0), ("nsa", 2), ("full", 0)])
def test_devices_that_split_heads_give_the_text_of_one(attention, drafts):
    texts = []
    for generator in on_two_devices(attention, drafts=drafts):
        for prompt in ("a prompt of some chunks", "another", "a third, which waits"):
            generator.submit(prompt, Sampling(max_tokens=20, temperature=0.5))
        texts.append(finish(generator))
    assert texts[0] == texts[1]


def test_devices_that_split_heads_send_sums_over_them_and_scores():
    _, generator = on_two_devices("nsa", drafts=0)
    tokens, forced = np.zeros(2, np.int32), np.full((2, 2), NOT_FORCED, np.int32)
    arguments = (generator._params, generator._rows, tokens, tokens, forced, generator._draw())
    with jax.set_mesh(generator._mesh):
        program = advance.lower(*arguments, model=generator._model).compile()
    found = {(one.kind, one.result_bytes) for one in collectives(program.as_text())}
    hidden, scores = (2 * width * 4 for width in (generator._model.config.embed_dim, 320))  # bytes of two rows
    assert found == {("all-reduce", hidden), ("all-gather", scores)}
    for x in jax.tree.leaves(generator._rows.caches):
        if x.ndim == 4:
            assert x.addressable_shards[0].data.size == x.size // 2


def test_a_mesh_that_splits_anything_but_heads_is_refused():
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    with pytest.raises(ValueError, match="expected one device along every axis except tensor"):
        Generator(*trained(), TOKENIZER, **SIZES, mesh=mesh)

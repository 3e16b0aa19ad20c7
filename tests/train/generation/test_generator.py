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
from train.config import ModelConfig
from train.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from train.generation import generator as generate_module
from train.generation.generator import NOT_FORCED, Generator, NoFreeSlotError, advance, generate
from train.generation.sampling import Draw, Sampling
from train.model.transformer import Transformer, decoding_parameters, extend, init_caches, logits

pytestmark = pytest.mark.xdist_group("generator")  # the models and programs that these tests share are made once

TOKENIZER = ByteTokenizer()


GREEDY = Sampling(max_tokens=5, temperature=0.0)


@functools.cache
def trained(attention="nsa"):
    config = ModelConfig(
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=1,
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


def in_turn(params, model, caches, seen, ends, tokens, limits, forced, draw):
    """What `advance` returns, from a call for each token."""
    sampled, going = [], np.ones(len(tokens), bool)
    for index in range(forced.shape[1]):
        going &= index < limits
        one = draw._replace(num_drawn=draw.num_drawn + index)
        given = (tokens, going.astype(np.int32), forced[:, index : index + 1], one)
        new, caches, seen = advance(params, caches, seen, ends, *given, model=model)
        tokens = np.array(new[:, 0])
        sampled.append(np.where(going, tokens, -1))
        going &= ~np.asarray(ends)[np.arange(len(tokens)), tokens]
    return np.stack(sampled, 1), caches, seen


@pytest.mark.parametrize("attention", ["nsa", "full", "window"])
def test_tokens_sampled_in_one_program_are_those_sampled_one_by_one(attention):
    params, model = trained(attention)
    params = decoding_parameters(params, model.config)
    B, S, V, rng = 6, 7, TOKENIZER.vocab_size, np.random.default_rng(3)
    draw = Draw(
        temperature=jnp.array([0.0, 1, 2, 1, 0.5, 1], jnp.float32),
        top_k=jnp.array([V, V, 9, V, V, V]),
        top_p=jnp.array([1, 0.9, 1, 1, 0.5, 1], jnp.float32),
        repetition_penalty=jnp.array([1, 1, 1.5, 1, 1, 1], jnp.float32),
        seed=jnp.arange(B),
        num_drawn=jnp.array([0, 5, 0, 0, 2, 0]),
    )
    forced = np.full((B, S), NOT_FORCED, np.int32)
    forced[2, 1:3] = 5, 6
    limits, tokens = np.array([7, 7, 7, 0, 3, 7], np.int32), rng.integers(0, V, B).astype(np.int32)
    ends = rng.random((B, V)) < np.array([0, 0.3, 0, 0, 0, 0.3])[:, None]
    held, results = rng.integers(0, V, (B, 20)), []
    for way in (functools.partial(advance, model=model), lambda params, *given: in_turn(params, model, *given)):
        caches = init_caches(model.config, batch_size=B, max_length=64)
        _, caches = extend(params, model.config, held, caches, num_tokens=jnp.array([20, 3, 0, 9, 12, 15]))
        results.append(way(params, caches, jnp.zeros((B, V), bool), ends, tokens, limits, forced, draw))
    (together, caches, seen), (alone, *others) = results
    assert {*np.count_nonzero(alone >= 0, axis=1)} >= {0, 3, 7}  # some rows end early
    assert np.any((alone[1] < 0) | (alone[5] < 0))
    np.testing.assert_array_equal(np.where(alone >= 0, together, -1), alone)
    assert alone[2, 1:3].tolist() == [5, 6]
    jax.tree.map(np.testing.assert_array_equal, [caches, seen], others)


OPTIONS = (
    {"temperature": 0.0},
    {"stop_tokens": tuple(range(0, 256, 9))},
    {"stop": tuple("aeiou \ufffd"), "top_p": 0.9},
    {"max_thinking_tokens": 4, "think_start": "<", "think_end": "/>"},
    {"repetition_penalty": 1.3, "max_thinking_tokens": 0, "think_start": "o", "think_end": "ab"},
)


def test_requests_get_the_same_pieces_whatever_the_stride():
    made = {}
    for stride in (1, 3, 8):
        generator = Generator(*trained(), TOKENIZER, **SIZES, stride=stride)
        for seed, options in itertools.product(range(2), OPTIONS):
            sampling = Sampling(max_tokens=10 + seed, temperature=1.5, seed=seed)
            generator.submit("so < it", dataclasses.replace(sampling, **options))
        pieces = []
        while generator.busy:
            pieces += generator.step()
        made[stride] = sorted(pieces, key=lambda piece: piece.request)  # those of a request stay in order
    assert made[1] == made[3] == made[8]
    assert {piece.finished for piece in made[1]} >= {None, "stop", "length"}
    texts = {number: "".join(p.text for p in made[1] if p.request == number) for number in range(10)}
    assert "/>" in texts[3]
    assert texts[4].count("ab") == 1


def test_joining_and_leaving_compile_nothing():
    generator = make()
    generator.submit("warm", GREEDY)
    finish(generator)
    programs = [generate_module.advance, generate_module._prefill_slot]
    before = [program._cache_size() for program in programs]
    for number, prompt in enumerate(["", "a much longer prompt of several chunks", "x"]):
        generator.submit(prompt, Sampling(max_tokens=3 + number, top_k=2 + number, top_p=0.5, seed=number))
        generator.step()
    finish(generator)
    assert [program._cache_size() for program in programs] == before


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

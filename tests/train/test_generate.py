import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import generate as generate_module
from train.config import ModelConfig
from train.generate import generate
from train.model import Transformer, logits
from train.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def trained():
    config = ModelConfig(
        num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, attention="full"
    )
    model = Transformer(config, TOKENIZER.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return nn.meta.unbox(params), model


def test_temperature_zero_takes_the_likeliest_token_at_every_step(trained):
    params, model = trained
    forward = jax.jit(lambda tokens: logits(params, model.apply({"params": params}, tokens), model.config))
    tokens = [TOKENIZER.bos_id, *TOKENIZER.encode("ab")]
    for _ in range(5):
        padded = jnp.asarray([tokens + [0] * (16 - len(tokens))])
        tokens.append(int(np.argmax(forward(padded)[0, len(tokens) - 1, : TOKENIZER.vocab_size])))
    expected = tokens[1:]
    if TOKENIZER.eos_id in expected:
        expected = expected[: expected.index(TOKENIZER.eos_id)]
    assert generate(params, model, TOKENIZER, "ab", 5, temperature=0.0) == TOKENIZER.decode(expected)
    assert generate(params, model, TOKENIZER, "ab", 5, temperature=1.0, top_k=1) == TOKENIZER.decode(expected)


def test_a_seed_fixes_the_text_and_another_changes_it(trained):
    params, model = trained
    texts = [generate(params, model, TOKENIZER, "ab", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("ab")


def test_prompts_of_different_lengths_share_one_program(trained):
    params, model = trained
    generate(params, model, TOKENIZER, "", 5)
    before = generate_module._continue._cache_size()
    generate(params, model, TOKENIZER, "a longer prompt", 7, temperature=0.3)
    assert generate_module._continue._cache_size() == before


def with_loud_rows(params, model, rows):
    """Parameters under which the given rows of the embedding are by far the likeliest first tokens."""
    hidden = model.apply({"params": params}, jnp.full((1, 8), TOKENIZER.bos_id, jnp.int32))[0, 0]
    return {**params, "embedding": params["embedding"].at[rows].set(100 * hidden[None, :])}


def test_sampling_ends_at_the_end_of_text(trained):
    params, model = trained
    # The beginning of text is the same token as its end, so the input changes too; what follows the bos is what counts.
    ended = with_loud_rows(params, model, jnp.array([TOKENIZER.eos_id]))
    scores = logits(ended, model.apply({"params": ended}, jnp.full((1, 8), TOKENIZER.bos_id, jnp.int32)), model.config)
    assert int(jnp.argmax(scores[0, 0])) == TOKENIZER.eos_id
    assert generate(ended, model, TOKENIZER, "", 5, temperature=0.0) == ""


def test_rows_that_stand_for_no_token_are_never_sampled(trained):
    params, model = trained
    loud = with_loud_rows(params, model, jnp.arange(TOKENIZER.vocab_size, params["embedding"].shape[0]))
    buffer = np.full((1, 64), TOKENIZER.pad_id, np.int32)
    buffer[0, 0] = TOKENIZER.bos_id
    tokens = generate_module._continue(loud, buffer, 1, 9, jnp.float32(1), jax.random.key(0), model=model, top_k=None)
    assert np.all(np.asarray(tokens) < TOKENIZER.vocab_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": -1}, "num_tokens = -1"),
        ({"num_tokens": 1, "temperature": -0.5}, "temperature = -0.5"),
        ({"num_tokens": 1, "top_k": 259}, "top_k = 259: expected 1 to 258"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(trained, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(*trained, TOKENIZER, "", **arguments)

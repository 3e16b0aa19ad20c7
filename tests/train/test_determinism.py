"""What XLA is told so that gradients repeat, and what the user is told."""

import jax
import jax.numpy as jnp
import pytest

from train.determinism import OPTION, OPTIONS, compiler_options, describe
from train.model.embedding import embed

REPEAT = "gradients repeat bit for bit"


@pytest.mark.parametrize(
    ("deterministic", "platform", "xla_flags", "options", "words"),
    [
        (True, "gpu", "", {OPTION: True}, REPEAT),
        (True, "gpu", "--xla_gpu_autotune_level=0 --xla_dump_to=x", {OPTION: True}, REPEAT),
        (True, "cpu", "", {}, REPEAT),
        (False, "cpu", "", {}, REPEAT),
        (False, "gpu", "", {}, "gradients do not repeat bit for bit: deterministic = False"),
        (False, "gpu", f"--a=1 --{OPTIONS[1]}", {}, REPEAT),
        (False, "gpu", f"--{OPTION}=false --{OPTION}=True", {}, REPEAT),
        (True, "gpu", f"--{OPTION}=false", {}, f"gradients do not repeat bit for bit: XLA_FLAGS has {OPTION}=false"),
    ],
)
def test_xla_is_asked_unless_the_user_has_said_so_already(
    monkeypatch, deterministic, platform, xla_flags, options, words
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setenv("XLA_FLAGS", xla_flags)
    assert compiler_options(deterministic) == options
    assert describe(deterministic) == words


@pytest.mark.parametrize("option", OPTIONS)
def test_xla_knows_the_options(option):
    assert jax.jit(lambda x: x + 1, compiler_options={option: True})(jnp.float32(1)) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={f"{option}x": True})(jnp.float32(1))


@pytest.mark.gpu
def test_the_embeddings_gradient_repeats_whatever_xla_is_told():
    tokens = jax.random.randint(jax.random.key(0), (8, 8192), 0, 64)
    cotangent = jax.random.normal(jax.random.key(1), (8, 8192, 256), jnp.bfloat16)

    def gradient(table):
        return jax.vjp(lambda table: embed(table, tokens), table)[1](cotangent)

    table = jnp.ones((64, 256), jnp.bfloat16)
    run = jax.jit(gradient, compiler_options={OPTION: False}).lower(table).compile()
    first = run(table)[0]
    for _ in range(5):
        assert (run(table)[0] == first).all()

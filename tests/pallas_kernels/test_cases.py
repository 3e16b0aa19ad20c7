"""What is timed as the whole attention does all of its work."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.benchmarks import cases, timing

KERNELS = (
    "compressed_attention_forward",
    "block_selection_score",
    "block_selection_top_n",
    "selected_attention_",
    "window_attention_forward",
)


def case(shape):
    return next(case for case in cases.cases(shape, "random") if case.name == "nsa")


def test_the_compiler_does_not_drop_the_selection_of_the_whole_attention(monkeypatch):
    """The selection attended to is a pattern's, so nothing but the benchmark's own care keeps the one computed."""

    def compressed_attention(q, k, v, *_, **__):
        return q, jnp.zeros((1, q.shape[2], q.shape[1]))

    def select_blocks(q, k, lse, *_, config, **__):
        order = jnp.sort(jnp.sin(lse[:, : k.shape[2]]), axis=-1)
        return jnp.repeat((order[..., None] > 0).astype(jnp.int32), config.num_selected, axis=-1)

    def nsa_attention(q, *others, **_):
        return q + others[-1].sum()

    for fake in (compressed_attention, select_blocks, nsa_attention):
        monkeypatch.setattr(cases, fake.__name__, fake)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **__: q)  # cuDNN's, of a case not looked at
    whole = case(cases.Shape(T=256, H=4, K=2, Dk=32, Dv=32, dtype="float32"))
    assert " sort(" in jax.jit(whole.forward).lower(*whole.arguments).compile().as_text()


@pytest.mark.gpu
def test_the_whole_attention_runs_every_kernel():
    whole = case(cases.Shape(T=4096))
    program = jax.jit(whole.forward).lower(*whole.arguments).compile().as_text()
    assert [name for name in KERNELS if name not in program] == []
    assert timing.measure(whole)["forward_ms"]["median"] > 0

"""A kind of attention is one module and one line of the table: the trainer asks it for all that it must know."""

import contextlib
import dataclasses
import sys
import types
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig
from train.config import Attention, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, Remat, TrainConfig
from train.model.attention import KINDS, attention_kind
from train.model.attention.kind import AttentionKind, Split, make_attention
from train.model.flops import train_flops_per_token
from train.model.transformer import Transformer
from train.optimizer import make_optimizer
from train.parallel.communication import collectives, received_bytes
from train.parallel.lowering import compile_here
from train.parallel.sharding import check_divisible, make_mesh, weight
from train.parallel.traffic import predicted_bytes
from train.step import make_init, make_train_step

VOCABULARY, T = 50, 16
CONFIG = TrainConfig(
    model=ModelConfig(
        num_layers=1,
        embed_dim=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=16,
        attention="mean",
        nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=6),
    ),
    data=DataConfig(sequence_length=T, batch_size=8, isolate_documents=False),
    optimizer=OptimizerConfig(warmup_steps=0),
)


class MeanLayer(nn.Module):
    """Every token gets the mean of the values up to its own."""

    num_kv_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, x, *, segment_ids=None):
        size = self.num_kv_heads * self.head_dim
        into = self._weight("v_kernel", (x.shape[-1], size), ("embed", "kv_heads"))
        out = self._weight("out_kernel", (size, x.shape[-1]), ("kv_heads", "embed"))
        count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)
        return (jnp.cumsum(x @ into, axis=1) / count[None, :, None]) @ out

    def _weight(self, name, shape, axes):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
        return weight(self.param(name, init, shape), axes, jnp.float32)


class Mean(AttentionKind):
    def layer(self, config, **common):
        return MeanLayer(common["num_kv_heads"], common["head_dim"], name=common["name"])

    def keys_read(self, config, length):
        return np.zeros(length)

    def received_over_context(self, config, split):
        return 0

    def multiply_adds(self, config, length):
        return 2 * config.embed_dim * config.num_kv_heads * config.head_dim

    def check(self, config, mesh):
        if mesh["context"] > 1:
            raise ValueError(f"mesh.context = {mesh['context']}: expected 1 with attention = mean")


@pytest.fixture(autouse=True)
def mean(monkeypatch):
    """The kind, as a module of a user's own."""
    module = types.ModuleType("mean_attention")
    module.KIND = Mean()
    monkeypatch.setitem(sys.modules, "mean_attention", module)
    monkeypatch.setitem(KINDS, "mean", "mean_attention")


def test_a_new_kind_trains_a_step():
    model, optimizer = Transformer(CONFIG.model, VOCABULARY), make_optimizer(CONFIG.optimizer, CONFIG.steps)
    state = jax.jit(lambda key: nn.meta.unbox(make_init(model, optimizer)(key)))(jax.random.key(0))
    assert set(state.params["layers"]["attention"]) == {"v_kernel", "out_kernel"}
    tokens = jax.random.randint(jax.random.key(1), (8, T), 0, VOCABULARY)
    ones = jnp.ones((8, T), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": ones.astype(jnp.float32), "target_bytes": ones}
    after, metrics = jax.jit(make_train_step(model, optimizer, accumulate=1, z_loss=0.0))(state, batch)
    assert np.isfinite(metrics.grad_norm)
    for before, now in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True):
        assert not np.array_equal(before, now)


def test_flops_follow_a_new_kind():
    matrices = 32 * (2 * 16 + 3 * 16 + 64)  # of the layer, the MLP and the vocabulary of 64 rows
    assert train_flops_per_token(CONFIG.model, T, VOCABULARY) == 6 * matrices


def test_bytes_on_a_mesh_are_predicted_for_a_new_kind():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    found = received_bytes(collectives(compile_here(CONFIG, VOCABULARY, mesh).as_text()))
    assert sum(found.values()) == pytest.approx(sum(predicted_bytes(CONFIG, VOCABULARY, mesh.shape).values()), rel=0.05)


def test_nsa_fetches_other_devices_keys_again_unless_what_attention_computed_is_kept():
    split = Split(length=128, context=4, tensor=2, itemsize=2)
    sizes = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "v_head_dim": 16}
    again = {
        remat: attention_kind("nsa").received_again_over_context(ModelConfig(remat=remat, **sizes), split)
        for remat in typing.get_args(Remat)
    }
    # 96 tokens of others, keys and values of 2 heads, in 2 bytes each
    assert again == {"none": 18432, "dots": 18432, "attention": 0, "full": 18432}


@pytest.mark.parametrize("name", ["nsa", "full", "window"])
def test_devices_of_the_tensor_axis_receive_what_their_own_heads_need(name):
    model = ModelConfig(num_heads=8, num_kv_heads=4, head_dim=32, v_head_dim=16)
    half = dataclasses.replace(model, num_heads=4, num_kv_heads=2)
    received = [
        attention_kind(name).received_over_context(config, Split(length=128, context=4, tensor=tensor, itemsize=2))
        for config, tensor in ((model, 2), (half, 1))
    ]
    assert received[0] == received[1] > 0


@pytest.mark.parametrize(
    ("context", "T", "taken"), [(1, 16, True), (2, 64, False), (2, 96, True), (2, 128, True), (4, 128, False)]
)
def test_nsa_takes_chunks_as_long_as_the_overlap_of_compressed_blocks_and_no_shorter(context, T, taken):
    nsa = NSAConfig(compress_block=32, compress_stride=8, select_block=32)  # which overlap by 24 tokens
    config = TrainConfig(ModelConfig(attention="nsa", nsa=nsa), DataConfig(sequence_length=T))
    message = rf"sequence_length = {T}: .*mesh.context = {context}, whose chunks of 16 .* = 24$"
    with contextlib.nullcontext() if taken else pytest.raises(ValueError, match=message):
        attention_kind("nsa").check(config, {"context": context})


def test_a_new_kind_refuses_what_it_cannot_do():
    config = TrainConfig(model=CONFIG.model, data=CONFIG.data, mesh=MeshConfig(data=4, context=2))
    with pytest.raises(ValueError, match=r"mesh.context = 2: expected 1 with attention = mean"):
        check_divisible(config, 64, 8)


def test_the_command_line_offers_every_kind():
    assert typing.get_args(Attention) == tuple(name for name in KINDS if name != "mean")


@pytest.mark.parametrize("name", [name for name in KINDS if name != "mean"])
def test_every_kind_is_found_by_name_and_makes_its_layer(name):
    assert isinstance(attention_kind(name), AttentionKind)
    assert isinstance(make_attention(ModelConfig(attention=name)), nn.Module)

"""What devices send is counted in compiled programs, and is what the design predicts."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from nsa_jax import NSAConfig
from train.communication import Collective, collectives, predicted_bytes, received_bytes
from train.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from train.model import Transformer
from train.optimizer import make_optimizer
from train.sharding import batch_sharding, make_mesh, on_mesh, tree_shardings
from train.step import make_init, make_train_step

VOCABULARY = 50
CONFIG = TrainConfig(
    model=ModelConfig(
        num_layers=3,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=48,
        nsa=NSAConfig(
            compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_init=1, num_local=1, window=16
        ),
        implementation="xla",
        remat="full",
    ),
    data=DataConfig(batch_size=8, sequence_length=128),
    optimizer=OptimizerConfig(warmup_steps=0),
)


def compiled_step(config):
    """The text of a compiled update, without documents."""
    model, optimizer = Transformer(config.model, VOCABULARY), make_optimizer(config.optimizer, 10)
    init, mesh = make_init(model, optimizer), make_mesh(config.mesh)
    boxed = jax.eval_shape(init, jax.random.key(0))
    shardings = tree_shardings(boxed, mesh)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), nn.unbox(boxed), shardings
    )
    dtypes = {"weights": jnp.float32} | dict.fromkeys(("tokens", "targets", "target_bytes"), jnp.int32)
    shape = (config.data.batch_size, config.data.sequence_length)
    batch = {key: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for key, dtype in dtypes.items()}
    step = jax.jit(make_train_step(model, optimizer, accumulate=1, z_loss=0.0), out_shardings=(shardings, None))
    return on_mesh(lambda *arguments: step.lower(*arguments).compile().as_text(), mesh)(state, batch), mesh


@pytest.mark.parametrize(
    ("mesh", "attention"),
    [
        (MeshConfig(data=2, fsdp=4), "nsa"),
        (MeshConfig(data=1, fsdp=2, context=2, tensor=2), "nsa"),
        (MeshConfig(data=1, fsdp=2, context=4, explicit=True), "full"),
    ],
    ids=str,
)
def test_a_step_sends_what_is_predicted_and_nothing_else(mesh, attention):
    model = dataclasses.replace(CONFIG.model, attention=attention)
    config = dataclasses.replace(CONFIG, mesh=mesh, model=model)
    program, devices = compiled_step(config)
    found = received_bytes(collectives(program))
    expected = predicted_bytes(config, VOCABULARY, devices.shape)
    summed = found.pop("all-reduce")
    assert set(found) <= {"all-gather", "reduce-scatter", "collective-permute"}
    assert sum(found.values()) == pytest.approx(expected["parameters"] + expected["context"], rel=0.01)
    assert summed == pytest.approx(expected["gradients"] + expected["tensor"], rel=0.05)


PROGRAM = """HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: f32[4]) -> f32[4] {
  %g = bf16[8,4]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/inner/gather"}
  ROOT %r = f32[4] copy(%p)
}

%outer (p: f32[4]) -> f32[4] {
  ROOT %w = f32[4] while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4] while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[6], s32[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add, metadata={op_name="jit(f)/sum"}
  ROOT %m = f32[10] collective-permute(%s), source_target_pairs={{0,1}}
}
"""


def test_collectives_are_counted_as_often_as_the_loops_around_them_run():
    assert sorted(collectives(PROGRAM)) == [
        Collective("all-gather", 4, 64, 15, "jit(f)/inner/gather"),
        Collective("all-reduce", 2, 28, 1, "jit(f)/sum"),
        Collective("collective-permute", 2, 40, 1, ""),
    ]
    assert received_bytes(collectives(PROGRAM)) == {
        "all-gather": 15 * 64 * 3 / 4,
        "all-reduce": 2 * 28 / 2,
        "collective-permute": 40,
    }


def test_a_loop_of_unknown_length_that_communicates_is_refused():
    with pytest.raises(ValueError, match="a loop of unknown length communicates: %g = bf16"):
        collectives(PROGRAM.replace('"known_trip_count":{"n":"3"}', ""))

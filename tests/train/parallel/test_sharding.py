import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import train.model.attention.kind
from nsa_jax import NSAConfig, num_compressed
from train.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from train.parallel.lowering import compile_here
from train.parallel.sharding import check_divisible, make_mesh, mesh_shape, tree_shardings


def test_data_takes_the_devices_that_are_left():
    assert mesh_shape(MeshConfig(data=-1, fsdp=2, tensor=2), 8) == (2, 2, 1, 1, 2)
    assert make_mesh(MeshConfig()).shape == {"data": 8, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), r"mesh = \(data 3, fsdp 1, expert 1, context 1, tensor 1\): expected a product of 8"),
        (MeshConfig(fsdp=3), r"mesh = \(data -1, fsdp 3, expert 1, context 1, tensor 1\): expected a product of 8"),
        (MeshConfig(fsdp=16), r"mesh = \(data -1, fsdp 16, expert 1, context 1, tensor 1\): expected a product of 8"),
        (MeshConfig(tensor=0), r"mesh.tensor = 0: expected at least 1"),
        (MeshConfig(data=-2), r"mesh.data = -2: expected at least 1, or -1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_the_numbers(mesh, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(mesh, 8)


EXPERTS = ModelConfig(embed_dim=32, num_kv_heads=2, moe=MoEConfig(num_routed=6, expert_dim=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(data=1, tensor=8)}, r"model.num_kv_heads = 2: .* multiple of mesh.tensor = 8"),
        ({"mesh": MeshConfig(fsdp=4, tensor=2)}, r"model.embed_dim = 30: .* multiple of mesh.fsdp \* mesh.context = 4"),
        ({"mesh": MeshConfig(expert=4), "model": EXPERTS}, r"model.moe.num_routed = 6: .* multiple of mesh.expert = 4"),
        ({"mesh": MeshConfig(tensor=2), "model": EXPERTS}, r"model.moe.expert_dim = 9: .* multiple of mesh.tensor = 2"),
        (
            {"optimizer": OptimizerConfig(accumulate=2)},
            r"data.batch_size / optimizer.accumulate = 4: .* multiple of mesh.data \* mesh.fsdp \* mesh.expert = 8",
        ),
    ],
)
def test_a_mesh_axis_that_does_not_divide_is_refused_with_the_numbers(changes, message):
    config = TrainConfig(model=ModelConfig(embed_dim=30, num_kv_heads=2), data=DataConfig(batch_size=8))
    with pytest.raises(ValueError, match=message):
        check_divisible(dataclasses.replace(config, **changes), 64, 8)


def test_an_axis_that_is_not_in_the_table_is_refused_by_name():
    boxed = {"kernel": nn.LogicallyPartitioned(jnp.ones((2, 2)), ("embed", "experts"))}
    with pytest.raises(ValueError, match=r"kernel.*'experts'"):
        tree_shardings(jax.eval_shape(lambda: boxed), make_mesh(MeshConfig()))


def gathered_heads(T):
    """Shapes of q, k, v and what is made of them, [.., T or Nc, ..] of four axes or more, that a train step moves."""
    nsa = NSAConfig(
        compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_init=1, num_local=1, window=16
    )
    sizes = {"embed_dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "mlp_dim": 24, "num_layers": 2}
    config = TrainConfig(
        model=ModelConfig(**sizes, nsa=nsa, implementation="xla"), data=DataConfig(sequence_length=T, batch_size=8)
    )
    program = compile_here(config, 50, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))).as_text()
    moved = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    assert moved  # the parameters, which fsdp splits
    shapes = [tuple(map(int, s.split(","))) for result in moved for s in re.findall(r"\[([\d,]+)\]", result)]
    return [shape for shape in shapes if len(shape) >= 4 and {T, num_compressed(T, nsa)} & set(shape)]


@pytest.mark.exhaustive
def test_a_train_step_moves_parameters_but_no_heads(monkeypatch):
    assert gathered_heads(T=80) == []
    monkeypatch.setattr(train.model.attention.kind, "RULES", (("batch", ()), ("kv_heads", ()), ("sequence", ())))
    assert gathered_heads(T=80)  # what the partitioner does by itself

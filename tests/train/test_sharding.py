import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from train.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from train.sharding import check_divisible, make_mesh, mesh_shape, tree_shardings


def test_data_takes_the_devices_that_are_left():
    assert mesh_shape(MeshConfig(data=-1, fsdp=2, tensor=2), 8) == (2, 2, 2)
    assert make_mesh(MeshConfig()).shape == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), r"mesh = \(data 3, fsdp 1, tensor 1\): expected a product of 8"),
        (MeshConfig(fsdp=3), r"mesh = \(data -1, fsdp 3, tensor 1\): expected a product of 8"),
        (MeshConfig(fsdp=16), r"mesh = \(data -1, fsdp 16, tensor 1\): expected a product of 8"),
        (MeshConfig(tensor=0), r"mesh.tensor = 0: expected at least 1"),
        (MeshConfig(data=-2), r"mesh.data = -2: expected at least 1, or -1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_the_numbers(mesh, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(mesh, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(data=1, tensor=8)}, r"model.num_kv_heads = 2: .* multiple of mesh.tensor = 8"),
        ({"mesh": MeshConfig(fsdp=4, tensor=2)}, r"model.embed_dim = 30: .* multiple of mesh.fsdp = 4"),
        (
            {"optimizer": OptimizerConfig(accumulate=2)},
            r"data.batch_size / optimizer.accumulate = 4: .* multiple of mesh.data \* mesh.fsdp = 8",
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

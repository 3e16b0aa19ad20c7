"""The update of a run without its data."""

import dataclasses

import pytest

from tests.pallas_kernels.cases import skip_without_mosaic
from tests.train.test_meshes import LARGER, models
from train.config import DataConfig, MeshConfig, TrainConfig
from train.parallel.lowering import lower_for_gpus
from train.presets import PRESETS


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("length", "rows", "mesh"),
    [
        pytest.param(8192, 64, MeshConfig(data=1, fsdp=8, expert=8), marks=pytest.mark.exhaustive),
        (65536, 8, MeshConfig(data=1, expert=8, context=8)),
    ],
    ids=str,
)
def test_the_papers_model_lowers_for_64_gpus_with_its_kernels(length, rows, mesh):
    config = PRESETS["paper-27b"]()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence_length=length, batch_size=rows),
        optimizer=dataclasses.replace(config.optimizer, accumulate=1),
        mesh=mesh,
    )
    program = lower_for_gpus(config, 102400, devices=64, device_kind="NVIDIA H100").as_text()
    assert program.count("__gpu$xla.gpu.triton") > 30  # of one layer, or two where the first differs
    assert "mhlo.num_partitions = 64" in program


@pytest.mark.parametrize(
    ("remat", "mesh"),
    [
        ("dots", MeshConfig(data=1)),
        *(
            pytest.param(*one, marks=pytest.mark.exhaustive)
            for one in (
                ("attention", MeshConfig(data=1)),
                ("full", MeshConfig(data=1)),
                ("dots", MeshConfig(data=2, explicit=True)),
                ("attention", MeshConfig(data=1, context=2)),
            )
        ),
    ],
    ids=str,
)
def test_a_step_lowers_with_mosaic_kernels_whatever_is_rematerialised_and_split(remat, mesh):
    skip_without_mosaic(interpreted=False)
    config = PRESETS["h100-60m"]()
    model = dataclasses.replace(config.model, attention="nsa", implementation="mosaic", remat=remat)
    config = dataclasses.replace(config, model=model, mesh=mesh)
    devices = mesh.data * mesh.context
    program = lower_for_gpus(config, 50, devices=devices, device_kind="NVIDIA H100").as_text()
    again = 5 if remat == "full" else 0  # compressed, blocks, their union, selected, window
    assert program.count("mosaic_gpu_v2") == (13 + again) * mesh.context
    assert "__gpu$xla.gpu.triton" not in program


@pytest.mark.parametrize("name", ["full", "nsa", "experts"])
def test_a_step_on_a_gpu_adds_nothing_up_in_memory(name):
    """Nor does it scatter anything else. Documents are isolated, with which full attention needs no cuDNN."""
    model = dataclasses.replace(models(LARGER)[name], dtype="bfloat16", remat="dots")
    config = TrainConfig(model, DataConfig(batch_size=2, sequence_length=128), mesh=MeshConfig(data=1))
    program = lower_for_gpus(config, 50, devices=1, device_kind="NVIDIA H100").as_text()
    assert "stablehlo.dot_general" in program
    assert "stablehlo.scatter" not in program

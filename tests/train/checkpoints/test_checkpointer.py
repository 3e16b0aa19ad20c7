import gc
import json
import resource
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.errors import CheckpointError
from train.checkpoints.storage import SCORE, with_checksum
from train.config import CheckpointConfig


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array
    rng: jax.Array


def make_state(step: int, vocabulary: int = 96, mesh: jax.sharding.Mesh | None = None) -> State:
    draw = np.random.default_rng(step)
    embedding = draw.standard_normal((vocabulary, 64), np.float32)
    return State(
        params={
            "embedding": jax.device_put(embedding, NamedSharding(mesh, PartitionSpec("x")))
            if mesh
            else jnp.asarray(embedding),
            "scale": jnp.asarray(draw.standard_normal(64), jnp.bfloat16),
        },
        opt_state=(jnp.asarray(draw.standard_normal((vocabulary, 64), np.float32)), ()),
        step=jnp.int32(step),
        rng=jax.random.key_data(jax.random.key(step)),
    )


def make_iterator():
    return iter(grain.MapDataset.source(list(range(1000))).shuffle(seed=0).to_iter_dataset())


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with checkpoints of steps 10, 20 and 30, each one draw further in the data."""
    iterator = make_iterator()
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep_last=3)) as checkpointer:
        for step in (10, 20, 30):
            next(iterator)
            checkpointer.save(step, make_state(step), iterator, {SCORE: 5.0 - step / 10})
    return tmp_path / "checkpoints"


def restore(directory: Path, state: State | None = None):
    iterator = make_iterator()
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore_latest(make_state(0) if state is None else state, iterator)
    return restored, next(iterator)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def largest_array_file(folder: Path) -> Path:
    return max((path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def rewrite_metadata(folder: Path, edit):
    path = folder / "metadata" / "metadata"
    content = json.loads(path.read_text())["content"]
    edit(content)
    path.write_text(json.dumps(with_checksum(content)))


def test_restored_state_and_data_position_equal_the_saved_ones_bit_for_bit(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    state = make_state(7, mesh=mesh)
    expected = jax.tree.map(np.asarray, state)
    iterator = make_iterator()
    for _ in range(3):
        next(iterator)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(7, state, iterator, None)
        # Training goes on while the checkpoint is being written: buffers are reused and the data moves on.
        jax.block_until_ready(overwrite(state))
        upcoming = next(iterator)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0, mesh=mesh)
        )
        fresh = make_iterator()
        step, restored = checkpointer.restore_latest(abstract, fresh)
        assert step == 7
        assert_same_bits(restored, expected)
        assert restored.params["embedding"].sharding == abstract.params["embedding"].sharding
        assert next(fresh) == upcoming
        other_mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
        other = make_state(0, mesh=other_mesh).params
        parameters = checkpointer.restore_parameters(other)
        assert_same_bits(parameters, expected.params)
        assert parameters["embedding"].sharding == other["embedding"].sharding


def test_arrays_without_a_sharding_come_back_free_to_meet_any_device(saved):
    (_, state), _ = restore(saved, jax.eval_shape(lambda: make_state(0)))
    on_last = jax.device_put(jnp.ones((96, 64)), jax.devices()[-1])
    assert (state.params["embedding"] + on_last).devices() == {jax.devices()[-1]}
    assert_same_bits(state, make_state(30))


def test_the_last_and_the_best_checkpoints_are_kept_and_no_others(tmp_path):
    scores = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 4.0, 7: None, 8: None}
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=2, keep_best=2)) as checkpointer:
        assert checkpointer.latest_step is None
        assert checkpointer.best_step is None
        for step in (1, 2, 3, 4):
            checkpointer.save(step, make_state(step), make_iterator(), {SCORE: scores[step]})
        checkpointer.wait()
        assert steps_in(tmp_path) == [2, 3, 4]
    # Another process goes on with what is on disk.
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=2, keep_best=2)) as checkpointer:
        assert (checkpointer.latest_step, checkpointer.best_step) == (4, 2)
        for step in (5, 6, 7, 8):
            metrics = None if scores[step] is None else {SCORE: scores[step], "loss": 1.0}
            checkpointer.save(step, make_state(step), make_iterator(), metrics)
        checkpointer.wait()
        assert steps_in(tmp_path) == [2, 4, 7, 8]
        assert (checkpointer.latest_step, checkpointer.best_step) == (8, 2)
        best = checkpointer.restore_parameters(make_state(0).params, step=checkpointer.best_step)
        assert_same_bits(best, make_state(2).params)


def test_of_equal_scores_the_newer_checkpoint_is_the_best_and_kept(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1, keep_best=1)) as checkpointer:
        for step, score in ((1, 2.0), (2, 2.0), (3, 5.0)):
            checkpointer.save(step, make_state(step), make_iterator(), {SCORE: score})
        checkpointer.wait()
        assert steps_in(tmp_path) == [2, 3]
        assert checkpointer.best_step == 2


def test_saving_a_step_twice_keeps_the_first(saved):
    with Checkpointer(saved, CheckpointConfig(keep_last=3)) as checkpointer:
        checkpointer.save(30, make_state(99), make_iterator(), None)
    (step, state), _ = restore(saved)
    assert step == 30
    assert_same_bits(state, make_state(30))


def cut_arrays(folder):
    path = largest_array_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(folder):
    path = largest_array_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_a_block(folder):
    path = largest_array_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 512] = bytes(512)
    path.write_bytes(data)


def edit_data_position(folder):
    path = folder / "metadata" / "metadata"
    text = path.read_text()
    assert '"next_index": 3' in text
    path.write_text(text.replace('"next_index": 3', '"next_index": 4'))


def remove_state(folder):
    (folder / "state").rename(folder.parent.parent / "elsewhere")


DAMAGE = {
    "array data cut short": cut_arrays,
    "a bit of the array data flipped": flip_one_bit,
    "a block of array data zeroed": zero_a_block,
    "array data deleted": lambda folder: largest_array_file(folder).unlink(),
    "array index emptied": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b""),
    "array index deleted": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "array metadata cut short": lambda folder: (folder / "state" / "_METADATA").write_text('{"tree_meta'),
    "all arrays gone": remove_state,
    "metadata deleted": lambda folder: (folder / "metadata" / "metadata").unlink(),
    "metadata emptied": lambda folder: (folder / "metadata" / "metadata").write_text(""),
    "metadata not text": lambda folder: (folder / "metadata" / "metadata").write_bytes(b"\xff\xfe\x00{"),
    "metadata of another shape": lambda folder: (folder / "metadata" / "metadata").write_text("[1, 2]"),
    "data position changed": edit_data_position,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_checkpoint_is_named_moved_aside_and_the_one_before_used(saved, caplog, damage):
    (_, _), upcoming = restore(saved)
    damage(saved / "30")
    (step, state), position = restore(saved)
    assert step == 20
    assert_same_bits(state, make_state(20))
    assert position == [next(draws) for draws in [make_iterator()] for _ in range(3)][-1] != upcoming
    assert f"checkpoint of step 30 in {saved} is damaged" in caplog.text
    assert f"moved to {saved / 'damaged' / '30'}" in caplog.text
    assert steps_in(saved) == [10, 20]
    assert (saved / "damaged" / "30").is_dir()


def test_a_step_damaged_twice_is_moved_aside_twice(saved):
    with Checkpointer(saved, CheckpointConfig(keep_last=3)) as checkpointer:
        for copy in ("30", "30-2"):
            cut_arrays(saved / "30")
            step, state = checkpointer.restore_latest(make_state(0), make_iterator())
            assert step == 20
            assert (saved / "damaged" / copy).is_dir()
            checkpointer.save(30, state, make_iterator(), None)
            checkpointer.wait()
    assert steps_in(saved) == [10, 20, 30]


def test_when_all_are_damaged_the_error_names_all_and_nothing_is_moved(saved):
    for step in steps_in(saved):
        cut_arrays(saved / str(step))
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged: step 30: .*; step 20: .*; step 10: "):
        restore(saved)
    assert steps_in(saved) == [10, 20, 30]


def test_without_any_checkpoint_nothing_is_restored_and_nothing_written(tmp_path):
    restored, _ = restore(tmp_path / "none")
    assert restored is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpointer(tmp_path / "none", CheckpointConfig()).restore_parameters(make_state(0).params)
    assert list(tmp_path.iterdir()) == []


def test_reading_parameters_passes_over_damage_and_moves_nothing(saved, caplog):
    DAMAGE["array index emptied"](saved / "30")
    checkpointer = Checkpointer(saved, CheckpointConfig())
    assert_same_bits(checkpointer.restore_parameters(make_state(0).params), make_state(20).params)
    assert f"checkpoint of step 30 in {saved} is damaged" in caplog.text
    assert steps_in(saved) == [10, 20, 30]
    with pytest.raises(CheckpointError, match=r"step 30 .* is damaged"):
        checkpointer.restore_parameters(make_state(0).params, step=30)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 40 .*\[10, 20, 30\]"):
        checkpointer.restore_parameters(make_state(0).params, step=40)


def test_a_tokenizer_whose_vocabulary_does_not_fit_is_refused_with_both_shapes(saved):
    with pytest.raises(CheckpointError) as caught:
        restore(saved, make_state(0, vocabulary=128))
    message = str(caught.value)
    assert "vocabulary" in message
    assert "step 30" in message
    assert "params/embedding: [96, 64] float32 in the checkpoint, [128, 64] float32 expected" in message
    assert "opt_state/0: [96, 64] float32 in the checkpoint, [128, 64] float32 expected" in message
    with pytest.raises(CheckpointError, match=r"params/embedding: \[96, 64\]"):
        Checkpointer(saved, CheckpointConfig()).restore_parameters(make_state(0, vocabulary=128).params)
    assert steps_in(saved) == [10, 20, 30]


def test_another_architecture_is_refused_with_the_first_differing_arrays(saved):
    state = make_state(0)
    layers = {f"layer{i}": jnp.zeros(3) for i in range(9)}
    other = state._replace(params={"embedding": state.params["embedding"], **layers})
    with pytest.raises(CheckpointError) as caught:
        restore(saved, other)
    assert "params/layer0: absent in the checkpoint, [3] float32 expected" in str(caught.value)
    assert "and 6 more" in str(caught.value)
    assert "vocabulary" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"params/scale: \[64\] bfloat16 in the checkpoint, absent expected"):
        Checkpointer(saved, CheckpointConfig()).restore_parameters({"embedding": state.params["embedding"]})
    half = state._replace(step=jnp.float32(0))
    with pytest.raises(CheckpointError, match=r"step: \[\] int32 in the checkpoint, \[\] float32 expected"):
        restore(saved, half)
    assert steps_in(saved) == [10, 20, 30]


def test_a_position_that_does_not_fit_the_data_is_refused(saved):
    class Strict:
        def set_state(self, state):
            raise ValueError("no such file 7")

    checkpointer = Checkpointer(saved, CheckpointConfig())
    with pytest.raises(CheckpointError, match=r"data position .* step 30 .* does not fit this data: no such file 7"):
        checkpointer.restore_latest(make_state(0), Strict())
    rewrite_metadata(saved / "30", lambda content: content.update(format=2))
    with pytest.raises(CheckpointError, match="checkpoint format 2, this version reads format 1"):
        checkpointer.restore_latest(make_state(0), make_iterator())
    assert steps_in(saved) == [10, 20, 30]


def test_in_other_shares_the_data_goes_on_after_as_many_batches_and_says_so(saved, caplog):
    rewrite_metadata(saved / "30", lambda content: content["data"].append(content["data"][0]))
    iterator = make_iterator()
    step, _ = Checkpointer(saved, CheckpointConfig()).restore_latest(make_state(0), iterator)
    untouched = make_iterator()
    for _ in range(step):
        next(untouched)
    assert next(iterator) == next(untouched)
    assert "up to step 30 the data was loaded in 2 shares, now it is in 1: passed over the first 30" in caplog.text


def test_a_save_cut_off_is_not_a_checkpoint_and_is_cleared_away_by_the_next_save(saved):
    unfinished = saved / "40.orbax-checkpoint-tmp"
    (saved / "30").rename(unfinished)
    (step, state), _ = restore(saved)
    assert step == 20
    assert unfinished.is_dir()
    with Checkpointer(saved, CheckpointConfig(keep_last=3)) as checkpointer:
        checkpointer.save(30, state, make_iterator(), None)
        checkpointer.wait()
        assert not unfinished.exists()
        assert checkpointer.latest_step == 30


@pytest.mark.parametrize("limit", [*(pytest.param(x, marks=pytest.mark.exhaustive) for x in (0, 1500)), 12_000])
def test_a_full_disk_names_the_step_that_failed_and_the_one_that_remains(saved, limit):
    # A limit on the size of files is the full disk that needs no rights: writing fails for real, half-way.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = Checkpointer(saved, CheckpointConfig(keep_last=3))
    # When one array fails, others are still on their way.
    state = make_state(40)
    state = state._replace(params=state.params | {f"large{i}": jnp.zeros((128, 1024)) for i in range(16)})
    with Checkpointer(saved.parent / "elsewhere", CheckpointConfig()) as other:
        other.save(40, state, make_iterator(), None)  # what is compiled for it is kept while there is room
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError) as caught:  # noqa: PT012
            checkpointer.save(40, state, make_iterator(), None)
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "could not save the checkpoint of step 40" in message
    assert "File too large" in message
    assert "the last good checkpoint is step 30 and remains" in message
    assert steps_in(saved) == [10, 20, 30]
    # Nothing is left half done, of which Python would complain in whatever runs when it is freed.
    gc.collect()
    # Nothing waits to be raised again, and once there is room the run can go on saving.
    checkpointer.wait()
    checkpointer.save(50, make_state(50), make_iterator(), None)
    checkpointer.close()
    assert sorted(path.name for path in saved.iterdir()) == ["20", "30", "50"]
    (step, state), _ = restore(saved)
    assert step == 50
    assert_same_bits(state, make_state(50))


def test_impossible_settings_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpointer(tmp_path, CheckpointConfig(keep_last=0))
    with pytest.raises(ValueError, match="keep_best is -1"):
        Checkpointer(tmp_path, CheckpointConfig(keep_best=-1))


def test_an_error_on_its_way_is_not_replaced_by_one_from_saving(saved):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(FloatingPointError), Checkpointer(saved, CheckpointConfig()) as checkpointer:  # noqa: PT012
            checkpointer._open()
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
            checkpointer.save(40, make_state(40), make_iterator(), None)
            raise FloatingPointError("loss is nan")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

"""Random layers: against the reference, beside values that must not matter, over caches and on meshes.

`MINUTES=60 python -m pytest tests/nsa_jax/test_whole_configurations.py -n 0 -s` goes on for an hour with other layers
in every round, and says at the end how many there were. `SEED` is the first round's: 0, if not given. Every failure is
printed as the `LayerCase` that shows it.
"""

import contextlib
import itertools
import os
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, seed, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from strategies import LayerCase, layer_cases, random_segment_ids

import nsa_jax
import nsa_jax.nnx
from nsa_jax.context import from_zigzag, to_zigzag
from nsa_jax.layer import LayerConfig, NSALayerConfig, nsa_layer_inputs, nsa_parameters, projection_parameters
from nsa_jax.testing import normwise_error, reference_selection, tolerance_of

E = 12
AXES = {"data": "batch_axes", "tensor": "head_axes", "context": "context_axes"}
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Layer:
    """A layer of either kind of modules as functions of its parameters."""

    def __init__(self, case: LayerCase, **changes):
        fields = {**case.fields, **changes}
        self.case, self.nnx = case, case.nnx
        if case.kind == "nsa":
            config, classes = NSALayerConfig(**fields), (nsa_jax.NSAttention, nsa_jax.nnx.NSAttention)
            self.declared = nsa_parameters(config, E)
        else:
            fields = {"window": case.window, **fields}
            fields.pop("implementation", None)
            config = LayerConfig(**{name: value for name, value in fields.items() if name != "window"})
            classes = (nsa_jax.FullAttention, nsa_jax.nnx.FullAttention)
            self.declared = projection_parameters(config, E, ("",))
        self.config, self.linen = config, classes[0](**fields)
        if case.nnx:  # made outside of any mesh, on which the names of its axes would need rules
            self.graph, self.state = nnx.split(nnx.eval_shape(lambda: classes[1](E, rngs=nnx.Rngs(0), **fields)))

    def apply(self, parameters, *arguments, method="__call__", **options):
        if not self.nnx:
            return self.linen.apply({"params": parameters}, *arguments, method=method, **options)
        state = jax.tree.map(lambda x: x, self.state)  # a copy, which takes the parameters
        nnx.replace_by_pure_dict(state, dict(parameters))
        return getattr(nnx.merge(self.graph, state), method)(*arguments, **options)

    def jitted(self, method="__call__", **options):
        def call(parameters, *arguments, **traced):
            return self.apply(parameters, *arguments, method=method, **options, **traced)

        return jax.jit(call, compiler_options=FAST)

    def parameters(self, rng):
        """Normal numbers, of a size that keeps outputs near 1."""
        return {
            name: jnp.asarray(
                1 + 0.1 * rng.normal(size=p.shape)
                if name.endswith("norm_scale")
                else rng.normal(size=p.shape) / np.sqrt(np.prod(p.shape[:-1]) if len(p.shape) > 1 else 16),
                jnp.float64 if self.case.dtype == "float64" else jnp.float32,
            )
            for name, p in self.declared.items()
        }


def problem(case: LayerCase):
    """(random numbers, layer, parameters, x, segment ids or None)."""
    rng = np.random.default_rng(case.seed)
    layer = Layer(case)
    parameters = layer.parameters(rng)
    x = jnp.asarray(rng.normal(size=(case.batch, case.tokens, E)), case.dtype)
    ids = jnp.asarray(random_segment_ids(rng, case.batch, case.tokens)) if case.segments else None
    return rng, layer, parameters, x, ids


def close(what, actual, expected, tolerance, rows=None, least=None):
    """Close in norm, on the rows [B, T] given, or as near as `least` in every element."""
    a, b = (np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32))) for array in (actual, expected))
    a, b = (a, b) if rows is None else (a[rows], b[rows])
    error = normwise_error(a, b)
    # A result that is zero but for rounding has no relative error.
    least = 1e-2 * tolerance if least is None else least
    assert error <= tolerance or np.abs(a - b).max() <= least, f"{what}: {error:.3g} above {tolerance:.3g}"


def close_gradients(case: LayerCase, actual, expected):
    """Every gradient is close in norm. One that is zero but for rounding is as near as one rounding of the largest.

    Some are zero as sums of terms that are not: of what shifts all keys of a query alike, without positions, and of
    scores where a query sees a single key. What is left of them is the dtype's rounding: less than 1e-16 of the
    largest gradient in float64, and less than 1e-7 in float32.
    """
    norms = {name: np.linalg.norm(np.asarray(gradient, np.float64)) for name, gradient in expected.items()}
    rounding = float(jnp.finfo(case.dtype).eps) * max(norms.values())
    assert np.isfinite(rounding), "a gradient is not finite"
    for name, norm in norms.items():
        least = rounding if norm <= rounding else None
        close(f"d {name}", actual[name], expected[name], 3 * tolerance_of(case.dtype), least=least)


def decided(case: LayerCase, layer, parameters, x, ids):
    """[B, T]: the queries whose selection does not hang on rounding, in any K/V head."""
    rows = np.ones(x.shape[:2], bool)
    if case.kind != "nsa":
        return rows
    sizes = case.fields["config"]
    inputs = jax.jit(lambda p, x, ids: nsa_layer_inputs(p, x, config=layer.config, segment_ids=ids))(parameters, x, ids)
    importance = np.asarray(reference_selection(inputs._replace(query_offset=0), sizes)[2])
    least = 1e-9 if case.dtype == "float64" else 1e-4
    segments = np.zeros(rows.shape) if ids is None else np.asarray(ids)
    for b, t in np.ndindex(*rows.shape):
        first = int(np.flatnonzero(segments[b] == segments[b, t])[0]) // sizes.select_block
        own = t // sizes.select_block
        free = np.arange(min(first + sizes.num_init, own + 1), max(own - sizes.num_local + 1, first))
        places = sizes.num_selected - (own - first + 1 - len(free))
        if not sizes.select_in_window:
            free = free[free * sizes.select_block <= t - sizes.window]
        for scores in importance[b, :, t]:
            ranked = -np.sort(-scores[free])
            if 0 < places < len(ranked) and ranked[places - 1] > 0:
                rows[b, t] &= ranked[places - 1] - ranked[places] > least * ranked[places - 1]
    return rows


def gradients(layer, rows):
    """The output, and the gradients of its product with a cotangent on the rows given."""

    def run(parameters, x, ids, cotangent):
        y, pull = jax.vjp(lambda p, x: layer.apply(p, x, segment_ids=ids), parameters, x)
        return y, pull(jnp.where(rows[..., None], cotangent, 0).astype(y.dtype))

    return jax.jit(run, compiler_options=FAST)


def check_gradients(case: LayerCase):
    rng, layer, parameters, x, ids = problem(case)
    rows = decided(case, layer, parameters, x, ids)
    cotangent = jnp.asarray(rng.normal(size=x.shape), case.dtype)
    other = Layer(case, implementation="reference")
    y, (dp, dx) = gradients(layer, rows)(parameters, x, ids, cotangent)
    wanted, (wanted_dp, wanted_dx) = gradients(other, rows)(parameters, x, ids, cotangent)
    close("y", y, wanted, tolerance_of(case.dtype), rows)
    close_gradients(case, {"x": dx, **dp}, {"x": wanted_dx, **wanted_dp})


def check_poison(case: LayerCase):
    """Tokens that a query does not see, however full of poison, leave its output and its gradient as they are."""
    rng, layer, parameters, x, ids = problem(case)
    begin = int(rng.integers(case.tokens))
    end = case.tokens if rng.random() < 0.5 else begin + 1
    value = case.poison
    if case.fields.get("implementation") == "triton":  # its tiles keep apart what is finite, and whose products are
        value = 1e3
    poisoned = x.at[:, begin:end].set(jnp.asarray(value, x.dtype))
    segments = np.zeros(x.shape[:2]) if ids is None else np.asarray(ids)
    hit = np.array([np.isin(row, row[begin:end]) for row in segments])
    rows = ~(hit & (np.arange(case.tokens) >= begin)[None, :])
    if not rows.any():
        return
    cotangent = jnp.asarray(rng.normal(size=x.shape), case.dtype)
    run = gradients(layer, rows)
    y, (_, dx) = run(parameters, poisoned, ids, cotangent)
    wanted, (_, wanted_dx) = run(parameters, x, ids, cotangent)
    close("y", y, wanted, tolerance_of(case.dtype) / 10, rows)
    close("dx", dx, wanted_dx, tolerance_of(case.dtype) / 10, rows)


def check_cache(case: LayerCase):
    """A poisoned cache, ragged prompts and chunks beside poison, drafts taken back: the outputs of the whole layer."""
    rng, layer, parameters, x, _ = problem(case)
    B, T = case.batch, case.tokens
    poison = jnp.asarray(case.poison, case.dtype)
    triton = case.fields.get("implementation") == "triton"
    expected = Layer(case, implementation="reference").jitted()(parameters, x)
    rows = decided(case, layer, parameters, x, None)
    sizes = {"batch_size": B, "max_length": T, "dtype": x.dtype}
    most = 1
    if case.kind == "nsa":
        most = sizes["step_tokens"] = case.step_tokens
        if case.paged:
            N = -(-T // case.fields["config"].select_block)
            pages = rng.permutation(B * N + 3)[: B * N].reshape(B, N)
            sizes |= {"num_pages": B * N + 3, "block_tables": jnp.asarray(pages, jnp.int32)}
    cache = layer.linen.init_cache(**sizes)
    cache = cache._replace(
        **{
            name: jnp.full_like(a, poison)
            for name, a in cache._asdict().items()
            if jnp.issubdtype(a.dtype, jnp.floating)
        }
    )
    y = np.full(x.shape, np.nan)
    lengths = np.zeros(B, int)

    def give(call, width, counts, cache, right=None):
        """Calls with the next tokens of each row and poison after them; keeps the outputs of those that are right."""
        tokens = np.full((B, width, E), case.poison)
        for b, count in enumerate(counts):
            tokens[b, :count] = np.asarray(x[b, lengths[b] : lengths[b] + count], np.float64)
            if right is not None:
                tokens[b, right[b] : count] = rng.normal(size=(count - right[b], E))
        out, cache = call(parameters, jnp.asarray(tokens, x.dtype), cache, num_tokens=jnp.asarray(counts, jnp.int32))
        assert np.isfinite(np.asarray(out, np.float64)).all(), "an output is not finite"
        for b, count in enumerate(counts if right is None else right):
            y[b, lengths[b] : lengths[b] + count] = np.asarray(out[b, :count], np.float64)
            lengths[b] += count
        return cache

    width = min(case.chunk, T)
    cache = give(layer.jitted("prefill"), width, rng.integers(0, width + 1, B), cache)
    if rng.random() < 0.5:
        counts = np.minimum(rng.integers(0, width + 1, B), T - lengths)
        cache = give(layer.jitted("prefill", continuing=True), width, counts, cache)
    step = layer.jitted("decode_step")
    while (lengths < T).any() and (not triton or (lengths < 8).any()):
        counts = np.minimum(rng.integers(0, most + 1, B), T - lengths)
        right = np.array([rng.integers(0, count + 1) for count in counts])
        cache = give(step, most, counts, cache, right)
        if case.kind == "nsa":
            cache = nsa_jax.rollback(cache, jnp.asarray(counts - right, jnp.int32), config=case.fields["config"])
        else:
            cache = cache._replace(lengths=jnp.asarray(lengths, jnp.int32))
    rows &= ~np.isnan(y).all(axis=-1)
    close("y", jnp.asarray(y), expected, tolerance_of(case.dtype), rows)


def check_mesh(case: LayerCase):
    """On a mesh, with its axes named to the layer: the outputs and gradients of one device."""
    rng, layer, parameters, x, ids = problem(case)
    rows = decided(case, layer, parameters, x, ids)
    cotangent = jnp.asarray(rng.normal(size=x.shape), case.dtype)
    wanted = gradients(layer, rows)(parameters, x, ids, cotangent)
    kind = AxisType.Explicit if case.explicit else AxisType.Auto
    mesh = jax.make_mesh((2,) * len(case.axes), case.axes, axis_types=(kind,) * len(case.axes))
    split = Layer(case, **{AXES[axis]: axis for axis in case.axes})
    context = "context" in case.axes
    place = PartitionSpec("data" if "data" in case.axes else None, "context" if context else None)
    order = (lambda a: to_zigzag(a, 2)) if context else (lambda a: a)
    with jax.set_mesh(mesh):
        arrays = [
            None if a is None else jax.device_put(order(np.asarray(a)), NamedSharding(mesh, place))
            for a in (x, ids, cotangent)
        ]
        y, (dp, dx) = gradients(split, jnp.asarray(order(rows)))(jax.device_get(parameters), *arrays)
    y, dx, dp = jax.device_get((y, dx, dp))
    if context:
        y, dx = (from_zigzag(a, 2) for a in (y, dx))
    close("y", y, wanted[0], tolerance_of(case.dtype), rows)
    close_gradients(case, {"x": dx, **dp}, {"x": wanted[1][1], **wanted[1][0]})


CHECKS = {"gradients": check_gradients, "poison": check_poison, "cache": check_cache, "mesh": check_mesh}


def check(case: LayerCase):
    with jax.enable_x64(True) if case.x64 else contextlib.nullcontext():
        CHECKS[case.aspect](case)


@pytest.mark.exhaustive
def test_random_layers():
    """Rounds of 20 layers: one, or as many as begin within the `MINUTES` of the environment."""
    ends = time.monotonic() + 60 * float(os.environ.get("MINUTES", 0))
    ran, failures = dict.fromkeys(CHECKS, 0), []

    def run(case: LayerCase):
        ran[case.aspect] += 1
        try:
            check(case)
        except Exception:
            failures.append(case)
            print(f"{case}\n{traceback.format_exc(limit=-3)}", flush=True)

    options = settings(
        max_examples=20,
        derandomize=False,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for number in itertools.count(int(os.environ.get("SEED", 0))):
        seed(number)(options(given(layer_cases())(run)))()
        print(f"{sum(ran.values())} layers, {ran}, {len(failures)} failed", flush=True)
        jax.clear_caches()
        if time.monotonic() >= ends:
            break
    assert not failures, failures

"""Each optimizer is its equation, decays matrices alone, and learns."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.errors import UserError
from research.models.canonical_params import canonical
from research.models.initialization import init_params
from research.optim.optimizers import OptimConfig, build_optimizer
from research.optim.schedules import ScheduleConfig
from research.parallel.parameter import Axes, logical_axes
from research.training.language_model import LanguageModelLoss
from tests.tiny import abstract_params, random_batch, random_params, summed, tiny_config

NAMES = ("adamw", "adafactor", "lion", "sgd", "muon")
CONSTANT = ScheduleConfig(name="constant")
# name -> what it is, shape, whether it decays
ARRAYS: dict[str, tuple[Axes, tuple[int, ...], bool]] = {
    "up": (Axes(("embed", "mlp"), "kernel", 1), (4, 6), True),
    "stacked_up": (Axes(("layers", "embed", "mlp"), "kernel", 1), (2, 4, 6), True),
    "query": (Axes(("embed", "heads", "head"), "kernel", 1), (4, 2, 3), True),
    "latent_query": (Axes(("latent", "heads", "head"), "kernel", 1), (4, 2, 3), True),
    "out": (Axes(("heads", "head", "embed"), "kernel", 2), (2, 3, 4), True),
    "experts_up": (Axes(("expert", "embed", "mlp"), "kernel", 1), (3, 4, 6), True),
    "embedding": (Axes(("vocab", "embed"), "table"), (7, 4), True),
    "positions": (Axes(("positions", "embed"), "table"), (5, 4), True),
    "unembed": (Axes(("embed", "vocab"), "table"), (4, 7), True),
    "scale": (Axes(("embed",), "scale"), (4,), False),
    "stacked_scale": (Axes(("layers", "embed"), "scale"), (2, 4), False),
    "mlp_bias": (Axes(("mlp",), "bias"), (6,), False),
    "query_bias": (Axes(("heads", "head"), "bias"), (2, 3), False),
    "stacked_query_bias": (Axes(("layers", "heads", "head"), "bias"), (2, 2, 3), False),
    "experts_bias": (Axes(("expert", "embed"), "bias"), (3, 4), False),
    "distance_bias": (Axes(("buckets", "heads"), "bias"), (5, 2), False),
}


def random_arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32) for name, (_, shape, _) in ARRAYS.items()
    }


def steps(gradients: list[dict[str, np.ndarray]], **fields) -> dict[str, np.ndarray]:
    """Parameters after one step for each gradient."""
    axes = {name: axes for name, (axes, _, _) in ARRAYS.items()}
    optimizer, _ = build_optimizer(OptimConfig(schedule=CONSTANT, **fields), axes, 10)
    params = random_arrays(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def by_equation(name: str, gradients: list[Any], array: str, decay: float) -> np.ndarray:
    """The same by hand: rate 0.1, β1 = 0.8, β2 = 0.9, ε = 1e-3."""
    p = random_arrays(0)[array].astype(np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient[array]
        if name == "adamw":
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            direction = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        elif name == "lion":
            direction, m = np.sign(0.8 * m + 0.2 * g), 0.9 * m + 0.1 * g
        else:
            direction = m = 0.8 * m + g
        p = p - 0.1 * (direction + decay * p)
    return p


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_steps_follow_the_equation(name: str):
    gradients = [random_arrays(seed) for seed in (1, 2, 3)]
    found = steps(
        gradients,
        name=name,
        learning_rate=0.1,
        beta1=0.8,
        beta2=0.9,
        epsilon=1e-3,
        weight_decay=0.5,
    )
    for array, (_, _, decays) in ARRAYS.items():
        expected = by_equation(name, gradients, array, 0.5 if decays else 0.0)
        np.testing.assert_allclose(found[array], expected, atol=1e-5, err_msg=array)


@pytest.mark.parametrize("name", NAMES)
def test_decay_shrinks_matrices_and_tables_and_nothing_else(name: str):
    gradients = [random_arrays(1)]
    with_decay = steps(gradients, name=name, learning_rate=0.1, weight_decay=0.5)
    without = steps(gradients, name=name, learning_rate=0.1, weight_decay=0.0)
    for array, (_, _, decays) in ARRAYS.items():
        expected = -0.1 * 0.5 * random_arrays(0)[array] if decays else 0.0
        np.testing.assert_allclose(
            with_decay[array] - without[array], expected, atol=1e-6, err_msg=array
        )


def test_every_parameter_of_a_model_is_told_apart():
    config = tiny_config(attention={"qkv_bias": True, "out_bias": True}, mlp={"bias": True})
    boxed = abstract_params(config)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), nn.unbox(boxed))
    optimizer, _ = build_optimizer(
        OptimConfig(name="sgd", schedule=CONSTANT), logical_axes(boxed), 10
    )
    updates, _ = optimizer.update(
        jax.tree.map(np.zeros_like, params), optimizer.init(params), params
    )
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (path[-1].key, bool(np.any(leaf))), updates
    )
    found = set(jax.tree.leaves(decayed, is_leaf=lambda leaf: isinstance(leaf, tuple)))
    expected = {
        ("kernel", True),
        ("embedding", True),
        ("unembed", True),
        ("scale", False),
        ("bias", False),
    }
    assert found == expected


def matrix(update: np.ndarray, rows: int) -> np.ndarray:
    return update.reshape(rows, -1)


def test_muon_moves_matrices_evenly_in_all_directions():
    before, gradient = random_arrays(0), random_arrays(1)
    found = steps([gradient], name="muon", learning_rate=0.1, weight_decay=0.0)
    moved = {name: found[name] - before[name] for name in ARRAYS}
    for name, (_, shape, _) in ARRAYS.items():
        if name not in ("up", "query", "latent_query", "out"):
            continue
        rows = shape[0] if name != "out" else shape[0] * shape[1]
        spectrum = np.linalg.svd(matrix(moved[name], rows), compute_uv=False)
        raw = np.linalg.svd(matrix(gradient[name], rows), compute_uv=False)
        assert spectrum.max() / spectrum.min() < 2 < raw.max() / raw.min(), name
        # As large as AdamW's update: 0.2 of the rate for each entry.
        assert np.sqrt(np.mean(moved[name] ** 2)) == pytest.approx(0.1 * 0.2, rel=0.25), name
        assert np.vdot(moved[name], gradient[name]) < 0


@pytest.mark.parametrize("name", ["stacked_up", "experts_up"])
def test_muon_takes_each_layer_and_each_expert_by_itself(name: str):
    gradient = random_arrays(1)
    mixed = {**gradient, name: np.stack([gradient["up"], *(50 * gradient[name][1:])])}
    found = steps([mixed], name="muon", learning_rate=0.1, weight_decay=0.0)
    before = random_arrays(0)
    np.testing.assert_allclose(
        found[name][0] - before[name][0], found["up"] - before["up"], atol=1e-6
    )


def test_muon_moves_tables_and_vectors_as_adam_does():
    before, gradient = random_arrays(0), random_arrays(1)
    found = steps([gradient], name="muon", learning_rate=0.1, weight_decay=0.0, beta1=0.8)
    for name in (
        "embedding",
        "positions",
        "unembed",
        "scale",
        "query_bias",
        "experts_bias",
        "distance_bias",
    ):
        # Nesterov's first step: (β1 m̂' + (1 − β1) ĝ) / |g|, with m̂' = (1 − β1) g / (1 − β1²) and
        # ĝ = g / (1 − β1).
        expected = -0.1 * (0.8 * 0.2 / (1 - 0.8**2) + 1) * np.sign(gradient[name])
        np.testing.assert_allclose(found[name] - before[name], expected, rtol=1e-3, err_msg=name)


@pytest.mark.fast_cases("muon", "adafactor")
@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_take_the_steps_of_single_ones_and_have_their_state_on_disk(name: str):
    assert_same_steps_scanned_and_unrolled(name, {"num_layers": 2})


@pytest.mark.thorough
def test_adafactor_takes_stacks_that_differ_in_depth_layer_by_layer():
    structure = {"structure": "encoder_decoder", "num_layers": 2, "encoder_layers": 3}
    assert_same_steps_scanned_and_unrolled("adafactor", structure)


def assert_same_steps_scanned_and_unrolled(name: str, fields: dict[str, Any]) -> None:
    # Large enough for Adafactor to keep rows and columns alone.
    wide = {"embed_dim": 128, "mlp": {"hidden_dim": 160}}

    def stepped(layer_loop: str) -> dict[str, Any]:
        config = tiny_config(layer_loop=layer_loop, **wide, **fields)
        optimizer, _ = build_optimizer(
            OptimConfig(name=name, learning_rate=0.01), logical_axes(abstract_params(config)), 10
        )

        @jax.jit
        def step(params: Any) -> Any:
            gradients = jax.tree.map(lambda p: jnp.sin(100 * p) * p, params)
            updates, state = optimizer.update(gradients, optimizer.init(params), params)
            return {"params": optax.apply_updates(params, updates), "state": state}

        return canonical(step(nn.unbox(init_params(config, jax.random.key(3)))))

    unrolled, scanned = stepped("unroll"), stepped("scan")
    assert unrolled.keys() == scanned.keys()
    for array in unrolled:
        np.testing.assert_allclose(
            unrolled[array], scanned[array], rtol=0, atol=1e-6, err_msg=array
        )


def test_adafactor_keeps_rows_and_columns_alone_of_large_matrices():
    params = {"up": np.zeros((128, 256), np.float32)}
    optimizer, _ = build_optimizer(
        OptimConfig(name="adafactor", learning_rate=0.1, schedule=CONSTANT),
        {"up": Axes(("embed", "mlp"), "kernel", 1)},
        10,
    )
    state = optimizer.init(params)
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) < 128 + 256 + 10
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (128, 256))
    gradient = {
        "up": (rng.uniform(0.1, 9, (128, 1)) * rng.uniform(0.1, 9, (1, 256)) * signs).astype(
            np.float32
        )
    }
    updates, _ = jax.jit(optimizer.update)(gradient, state, params)
    # Squares of rank one are factored without loss, so that the first update is the sign.
    np.testing.assert_allclose(updates["up"], -0.1 * signs, rtol=1e-3)


@functools.lru_cache
def learner() -> tuple[Any, Any, Any]:
    """Initial parameters of a tiny model, its axes, and its loss and gradient on one batch."""
    config = tiny_config(num_layers=1)
    params = random_params(config)
    batch = {name: jnp.asarray(array) for name, array in random_batch(2, 8).items()}
    loss = summed(LanguageModelLoss(config))
    return (
        params,
        logical_axes(abstract_params(config)),
        jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None)[0])),
    )


def losses(name: str, learning_rate: float) -> list[float]:
    params, axes, gradient = learner()
    config = OptimConfig(name=name, learning_rate=learning_rate, schedule=CONSTANT)
    optimizer, _ = build_optimizer(config, axes, 10)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    seen = []
    for _ in range(25):
        value, grads = gradient(params)
        seen.append(float(value))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return seen


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [("adamw", 0.02), ("adafactor", 0.02), ("lion", 0.005), ("sgd", 0.01), ("muon", 0.05)],
)
def test_optimizer_learns_one_batch_by_heart(name: str, learning_rate: float):
    found = losses(name, learning_rate)
    assert found[-1] < 0.5 * found[0]


def test_optimizer_learns_nothing_at_no_rate():
    found = losses("adamw", 1e-12)
    assert found[-1] == pytest.approx(found[0], rel=1e-6)


def test_rate_of_the_log_is_the_rate_of_the_update():
    schedule = ScheduleConfig(name="linear", warmup_steps=2, final_fraction=0.0)
    optimizer, rate = build_optimizer(
        OptimConfig(name="sgd", learning_rate=1.0, beta1=0.0, weight_decay=0.0, schedule=schedule),
        {"x": Axes(("mlp",), "bias")},
        6,
    )
    params = {"x": np.zeros(3, np.float32)}
    state = optimizer.init(params)
    seen = []
    for _ in range(6):
        seen.append(float(rate(state)))
        updates, state = optimizer.update({"x": np.ones(3, np.float32)}, state, params)
        np.testing.assert_allclose(updates["x"], -seen[-1], atol=1e-7)
    np.testing.assert_allclose(seen, [0, 0.5, 1, 0.75, 0.5, 0.25], atol=1e-7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("weight_decay", -1.0),
        ("epsilon", -1e-8),
        ("clip_norm", 0.0),
        ("ema_decay", 1.0),
    ],
)
def test_impossible_value_is_refused(field: str, value: float):
    with pytest.raises(UserError, match=f"^{field} = {value} must"):
        OptimConfig(**{field: value})

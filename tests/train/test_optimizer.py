"""Schedules by their shape, weight decay and Muon by which parameters they touch."""

import jax
import numpy as np
import pytest

from puna.configs import schema
from puna.models.parallel import sharding
from puna.models.transformer import abstract_params
from puna.train.optimizer import learning_rate, make_optimizer, schedule

MODEL = {
    "vocab_size": 32, "embed_dim": 8, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 4, "mlp_dim": 12, "moe_interval": 2, "num_experts": 2, "expert_dim": 8,
    "bias_update_rate": 0.1,
}  # fmt: skip


def config(**optimizer):
    values = {"model": MODEL, "optimizer": optimizer, "train": {"steps": 100}}
    return schema.from_dict(values)


@pytest.mark.parametrize("shape", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule(shape, warmup):
    final = {} if shape == "constant" else {"final_fraction": 0.25}
    c = config(schedule=shape, warmup_steps=warmup, learning_rate=2.0, **final)
    rates = np.array([float(schedule(c)(i)) for i in range(101)])
    assert rates[0] == pytest.approx(2.0 / (warmup + 1))
    assert rates[warmup] == pytest.approx(2.0)
    assert np.all(np.diff(rates[:warmup]) > 0)
    assert np.all(np.diff(rates[warmup:]) <= 1e-6)
    assert rates[100] == pytest.approx(2.0 if shape == "constant" else 0.5)
    if shape == "wsd":
        assert rates[80] == pytest.approx(2.0) and rates[90] == pytest.approx(1.25)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_only_matrices_decay(name):
    c = config(name=name, weight_decay=0.5, warmup_steps=0, learning_rate=0.1)
    boxed = abstract_params(c.model)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), sharding.unbox(boxed))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = first_update(make_optimizer(c, boxed), zeros, params)
    for path, update in jax.tree.leaves_with_path(updates):
        name = sharding.path_name(path)
        still = name.endswith(("scale_D", "router_bias_E"))
        assert np.all(np.asarray(update) == 0) == still, name


def first_update(tx, grads, params):
    """As one program: by itself each operation is one for each shape."""
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params))(grads, params)


def test_muon_orthogonalises_matrices_of_every_layout():
    """The update of a hidden matrix, its heads joined, has equal singular values."""
    c = config(name="muon", weight_decay=0.0, warmup_steps=0, clip_norm=0.0)
    boxed = abstract_params(c.model)
    shapes = sharding.unbox(boxed)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), shapes)
    updates, _ = first_update(make_optimizer(c, boxed), grads, jax.tree.map(np.zeros_like, grads))
    updates = jax.tree.map(np.asarray, updates)
    attention = updates["blocks"]["layer_0"]["attention"]
    mlp = updates["blocks"]["layer_1"]["moe"]
    matrices = [
        attention["wq_DNH"][0].reshape(8, -1),
        attention["wo_NHD"][1].reshape(-1, 8),
        mlp["w_up_EDF"][0, 1],
        mlp["w_down_EFD"][1, 0],
    ]
    for matrix in matrices:
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        assert values.max() / values.min() < 3
    # Adam's first update, with Nesterov's look ahead, is of one size everywhere.
    table = np.abs(np.asarray(updates["embed"]["table_VD"])) / c.optimizer.learning_rate
    np.testing.assert_allclose(table, table[0, 0], rtol=1e-3)
    assert 1 < table[0, 0] < 1.5


def test_clipping_bounds_the_gradient_that_the_rule_sees():
    c = config(name="adamw", weight_decay=0.0, warmup_steps=0, clip_norm=1.0)
    boxed = abstract_params(c.model)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), sharding.unbox(boxed))
    grads = jax.tree.map(lambda x: np.full_like(x, 100.0), params)
    _, state = first_update(make_optimizer(c, boxed), grads, params)
    first_moments = [s.mu for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
                     if hasattr(s, "mu")]  # fmt: skip
    norm = np.sqrt(sum(np.sum(np.square(m)) for m in jax.tree.leaves(first_moments[0])))
    assert norm == pytest.approx(0.1, rel=1e-3)  # (1 - b1) * clip_norm


def test_a_bad_step_moves_the_schedule_and_nothing_else():
    c = config(warmup_steps=10, learning_rate=1.0)
    boxed = abstract_params(c.model)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), sharding.unbox(boxed))
    tx = make_optimizer(c, boxed)
    good = params
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for step, grads in enumerate([good, bad, bad, good]):
        rate = learning_rate(c, state)
        assert float(rate) == pytest.approx(float(schedule(c)(step)))
        found, after = update(grads, state, params)
        updates: dict = {sharding.path_name(p): x for p, x in jax.tree.leaves_with_path(found)}
        moments = [x for x in jax.tree.leaves(state) if x.ndim]
        still = all(
            np.array_equal(x, y)
            for x, y in zip(moments, [x for x in jax.tree.leaves(after) if x.ndim], strict=True)
        )
        assert still == (grads is bad)
        # The final norm does not decay, and Adam's update of equal gradients is one.
        scale = updates["norm/scale_D"]
        expected = 0.0 if grads is bad else -float(rate)
        np.testing.assert_allclose(scale, expected, rtol=1e-3)
        state = after

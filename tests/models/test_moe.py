"""Routers and the MoE layer against a loop over all experts, written from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs.schema import MeshConfig, ModelConfig, check_model
from puna.models import moe
from puna.models.masks import Tokens, default_tokens
from puna.models.parallel import exchange, sharding

BASE = ModelConfig(
    embed_dim=12, num_layers=1, moe_interval=1, num_experts=4, experts_per_token=2, expert_dim=8,
    compute_dtype="float32", shared_expert=True,
)  # fmt: skip


def init(config, seed=0, shape=(3, 10)):
    """Parameters, inputs and a mask with some padding."""
    layer = moe.MoE(config)
    x_BTD = jax.random.normal(jax.random.key(seed + 1), (*shape, config.embed_dim))
    valid_BT = jnp.ones(shape, bool).at[0, -3:].set(False)
    variables = jax.jit(layer.init)(jax.random.key(seed), x_BTD, default_tokens(shape))
    params = sharding.unbox(variables["params"])
    params["router_DE"] = params["router_DE"] * 3
    return layer, params, x_BTD, valid_BT


def apply(layer, params, x_BTD, valid_BT):
    """Output and statistics; tokens that are not valid are padding."""
    tokens = Tokens(jnp.zeros(valid_BT.shape, jnp.int32), valid_BT.astype(jnp.int32))
    y_BTD, sums = jax.jit(layer.apply)({"params": params}, x_BTD, tokens)
    return y_BTD, moe.router_stats(sums, layer.config)


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def used_pairs(config, params, x_BTD, valid_BT, limit):
    """[B, T, E] bool: which experts each token is computed by, counted one by one."""
    logits_BTE = np.asarray(x_BTD @ params["router_DE"])
    used_BTE = np.zeros(logits_BTE.shape, bool)
    for b in range(x_BTD.shape[0]):
        taken = [0] * config.num_experts
        for t in np.flatnonzero(valid_BT[b]):
            for e in np.argsort(-logits_BTE[b, t])[: config.experts_per_token]:
                taken[e] += 1
                used_BTE[b, t, e] = limit is None or taken[e] <= limit
    return used_BTE


def oracle(config, used_BTE, chosen_BTE, params, x_BTD):
    """Every expert sees every token; what does not use it is multiplied by zero."""
    out = jnp.zeros_like(x_BTD)
    logits_BTE = x_BTD @ params["router_DE"]
    share_BTE = jax.nn.softmax(jnp.where(chosen_BTE, logits_BTE, -1e30))
    for e in range(config.num_experts):
        w = [params[f"w_{n}"][e] for n in ("gate_EDF", "up_EDF", "down_EFD")]
        if config.router == "sigmoid":
            y = swiglu(jax.nn.sigmoid(logits_BTE[..., e : e + 1]) * x_BTD, *w)
        else:
            y = share_BTE[..., e : e + 1] * swiglu(x_BTD, *w)
        out += jnp.where(used_BTE[..., e : e + 1], y, 0.0)
    shared = [params["shared"][f"w_{n}"] for n in ("gate_DF", "up_DF", "down_FD")]
    return out + swiglu(x_BTD, *shared)


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * max(1e-3, np.abs(y).max()))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# With every router: one expert or several, none dropped or some.
@pytest.mark.parametrize(
    ("router", "top", "factor"),
    [
        ("sigmoid", 1, 0.0), ("sigmoid", 2, 0.6), slow("sigmoid", 2, 0.0), slow("sigmoid", 4, 0.0),
        ("softmax", 2, 0.0), ("softmax", 2, 0.6), slow("softmax", 1, 0.0), slow("softmax", 4, 0.0),
    ],
)  # fmt: skip
def test_equals_a_loop_over_all_experts(router, top, factor):
    config = dataclasses.replace(BASE, router=router, experts_per_token=top, capacity_factor=factor)
    layer, params, x_BTD, valid_BT = init(config)
    limit = moe.capacity(config, x_BTD.shape[1], factor) if factor else None

    def ours(params, x_BTD):
        y_BTD, _ = apply(layer, params, x_BTD, valid_BT)
        return jnp.sum(jnp.sin(y_BTD)), y_BTD

    used_BTE = used_pairs(config, params, x_BTD, valid_BT, limit)
    chosen_BTE = used_pairs(config, params, x_BTD, jnp.ones_like(valid_BT), None)

    def theirs(params, x_BTD):
        y_BTD = oracle(config, used_BTE, chosen_BTE, params, x_BTD)
        return jnp.sum(jnp.sin(y_BTD)), y_BTD

    grads, y_BTD = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(params, x_BTD)
    grads2, y2_BTD = jax.jit(jax.grad(theirs, (0, 1), has_aux=True))(params, x_BTD)
    assert_close(y_BTD, y2_BTD)
    assert_close(grads, grads2)


def test_experts_without_tokens_get_no_gradient():
    config = dataclasses.replace(BASE, experts_per_token=1)
    layer, params, x_BTD, valid_BT = init(config)
    x_BTD = jnp.abs(x_BTD)
    params["router_DE"] = jnp.full_like(params["router_DE"], -1.0).at[:, 2].set(1.0)

    def loss(params):
        return jnp.sum(apply(layer, params, x_BTD, valid_BT)[0] ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"):
        busy = np.abs(np.asarray(grads[name])).max(axis=(1, 2)) > 0
        assert busy.tolist() == [False, False, True, False]


def test_statistics():
    config = dataclasses.replace(BASE, load_balance_weight=1.0)
    layer, params, x_BTD, valid_BT = init(config)
    _, stats = apply(layer, params, x_BTD, valid_BT)
    logits = np.asarray(x_BTD @ params["router_DE"])[np.asarray(valid_BT)]
    chosen = np.argsort(-logits, axis=-1)[:, :2]
    load = np.bincount(chosen.ravel(), minlength=4) / chosen.size
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(stats.load_E, load, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, -(prob * np.log(prob)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(stats.loss, 4 * (load * prob.mean(0)).sum(), rtol=1e-5)
    assert stats.dropped == 0
    z = dataclasses.replace(BASE, router_z_weight=1.0)
    _, stats = apply(moe.MoE(z), params, x_BTD, valid_BT)
    np.testing.assert_allclose(stats.loss, (np.log(np.exp(logits).sum(-1)) ** 2).mean(), rtol=1e-5)


def test_capacity_drops_the_overflow_of_each_row():
    config = dataclasses.replace(BASE, experts_per_token=1, capacity_factor=1.0)
    layer, params, x_BTD, valid_BT = init(config)
    params["router_DE"] = params["router_DE"] * 0  # all tokens tie: all go to expert 0
    _, stats = apply(layer, params, x_BTD, jnp.ones_like(valid_BT))
    taken = moe.capacity(config, 10, 1.0)  # of 10 tokens in each row
    np.testing.assert_allclose(stats.dropped, 1 - taken / 10, rtol=1e-6)


def test_the_bias_moves_the_choice_and_not_the_score():
    config = dataclasses.replace(BASE, bias_update_rate=0.1, experts_per_token=1)
    layer, params, x_BTD, valid_BT = init(config)
    params["router_bias_E"] = jnp.array([0.0, 9.0, 0.0, 0.0])
    y_BTD, stats = apply(layer, params, x_BTD, valid_BT)
    assert stats.load_E.tolist() == [0, 1, 0, 0]
    score_BT = jax.nn.sigmoid(x_BTD @ params["router_DE"])[..., 1:2]
    w = [params[f"w_{n}"][1] for n in ("gate_EDF", "up_EDF", "down_EFD")]
    shared = [params["shared"][f"w_{n}"] for n in ("gate_DF", "up_DF", "down_FD")]
    expected = jnp.where(valid_BT[..., None], swiglu(score_BT * x_BTD, *w), 0)
    assert_close(y_BTD, expected + swiglu(x_BTD, *shared))

    def loss(params):
        return jnp.sum(apply(layer, params, x_BTD, valid_BT)[0])

    assert not np.any(jax.jit(jax.grad(loss))(params)["router_bias_E"])


def test_expert_choice_loads_every_expert_evenly():
    config = dataclasses.replace(BASE, router="expert_choice")
    layer, params, x_BTD, _ = init(config)
    valid_BT = jnp.ones(x_BTD.shape[:2], bool)
    y_BTD, stats = apply(layer, params, x_BTD, valid_BT)
    np.testing.assert_allclose(stats.load_E, 0.25)
    # Of each row every expert takes its 5 likeliest of 10 tokens, weighed by their probability.
    prob_BTE = jax.nn.softmax(x_BTD @ params["router_DE"])
    expected = jnp.zeros_like(x_BTD)
    for b in range(len(x_BTD)):
        for e in range(4):
            w = [params[f"w_{n}"][e] for n in ("gate_EDF", "up_EDF", "down_EFD")]
            for t in np.argsort(-np.asarray(prob_BTE[b, :, e]))[:5]:
                expected = expected.at[b, t].add(prob_BTE[b, t, e] * swiglu(x_BTD[b, t], *w))
    shared = [params["shared"][f"w_{n}"] for n in ("gate_DF", "up_DF", "down_FD")]
    assert_close(y_BTD, expected + swiglu(x_BTD, *shared))


ROUTERS = [("sigmoid", 0.0), ("softmax", 0.7), ("expert_choice", 0.0)]
MESHES = [
    {"expert": 4, "tensor": 2},
    {"fsdp": 2, "expert": 2, "data": 2},
    {"context": 2, "expert": 2, "tensor": 2},
]


@pytest.mark.parametrize(
    ("router", "factor", "axes"),
    [
        (*router, axes) if i == j else slow(*router, axes)
        for i, router in enumerate(ROUTERS)
        for j, axes in enumerate(MESHES)
    ],
)
def test_any_mesh_gives_the_same(router, factor, axes):
    config = dataclasses.replace(
        BASE, router=router, capacity_factor=factor, router_z_weight=0.01,
        load_balance_weight=0.0 if router == "expert_choice" else 0.01,
    )  # fmt: skip
    check_model(config)
    layer, params, x_BTD, valid_BT = init(config, shape=(8, 6))

    def loss(params, x_BTD):
        y_BTD, stats = apply(layer, params, x_BTD, valid_BT)
        return jnp.sum(jnp.sin(y_BTD)) + stats.loss, stats

    one = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_BTD)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**axes))):
        many = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_BTD)
    assert_close(many, one)


@pytest.mark.parametrize("top", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_all_tokens_to_one_expert_is_exact_in_several_rounds(top):
    config = dataclasses.replace(BASE, num_experts=8, experts_per_token=top)
    layer, params, x_BTD, valid_BT = init(config, shape=(8, 8))
    x_BTD = jnp.abs(x_BTD)  # so that the largest column of the router wins for all of them
    bias_E = jnp.linspace(-1, 1, 8).at[3].set(2.0)
    params["router_DE"] = 0.1 * params["router_DE"] + bias_E

    def loss(params, x_BTD):
        y_BTD, stats = apply(layer, params, x_BTD, valid_BT)
        return jnp.sum(jnp.sin(y_BTD)), (y_BTD, stats.load_E)

    one = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_BTD)
    assert one[1][1][3] == pytest.approx(1 / top)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, expert=8))):
        step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        many = step(params, x_BTD)
        loops = str(jax.make_jaxpr(loss)(params, x_BTD)).count("while")
    assert loops and exchange.slots(8 * top, 8) == 2 * top
    assert_close(many, one)

"""Sorted, padded and blocked expert computation against every expert computing every token."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from puna.models import eight_bits
from puna.models.kernels import experts, experts_gpu
from puna.models.kernels.experts import Routing, grouped_matmul, swiglu_experts

D, F = 24, 40
GRADIENTS = ("x", "scale", "w_gate", "w_up", "w_down")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weights(seed, num_experts):
    shapes = [(num_experts, D, F)] * 2 + [(num_experts, F, D)]
    return [normal([seed, i], *shape) * shape[1] ** -0.5 for i, shape in enumerate(shapes)]


def top_k(seed, num_tokens, num_experts, per_token):
    """Random tokens with `per_token` different experts each: (x_TD, token_M, expert_M, scale_M)."""
    logits_TE = normal([seed, 0], num_tokens, num_experts)
    expert_TA = np.argsort(-logits_TE, axis=1)[:, :per_token].astype(np.int32)
    scale_TA = 1 / (1 + np.exp(-np.take_along_axis(logits_TE, expert_TA, axis=1)))
    token_M = np.repeat(np.arange(num_tokens, dtype=np.int32), per_token)
    return normal([seed, 1], num_tokens, D), token_M, expert_TA.reshape(-1), scale_TA.reshape(-1)


def dense(x_TD, token_M, expert_M, scale_M, w_gate, w_up, w_down, *, where):
    """The oracle: every expert computes every pair, in float32, and a mask picks."""
    rows_MD, scale_M1 = x_TD[token_M], scale_M[:, None]
    rows_MD = rows_MD * scale_M1 if where == "input" else rows_MD
    gate_EMF = jnp.einsum("MD,EDF->EMF", rows_MD, w_gate)
    up_EMF = jnp.einsum("MD,EDF->EMF", rows_MD, w_up)
    out_EMD = jnp.einsum("EMF,EFD->EMD", jax.nn.silu(gate_EMF) * up_EMF, w_down)
    chosen_EM1 = (expert_M == jnp.arange(w_gate.shape[0])[:, None])[..., None]
    out_MD = jnp.where(chosen_EM1, out_EMD, 0).sum(0)
    out_MD = out_MD * scale_M1 if where == "output" else out_MD
    return jnp.einsum("MT,MD->TD", jax.nn.one_hot(token_M, len(x_TD)), out_MD)


def ours(x_TD, token_M, expert_M, scale_M, *ws, where, capacity=None, dtype="float32"):
    routing = Routing(token_M, expert_M, **{f"{where}_scale_M": scale_M})
    return swiglu_experts(x_TD, routing, *ws, capacity=capacity, dtype=dtype)[0]


def values_and_gradients(f, x_TD, token_M, expert_M, scale_M, *ws):
    """f's value, and the gradient of one random projection of it for every float input."""
    target_TD = normal(99, *x_TD.shape)

    def loss(x_TD, scale_M, *ws):
        y_TD = f(x_TD, jnp.asarray(token_M), jnp.asarray(expert_M), scale_M, *ws)
        return (y_TD * target_TD).sum(), y_TD

    grad = jax.jit(jax.grad(loss, argnums=tuple(range(5)), has_aux=True))
    gradients, y_TD = grad(x_TD, scale_M, *ws)
    return {"y": y_TD, **dict(zip(GRADIENTS, gradients, strict=True))}


def assert_close(actual, expected, relative=1e-5):
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            actual[name], expected[name], rtol=0, atol=relative * scale, err_msg=name
        )


def check(inputs, ws, where, **ours_kwargs):
    actual = values_and_gradients(functools.partial(ours, where=where, **ours_kwargs), *inputs, *ws)
    expected = values_and_gradients(functools.partial(dense, where=where), *inputs, *ws)
    assert_close(actual, expected)
    return actual


@pytest.mark.parametrize(("per_token", "where"), [(1, "input"), (2, "output"), (4, "input")])
def test_equals_dense_at_top_k(per_token, where):
    check(top_k(0, 50, 6, per_token), weights(1, 6), where)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts"),
    [(1, 1), (1, 5), (37, 1), (16, 128), (600, 2)],
    ids=["one token", "one token of five experts", "one expert", "few tokens", "many blocks"],
)
def test_equals_dense_at_odd_sizes(num_tokens, num_experts):
    check(top_k(2, num_tokens, num_experts, 1), weights(3, num_experts), "input")


def test_experts_without_tokens_get_zero_gradient_and_one_expert_may_take_all():
    x_TD, token_M, expert_M, scale_M = top_k(4, 100, 8, 1)
    gradients = check((x_TD, token_M, np.full_like(expert_M, 5), scale_M), weights(5, 8), "input")
    for name in ("w_gate", "w_up", "w_down"):
        unused = np.delete(np.asarray(gradients[name]), 5, axis=0)
        assert not unused.any()
        assert np.abs(gradients[name][5]).max() > 0


@hypothesis.given(
    num_tokens=st.integers(1, 70),
    num_experts=st.integers(1, 9),
    skew=st.floats(0, 8),
    data=st.data(),
)
@hypothesis.settings(max_examples=10)
def test_grouped_matmul_equals_loop(num_tokens, num_experts, skew, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    probabilities = np.exp(skew * rng.standard_normal(num_experts))
    used = data.draw(st.integers(0, num_tokens))
    expected = data.draw(st.sampled_from([None, used]))
    sizes_E = rng.multinomial(used, probabilities / probabilities.sum())
    x_MD, dy_MF = rng.standard_normal((num_tokens, D)), rng.standard_normal((num_tokens, F))
    w_EDF = rng.standard_normal((num_experts, D, F))

    y_MF, dx_MD, dw_EDF = np.zeros_like(dy_MF), np.zeros_like(x_MD), np.zeros_like(w_EDF)
    for e, end in enumerate(np.cumsum(sizes_E)):
        rows = slice(end - sizes_E[e], end)
        y_MF[rows] = x_MD[rows] @ w_EDF[e]
        dx_MD[rows] = dy_MF[rows] @ w_EDF[e].T
        dw_EDF[e] = x_MD[rows].T @ dy_MF[rows]

    # Whatever lies past the last group, NaN included, has no effect.
    x_MD[used:] = np.nan
    x_MD, dy_MF, w_EDF = (jnp.asarray(a, jnp.float32) for a in (x_MD, dy_MF, w_EDF))

    @jax.jit
    def run(x_MD, w_EDF, dy_MF):
        f = functools.partial(
            grouped_matmul,
            group_sizes_E=jnp.asarray(sizes_E, jnp.int32),
            expected_rows=expected,
            dtype="float32",
        )
        y_MF, vjp = jax.vjp(f, x_MD, w_EDF)
        return y_MF, *vjp(dy_MF)

    names = ("y", "dx", "dw")
    actual = dict(zip(names, run(x_MD, w_EDF, dy_MF), strict=True))
    assert_close(actual, dict(zip(names, (y_MF, dx_MD, dw_EDF), strict=True)))
    assert not np.asarray(actual["dw"])[sizes_E == 0].any()


def keep_first(expert_M, num_experts, capacity):
    """Mark pairs that come too late for their expert as unused, one by one."""
    taken, kept = [0] * num_experts, []
    for e in np.asarray(expert_M):
        kept.append(e if taken[e] < capacity else num_experts)
        taken[e] += 1
    return np.asarray(kept, np.int32)


@pytest.mark.parametrize("capacity", [3, 12, 400])
def test_capacity_drops_the_last_tokens_of_a_full_expert(capacity):
    num_experts, ws = 4, weights(6, 4)
    x_TD, token_M, expert_M, scale_M = top_k(7, 20, num_experts, 2)
    kept_M = keep_first(expert_M, num_experts, capacity)
    f = functools.partial(ours, where="output", capacity=capacity)
    actual = values_and_gradients(f, x_TD, token_M, expert_M, scale_M, *ws)
    expected = values_and_gradients(
        functools.partial(dense, where="output"), x_TD, token_M, kept_M, scale_M, *ws
    )
    assert_close(actual, expected)
    routing = Routing(jnp.asarray(token_M), jnp.asarray(expert_M))
    _, stats = swiglu_experts(jnp.asarray(x_TD), routing, *ws, capacity=capacity, dtype="float32")
    assert int(stats.dropped) == int((kept_M == num_experts).sum())
    np.testing.assert_array_equal(stats.load_E, np.bincount(expert_M, minlength=num_experts))


def test_expert_choice_leaves_tokens_with_none_or_several_experts():
    num_experts, chosen, num_tokens = 5, 4, 12
    score_ET = normal(8, num_experts, num_tokens)
    token_EC = np.argsort(-score_ET, axis=1)[:, :chosen].astype(np.int32)
    token_M, score_EC = token_EC.reshape(-1), np.take_along_axis(score_ET, token_EC, axis=1)
    expert_M = np.repeat(np.arange(num_experts, dtype=np.int32), chosen)
    per_token = np.bincount(token_M, minlength=num_tokens)
    assert per_token.min() == 0 and per_token.max() > 2
    inputs = normal(9, num_tokens, D), token_M, expert_M, score_EC.reshape(-1)
    check(inputs, weights(10, num_experts), "output")
    check(inputs, weights(10, num_experts), "output", capacity=chosen)


@pytest.mark.parametrize(("where", "capacity"), [("input", None), ("output", 8)])
def test_unused_pairs_leak_nothing(where, capacity):
    num_experts, ws = 3, weights(11, 3)
    x_TD, token_M, expert_M, scale_M = top_k(12, 10, num_experts, 2)
    unused_M = token_M >= 7
    expert_M = np.where(unused_M, num_experts, expert_M).astype(np.int32)
    poisoned_TD, poisoned_M = x_TD.copy(), np.where(unused_M, np.nan, scale_M)
    x_TD[7:], poisoned_TD[7:] = 0, np.nan
    f = functools.partial(ours, where=where, capacity=capacity)
    actual = values_and_gradients(f, poisoned_TD, token_M, expert_M, poisoned_M, *ws)
    clean = values_and_gradients(f, x_TD, token_M, expert_M, scale_M, *ws)
    for name, value in clean.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    assert not actual["y"][7:].any() and not actual["x"][7:].any()


def test_bfloat16_error_is_bounded_by_its_roundings():
    # bfloat16 rounds to nearest with 8 significant bits: a relative error of at most 2**-8.
    # A product of two rounded operands is off by 2u + u**2 of |a||b|; the float32 sum adds
    # nothing visible; y and dx are rounded once more, by at most u of (1 + 2u + u**2) |a||b|.
    u = 2.0**-8
    operands, result = 2 * u + u * u, u * (1 + u) ** 2
    rng = np.random.default_rng(0)
    sizes_E = np.array([40, 0, 3, 17])
    x_MD, dy_MF = rng.standard_normal((60, D)), rng.standard_normal((60, F))
    w_EDF = rng.standard_normal((4, D, F))
    expert_M = np.repeat(np.arange(4), sizes_E)
    f = functools.partial(
        grouped_matmul, group_sizes_E=jnp.asarray(sizes_E, jnp.int32), dtype="bfloat16"
    )

    @jax.jit
    def both_ways(x_MD, w_EDF, dy_MF):
        y_MF, vjp = jax.vjp(f, x_MD, w_EDF)
        # A cotangent has the dtype of the result, so it is rounded before the operation begins.
        return y_MF, *vjp(dy_MF.astype(y_MF.dtype))

    arrays = (jnp.asarray(a, jnp.float32) for a in (x_MD, w_EDF, dy_MF))
    y_MF, dx_MD, dw_EDF = both_ways(*arrays)
    assert y_MF.dtype == jnp.bfloat16
    assert dx_MD.dtype == dw_EDF.dtype == jnp.float32
    one_hot_ME = np.eye(4)[expert_M]
    for actual, bound, spec, a, b in (
        (y_MF, operands + result, "MD,EDF,ME->MF", x_MD, w_EDF),
        (dx_MD, operands + result, "MF,EDF,ME->MD", dy_MF, w_EDF),
        (dw_EDF, operands, "MD,MF,ME->EDF", x_MD, dy_MF),
    ):
        exact = np.einsum(spec, a, b, one_hot_ME)
        allowed = bound * np.einsum(spec, np.abs(a), np.abs(b), one_hot_ME)
        assert (np.abs(np.asarray(actual, np.float64) - exact) <= allowed + 1e-6).all(), spec


def test_bfloat16_layer_is_near_float32():
    # Seven roundings lie between input and output (x, three weights, gate and up as one, hidden,
    # out), each a relative error of at most u in the norm; the backward pass crosses as many.
    inputs, ws = top_k(13, 60, 4, 2), weights(14, 4)
    f = functools.partial(ours, where="input")
    exact = values_and_gradients(f, *inputs, *ws)
    rounded = values_and_gradients(functools.partial(f, dtype="bfloat16"), *inputs, *ws)
    for name, value in exact.items():
        error = jnp.linalg.norm(rounded[name] - value) / jnp.linalg.norm(value)
        assert 0 < error < (7 if name == "y" else 14) * 2.0**-8, name


@pytest.mark.parametrize("mean", [32, 512, 4096, 16384])
def test_padding_of_a_balanced_load_stays_below_a_third(mean):
    # Rows that pass through a matmul, forward and backward, do not grow with the experts.
    head, block = experts._balanced_rows(mean), experts._block_rows(mean)
    assert mean <= head < 1.33 * mean
    assert -(-mean // block) * block < 1.33 * mean


ALIGNED = {"num_rows": 300, "embed": 128, "hidden": 256, "num_experts": 4}


def aligned_step(x_MD, w_EDF, sizes_E, dy_MF):
    f = functools.partial(grouped_matmul, group_sizes_E=sizes_E, dtype="bfloat16")
    y_MF, vjp = jax.vjp(f, x_MD, w_EDF)
    return y_MF, *vjp(dy_MF)


def aligned_operands(seed=0):
    rng = np.random.default_rng(seed)
    M, D, F, E = ALIGNED.values()
    x_MD, w_EDF, dy_MF = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((M, D), (E, D, F), (M, F))
    )
    return x_MD, w_EDF, jnp.asarray([130, 0, 100, 31], jnp.int32), dy_MF


@pytest.mark.parametrize(
    ("platform", "kernel"),
    [("cpu", None), ("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton")],
)
def test_one_function_lowers_to_the_kernels_of_each_platform(platform, kernel):
    # Triton's kernels are lowered for a kind of GPU, and there is none here.
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu") if platform == "cuda" else None
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(aligned_step).trace(*aligned_operands())
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo.custom_call @(\S+)\(", lowered)
    assert found == ([kernel] * 3 if kernel else [])
    if platform == "cuda":
        assert "stablehlo.while" not in lowered


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float8", *(pytest.param(x, marks=pytest.mark.slow) for x in ("float32", "int8"))],
)
def test_gpu_kernels_equal_the_blocked_form(dtype, monkeypatch):
    interpreted = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(experts_gpu.pl, "pallas_call", interpreted)
    kinds = eight_bits.FORMATS.get(dtype)
    x_MD, w_EDF, sizes_E, dy_MF = aligned_operands()
    if kinds:
        x_MD, w_EDF = (eight_bits.quantize(x, 1, kinds.forward)[0] for x in (x_MD, w_EDF))
        dy_MF, _ = eight_bits.quantize(dy_MF, 1, kinds.backward)
    elif dtype == "float32":
        x_MD, w_EDF, dy_MF = (x.astype(jnp.float32) for x in (x_MD, w_EDF, dy_MF))
    used_M1 = (jnp.arange(len(x_MD)) < sizes_E.sum())[:, None]
    mean = 20 if dtype == "int8" else 75  # rows of blocks: 16 or 64
    for x, transposed in ((x_MD, False), (dy_MF, True)):
        how = {"mean": mean, "transpose_w": transposed}
        actual = experts._times_weights_gpu(x, w_EDF, sizes_E, **how)
        expected = experts._times_weights_loop(x, w_EDF, sizes_E, **how)
        assert_near(*(jnp.where(used_M1, y, 0) for y in (actual, expected)))
    if not kinds:
        actual = experts._weight_gradient_gpu(x_MD, dy_MF, sizes_E, dtype=w_EDF.dtype)
        expected = experts._weight_gradient_blocks(x_MD, dy_MF, sizes_E, mean=75, dtype=w_EDF.dtype)
        assert_near(actual, expected)
        assert not np.asarray(actual[1], np.float32).any()  # an expert without rows


def assert_near(actual, expected):
    """The same products, summed in another order: one rounding of the result apart at most."""
    assert actual.dtype == expected.dtype
    relative = 2.0**-7 if actual.dtype == jnp.bfloat16 else 1e-5
    most = np.abs(np.asarray(expected, np.float32)).max()
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), np.asarray(expected, np.float32), rtol=relative,
        atol=1e-6 * most,
    )  # fmt: skip


def test_tpu_kernels_equal_the_blocked_form():
    x_MD, w_EDF, sizes_E, dy_MF = aligned_operands()
    expected = jax.jit(aligned_step)(x_MD, w_EDF, sizes_E, dy_MF)
    used_M1 = (jnp.arange(len(x_MD)) < sizes_E.sum())[:, None]
    with pltpu.force_tpu_interpret_mode():
        y_MF = experts._times_weights_tpu(x_MD, w_EDF, sizes_E, mean=75, transpose_w=False)
        dx_MD = experts._times_weights_tpu(dy_MF, w_EDF, sizes_E, mean=75, transpose_w=True)
        dw_EDF = experts._weight_gradient_tpu(x_MD, dy_MF, sizes_E, mean=75, dtype=w_EDF.dtype)
    actual = jnp.where(used_M1, y_MF, 0), jnp.where(used_M1, dx_MD, 0), dw_EDF
    for a, b in zip(actual, expected, strict=True):
        # The same products, summed in another order: one rounding of the result apart at most.
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2.0**-7, atol=1e-3
        )

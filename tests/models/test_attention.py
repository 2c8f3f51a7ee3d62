"""Who sees whom in one attention layer: by NumPy, by gradient, and by taking documents apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs.schema import ModelConfig
from puna.models import attention, masks
from puna.models.masks import Tokens

T, CHUNK = 9, 3
CONFIG = ModelConfig(
    vocab_size=8, embed_dim=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=8,
    chunk_size=CHUNK, compute_dtype="float32",
)  # fmt: skip
# Two documents, each longer than a chunk, and padding between them.
PACKED = Tokens(jnp.array([[0, 1, 2, 3, 0, 0, 1, 2, 3]]), jnp.array([[1, 1, 1, 1, 0, 2, 2, 2, 2]]))


def random(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def weights(c=CONFIG):
    shapes = {
        "wq_DNH": (c.embed_dim, c.num_heads, c.head_dim),
        "wk_DKH": (c.embed_dim, c.num_kv_heads, c.head_dim),
        "wv_DKH": (c.embed_dim, c.num_kv_heads, c.head_dim),
        "wo_NHD": (c.num_heads, c.head_dim, c.embed_dim),
    }
    return {name: random(*shape) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=(3, 4))
def layer(params, x_BTD, tokens, use_rope=True, config=CONFIG):
    return attention.Attention(config, use_rope).apply({"params": params}, x_BTD, tokens, None)[0]


def sees(positions, segments, chunk_size):
    """The rule in words, token by token."""
    seen = np.zeros((len(positions), len(positions)), bool)
    for t, (qp, qs) in enumerate(zip(positions, segments, strict=True)):
        for s, (kp, ks) in enumerate(zip(positions, segments, strict=True)):
            same_chunk = chunk_size == 0 or qp // chunk_size == kp // chunk_size
            seen[t, s] = qs == ks and qs > 0 and kp <= qp and same_chunk
    return seen


@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=8),
    chunk_size=st.integers(0, 4),
)
def test_the_mask_is_the_rule_token_by_token(pairs, chunk_size):
    positions, segments = np.array(pairs, np.int32).T
    tokens = Tokens(positions[None], segments[None])
    seen = masks.visible(tokens, tokens, chunk_size)[0]
    np.testing.assert_array_equal(seen, sees(positions, segments, chunk_size))


@pytest.mark.parametrize("use_rope", [True, False], ids=["chunked", "whole"])
def test_a_gradient_flows_from_what_a_token_sees_and_from_nothing_else(use_rope):
    @jax.jit
    @jax.jacrev
    def jacobian(x_TD):
        return layer(weights(), x_TD[None], PACKED, use_rope)[0]

    flows = np.any(np.asarray(jacobian(random(T, 8))) != 0, axis=(1, 3))
    rule = sees(PACKED.positions_BT[0], PACKED.segments_BT[0], CHUNK if use_rope else 0)
    np.testing.assert_array_equal(flows, rule)


@pytest.mark.parametrize("use_rope", [True, False], ids=["rope", "nope"])
def test_a_packed_document_is_as_it_is_alone(use_rope):
    x_BTD, params = random(1, T, 8), weights()
    packed = layer(params, x_BTD, PACKED, use_rope)
    for part in (slice(0, 4), slice(5, 9)):
        alone = layer(params, x_BTD[:, part], masks.default_tokens((1, 4)), use_rope)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
    assert not np.any(packed[:, 4])  # padding sees nothing, itself neither


def test_grouped_queries_equal_keys_and_values_repeated():
    x_BTD, tokens, params = random(2, T, 8), masks.default_tokens((2, T)), weights()
    each = dataclasses.replace(CONFIG, num_kv_heads=CONFIG.num_heads)
    repeated = {
        name: jnp.repeat(w, 2, axis=1) if name in ("wk_DKH", "wv_DKH") else w
        for name, w in params.items()
    }
    np.testing.assert_allclose(
        layer(params, x_BTD, tokens),
        layer(repeated, x_BTD, tokens, True, each),
        atol=1e-5,
    )


def test_the_temperature_of_a_far_query():
    config = dataclasses.replace(CONFIG, temperature_scale=0.1, temperature_floor=8192)
    factor = attention.temperature(jnp.array([[0, 8190, 8191, 81919]]), config)
    expected = [1, 1, 1 + 0.1 * np.log(2), 1 + 0.1 * np.log(11)]
    np.testing.assert_allclose(factor[0], expected, rtol=1e-6)

"""The chunked cross-entropy equals the plain one, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.train.objectives.next_token import cross_entropy


def plain(hidden, table, targets, weights, z_loss):
    logits = jnp.einsum("BTD,DV->BTV", hidden, table)
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * lse**2)), nll


def arrays(B=3, T=13, D=7, V=19):
    keys = jax.random.split(jax.random.key(T), 4)
    hidden = jax.random.normal(keys[0], (B, T, D)) * 3
    table = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32)
    return hidden, table, targets, weights


def value_and_gradients(loss):
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("chunk", [1, 4, 12, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_plain_cross_entropy(chunk, z_loss):
    hidden, table, targets, weights = arrays()

    def ours(h, w):
        return cross_entropy(h, w, targets, weights, "float32", z_loss, chunk)

    def theirs(h, w):
        return plain(h, w, targets, weights, z_loss)

    (loss, nll), grads = value_and_gradients(ours)(hidden, table)
    (loss2, nll2), grads2 = value_and_gradients(theirs)(hidden, table)
    np.testing.assert_allclose(loss, loss2, rtol=1e-6)
    np.testing.assert_allclose(nll, nll2, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, grads2, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_rounds_operands_only():
    hidden, table, targets, weights = arrays()
    rounded = (hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16))
    loss, nll = cross_entropy(*rounded, targets, weights, "bfloat16", 0.0, 8)
    exact, _ = plain(*(x.astype(jnp.float32) for x in rounded), targets, weights, 0.0)
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(loss, exact, rtol=1e-5)


def test_no_array_of_all_logits_exists():
    hidden, table, targets, weights = arrays(B=2, T=64, V=512)

    def loss(h, w):
        return cross_entropy(h, w, targets, weights, "float32", 0.0, 16)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile()
    assert "f32[2,64,512]" not in compiled.as_text()

"""Zig-zag order: where blocks go, and back; what it balances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs.schema import MeshConfig
from puna.models.parallel import context, sharding


def on_mesh(n, f, *args):
    mesh = sharding.make_mesh(MeshConfig(data=1, context=n), jax.devices()[:n])
    with jax.set_mesh(mesh):
        return jax.jit(f)(*args)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_each_device_gets_an_early_and_a_late_block(n):
    x_BT = jnp.repeat(jnp.arange(2 * n), 3)[None]
    blocks = np.asarray(on_mesh(n, context.to_zigzag, x_BT)).reshape(n, 2, 3)[..., 0]
    assert blocks.tolist() == [[i, 2 * n - 1 - i] for i in range(n)]


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_back_again_and_gradients_too(n):
    x_BTD = jax.random.normal(jax.random.key(0), (2, 4 * n, 3))
    weights = jax.random.normal(jax.random.key(1), x_BTD.shape)
    there = on_mesh(n, lambda x: context.from_zigzag(context.to_zigzag(x)), x_BTD)
    np.testing.assert_array_equal(there, x_BTD)

    def loss(x):
        return jnp.sum(context.to_zigzag(x) * weights)

    gradient = on_mesh(n, jax.grad(loss), x_BTD)
    np.testing.assert_array_equal(gradient, on_mesh(n, context.from_zigzag, weights))


def test_a_length_that_does_not_divide_stays_whole():
    x_BT = jnp.arange(10)[None]
    assert on_mesh(4, lambda x: context.to_zigzag(x) + context.devices(10), x_BT).tolist() == [
        list(range(1, 11))
    ]

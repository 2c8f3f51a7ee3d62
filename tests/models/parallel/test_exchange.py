"""Rows reach the devices they are for, in order, and come back; gradients take the same ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from puna.configs.schema import MeshConfig
from puna.models.parallel import exchange, sharding

M, D, SLOTS = 6, 2, 5


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_there_and_back(n, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(M - 1, np.ones(n + 1) / (n + 1), size=n)[:, :n]  # some rows stay
    sizes[0] = np.eye(n, dtype=int)[n - 1] * SLOTS  # all to one, none to the others
    rows = rng.normal(size=(n, M, D)).astype(np.float32)
    mesh = sharding.make_mesh(MeshConfig(data=1, expert=n), jax.devices()[:n])

    def local(rows_MD, send_n):
        plan = exchange.plan(send_n[0])

        def f(rows_MD):
            there_RD = exchange.send(rows_MD, plan, SLOTS)
            return exchange.bring_back(there_RD * 2, plan, M), there_RD

        back_MD, pull, there_RD = jax.vjp(f, rows_MD[0], has_aux=True)
        return there_RD[None], back_MD[None], pull(jnp.cos(back_MD))[0][None]

    split = PartitionSpec("expert")
    with jax.set_mesh(mesh):
        there, back, gradient = jax.jit(
            sharding.per_device(local, (split, split), (split, split, split))
        )(rows, sizes.astype(np.int32))
    there = np.asarray(there).reshape(n, n, SLOTS, D)
    starts = np.cumsum(sizes, axis=1) - sizes
    for source in range(n):
        for target in range(n):
            first, count = starts[source, target], sizes[source, target]
            want = np.zeros((SLOTS, D), np.float32)
            want[:count] = rows[source, first : first + count]
            np.testing.assert_array_equal(there[target, source], want)
        sent = np.arange(M)[:, None] < sizes[source].sum()
        want = np.where(sent, 2 * rows[source], 0)
        np.testing.assert_array_equal(back[source], want)
        np.testing.assert_allclose(gradient[source], np.where(sent, 2 * np.cos(want), 0), rtol=1e-6)

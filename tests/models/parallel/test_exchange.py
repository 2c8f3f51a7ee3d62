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


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_sent_once_in_some_round_to_its_device(seed):
    rng = np.random.default_rng(seed)
    n, rows = 4, 30
    slots = exchange.slots(rows, n)
    assert n * slots < rows * (exchange.ROOM + 1) and exchange.slots(3, 2) == 3
    all_n = rng.multinomial(rows - 4, rng.dirichlet(np.full(n, 0.3)))  # 4 go nowhere
    if not seed:
        all_n = np.array([0, rows, 0, 0])
    order = rng.permutation(rows)
    target = np.repeat(np.arange(n), all_n)
    sent = {}
    for i in range(-(-all_n.max() // slots)):
        row_P, send_n = map(np.asarray, exchange.of_round(i, all_n, order, slots))
        assert send_n.max() <= slots and len(row_P) == min(rows, n * slots)
        assert (row_P[send_n.sum() :] == rows).all()
        for row, device in zip(row_P, np.repeat(np.arange(n), send_n), strict=False):
            assert sent.setdefault(int(row), device) == device
            sent[int(row)] = device
    assert sent == dict(zip(order.tolist(), target, strict=False))
    total = sum(int(exchange.of_round(i, all_n, order, slots)[1].sum()) for i in range(9))
    assert total == len(sent)


def test_rounds_add_up_and_have_gradients():
    def f(i, args):
        x, (number, w) = args
        return jnp.sin(x * w) * (i + 1) * number

    args = jnp.arange(3.0), (jnp.int32(2), jnp.array([0.5, 1.0, 2.0]))

    def ours(count, x, w):
        return jnp.sum(exchange.sum_of_rounds(f, count, (x, (args[1][0], w))) ** 2)

    def theirs(count, x, w):
        return jnp.sum(sum(f(i, (x, (args[1][0], w))) for i in range(max(count, 1))) ** 2)

    step = jax.jit(jax.value_and_grad(ours, (1, 2)))
    for count in (0, 1, 4):
        found = step(count, args[0], args[1][1])
        wanted = jax.value_and_grad(theirs, (1, 2))(count, args[0], args[1][1])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)

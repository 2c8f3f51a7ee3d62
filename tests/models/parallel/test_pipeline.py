"""The pipeline gives what running the blocks one after another gives, whatever its schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs.schema import MeshConfig
from puna.models.masks import Tokens
from puna.models.parallel import pipeline, sharding

B, T, D = 8, 2, 3


def block(w_DD, x_BTD, tokens):
    """Neither commutes with another block nor treats all rows alike."""
    x_BTD = jnp.tanh(x_BTD @ w_DD) + 0.1 * tokens.positions_BT[..., None]
    return x_BTD, jnp.sum(x_BTD * tokens.segments_BT[..., None])


def inputs(layers):
    random = np.random.default_rng(layers)
    w_LDD = random.normal(size=(layers, D, D)).astype(np.float32)
    x_BTD = random.normal(size=(B, T, D)).astype(np.float32)
    positions_BT, segments_BT = random.integers(0, 9, (2, B, T)).astype(np.int32)
    return w_LDD, x_BTD, positions_BT, segments_BT


def in_order(w_LDD, x_BTD, positions_BT, segments_BT):
    """In NumPy and float64: all blocks, with the sum of each."""
    x_BTD, sums_L = x_BTD.astype(np.float64), []
    for w_DD in w_LDD:
        x_BTD = np.tanh(x_BTD @ w_DD) + 0.1 * positions_BT[..., None]
        sums_L.append(np.sum(x_BTD * segments_BT[..., None]))
    return x_BTD, np.array(sums_L)


def piped(w_LDD, x_BTD, positions_BT, segments_BT, wanted):
    tokens = Tokens(positions_BT, segments_BT)
    everything = jax.checkpoint_policies.everything_saveable
    return pipeline.run(block, w_LDD, x_BTD, tokens, wanted, everything)


def on_mesh(stages, f, w_LDD, *arrays):
    mesh = sharding.make_mesh(MeshConfig(data=-1, pipeline=stages))
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P("pipeline"))
        return jax.jit(f)(jax.device_put(w_LDD, split), *arrays)


@pytest.mark.parametrize(
    ("stages", "layers", "wanted"),
    [
        (2, 4, 4),  # circular: two blocks a stage, two turns
        (2, 8, 2),  # circular: four turns
        (4, 4, 4),  # one block a stage
        (2, 6, 2),  # three blocks a stage are no multiple of two stages: all at once
        (4, 16, 2),  # circular but for the microbatches, of which there are fewer than stages
        (2, 4, 0),  # one microbatch a stage
    ],
)
def test_a_pipeline_equals_the_blocks_in_order(stages, layers, wanted):
    arrays = inputs(layers)
    out_BTD, sums_L = on_mesh(stages, functools.partial(piped, wanted=wanted), *arrays)
    expected_BTD, expected_L = in_order(*arrays)
    np.testing.assert_allclose(out_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums_L, expected_L, rtol=1e-5, atol=1e-4)


def test_gradients_reach_every_block_as_in_order():
    arrays = inputs(4)
    weights_BTD = np.random.default_rng(0).normal(size=(B, T, D))

    def total(w_LDD, *rest):
        return jnp.sum(piped(w_LDD, *rest, wanted=4)[0] * weights_BTD)

    grad_LDD = on_mesh(2, jax.grad(total), *arrays)

    def slope(place, step=1e-5):
        up, down = (arrays[0].astype(np.float64) for _ in range(2))
        up[place], down[place] = up[place] + step, down[place] - step
        outs = [in_order(w_LDD, *arrays[1:])[0] for w_LDD in (up, down)]
        return np.sum((outs[0] - outs[1]) * weights_BTD) / (2 * step)

    expected = np.array([slope(place) for place in np.ndindex(4, D, D)]).reshape(4, D, D)
    np.testing.assert_allclose(grad_LDD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "wanted", "parts"), [(16, 0, 2), (16, 4, 4), (12, 4, 1), (24, 4, 2), (1, 4, 1)]
)
def test_microbatches_divide_the_rows_of_a_device(rows, wanted, parts):
    mesh = sharding.make_mesh(MeshConfig(data=4, pipeline=2))
    with jax.set_mesh(mesh):
        assert pipeline.microbatches(rows, wanted) == parts

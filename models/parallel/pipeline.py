"""Pipeline parallelism: the scanned blocks spread over stages, microbatches passing through.

In every tick each stage runs one microbatch through some of its blocks and hands it on. Where a
stage's blocks are a multiple of the stages the schedule is circular (arXiv 2104.04473): stage s has
blocks s, s + P, s + 2P, ... of the model and a microbatch goes round P stages as often as a stage
has blocks, so the first and last ticks, in which stages wait, are that much shorter. Otherwise
a stage runs all its blocks at once (GPipe, arXiv 1811.06965). Other mesh axes are left to the
compiler. Letters: P stages, R blocks of a stage, M microbatches.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from . import sharding

AXIS = "pipeline"


def save_all_but_slices(primitive, *_, **__) -> bool:
    """What a tick saves if nothing is to be computed again: not the weights that it took."""
    return primitive.name not in ("dynamic_slice", "squeeze")


def microbatches(batch_size: int, wanted: int) -> int:
    """Parts of the batch in the pipeline: `wanted` (0 = one a stage), or the most that divide."""
    rows = max(1, batch_size // sharding.parts("batch"))
    return math.gcd(rows, wanted or sharding.parts("layers"))


def run(block, params, x_BTD, tokens, wanted: int, policy):
    """Send a batch through all blocks.

    Args:
      block: (parameters of one block, x_BTD, tokens) -> (x_BTD, sums over the tokens).
      tokens: arrays [B, ...] beside x_BTD that every block reads, in any tree.
      params: of all blocks, with a leading dim that is split over the stages.
      wanted: microbatches asked for.
      policy: what a tick saves for the gradient, of `jax.checkpoint_policies`.

    Returns:
      x_BTD after the last block, and the sums of each block over the batch, stacked.
    """
    B = x_BTD.shape[0]
    M, P = microbatches(B, wanted), sharding.parts("layers")

    def cut(x):
        # Every part is spread evenly over the devices, as the batch is.
        return jnp.swapaxes(x.reshape(B // M, M, *x.shape[1:]), 0, 1)

    def stage(params, x_MBTD, tokens_M, stage_1):
        s = stage_1[0]
        # The gradient adds up over the ticks in the dtype of these.
        params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        R = len(jax.tree.leaves(params)[0])
        turns = R if R % P == 0 and M % P == 0 else 1
        if turns > 1:
            params = jax.tree.map(lambda w: _to_circle(w, P), params)
        # [turns, blocks of a turn, ...]
        params = jax.tree.map(lambda w: w.reshape(turns, R // turns, *w.shape[1:]), params)

        def tick(params, x_BTD, tokens, turn):
            weights = jax.tree.map(
                lambda w: jax.lax.dynamic_index_in_dim(w, turn, 0, False), params
            )
            return jax.lax.scan(lambda x, w: block(w, x, tokens), x_BTD, weights)

        tick = jax.checkpoint(tick, policy=policy, prevent_cse=False)
        shapes = jax.eval_shape(
            tick, params, x_MBTD[0], jax.tree.map(lambda x: x[0], tokens_M), jnp.int32(0)
        )[1]
        sums = jax.tree.map(lambda x: jnp.zeros((turns, *x.shape), x.dtype), shapes)

        def step(carry, t):
            x_BTD, out_MBTD, sums = carry
            i = t - s
            busy = (i >= 0) & (i < M * turns)
            i = jnp.clip(i, 0, M * turns - 1)
            turn = i // P % turns
            m = i // (turns * P) * P + i % P
            x_BTD = jnp.where((s == 0) & (turn == 0), x_MBTD[m], x_BTD)
            x_BTD, new = tick(params, x_BTD, jax.tree.map(lambda x: x[m], tokens_M), turn)
            # Of what a stage writes here only the last stage's last turn is read.
            out_MBTD = out_MBTD.at[m].set(jnp.where(busy, x_BTD, out_MBTD[m]))
            sums = jax.tree.map(lambda a, b: a.at[turn].add(jnp.where(busy, b, 0)), sums, new)
            x_BTD = jax.lax.ppermute(x_BTD, AXIS, [(j, (j + 1) % P) for j in range(P)])
            return (x_BTD, out_MBTD, sums), None

        start = (jnp.zeros_like(x_MBTD[0]), jnp.zeros_like(x_MBTD), sums)
        (_, out_MBTD, sums), _ = jax.lax.scan(step, start, jnp.arange(M * turns + P - 1))
        out_MBTD = jax.lax.psum(jnp.where(s == P - 1, out_MBTD, 0), AXIS)
        sums = jax.tree.map(lambda x: x.reshape(R, *x.shape[2:]), sums)
        if turns > 1:
            sums = jax.tree.map(lambda x: _from_circle(x, P), sums)
        return out_MBTD, sums

    layers, whole = PartitionSpec(AXIS), PartitionSpec()
    out_MBTD, sums = jax.shard_map(
        stage, in_specs=(layers, whole, whole, layers), out_specs=(whole, layers),
        axis_names={AXIS}, check_vma=False,
    )(params, cut(x_BTD), jax.tree.map(cut, tokens), jnp.arange(P))  # fmt: skip
    return jnp.swapaxes(out_MBTD, 0, 1).reshape(x_BTD.shape), sums


def _to_circle(w, P: int):
    """From blocks sR, sR + 1, ... of stage s, as parameters lie, to s, s + P, ..."""
    w = w.reshape(-1, P, *w.shape[1:])
    return jax.lax.all_to_all(w, AXIS, 1, 0, tiled=True)[:, 0]


def _from_circle(w, P: int):
    w = jax.lax.all_to_all(w[:, None], AXIS, 0, 1, tiled=True)
    return w.reshape(-1, *w.shape[2:])

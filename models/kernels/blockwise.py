"""Attention of one device's queries over one device's keys, block by block, in plain XLA.

`attend` never holds a [T, S] matrix of scores beyond one block: it keeps a running softmax over
blocks of keys (arXiv 2112.05682, 2307.08691) and recomputes the scores in its own gradient rule.
Blocks that the causal or the chunk rule hides are not visited. `attend_parts` does the same for
keys that lie in several places, as those of a cache do, and has no gradient.
"""

import functools

import jax
import jax.numpy as jnp

from ..masks import Tokens, visible
from ..parallel import sharding

# Scores of this many (query, key) pairs are small enough to hold at once.
_ONE_BLOCK = 256 * 256
_BLOCK = 256
_NEVER = -1e30
# Beyond every position.
_FAR = jnp.iinfo(jnp.int32).max


def attend(q_BTNH, k_BSKH, v_BSKH, q_tokens: Tokens, k_tokens: Tokens, *, chunk_size=0,
           start=None):  # fmt: skip
    """Softmax attention of each query over the keys it sees, scaled by H**-0.5.

    Args:
      q_BTNH, k_BSKH, v_BSKH: in the compute dtype; query head n reads key head n // (N / K).
      q_tokens, k_tokens: positions and segments, see `masks.visible`.
      chunk_size: of chunked attention; 0 = none.
      start: the queries are tokens [start, start + T) of the keys', in the same order, so that
        blocks of later keys, or keys more than a chunk before, can be passed over unseen. An int
        or a traced scalar; None where keys come in any order.

    Returns:
      [B, T, N, H] in q's dtype; zeros for a query that sees nothing.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    one = T * S <= _ONE_BLOCK
    if B > 1 and not one and sharding.platform() == "cpu":
        # One row after the other: its block of scores stays in the processor's cache.
        return jax.lax.map(
            lambda row: attend(*jax.tree.map(lambda x: x[None], row), chunk_size=chunk_size,
                               start=start)[0],
            (q_BTNH, k_BSKH, v_BSKH, q_tokens, k_tokens),
        )  # fmt: skip
    bq, bk = (T, S) if one else (min(T, _BLOCK), min(S, _BLOCK))
    q = _pad(q_BTNH, bq).reshape(B, -1, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = (_pad(x, bk).transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    q_tokens, k_tokens = (
        jax.tree.map(lambda x, b=b: _pad(x, b), t) for t, b in ((q_tokens, bq), (k_tokens, bk))
    )
    start = None if start is None else jnp.asarray(start, jnp.int32)
    out = _blockwise(q, k, v, q_tokens, k_tokens, start, chunk_size, bq, bk)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)[:, :T]


def _pad(x, block):
    """Fill dim 1 up to a multiple of the block; zero is the segment of padding."""
    extra = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x


def _range(i, bq, bk, num_keys, chunk_size, start):
    """Blocks of keys [low, high) that query block i may see."""
    if start is None:
        return 0, num_keys // bk
    first = start + i * bq
    high = jnp.minimum((first + bq + bk - 1) // bk, num_keys // bk)
    # In a packed row chunks start anywhere, but none reaches further back than its size.
    low = jnp.maximum(first - (chunk_size - 1), 0) // bk if chunk_size else 0
    return low, high


def _einsum(spec, a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _take(x, i, block, axis):
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _scores(q, k, q_tokens, k_tokens, i, j, bq, bk, chunk_size):
    """Masked scores of query block i against key block j, [B, K, G, bq, bk] float32."""
    q_i, k_j = _take(q, i, bq, 3), _take(k, j, bk, 2)
    seen = visible(
        jax.tree.map(lambda x: _take(x, i, bq, 1), q_tokens),
        jax.tree.map(lambda x: _take(x, j, bk, 1), k_tokens),
        chunk_size,
    )
    return _masked(q_i, k_j, seen), q_i, k_j


def _masked(q, k, seen):
    """Scores [B, K, G, T, S] in float32 of the pairs that are seen, _NEVER elsewhere."""
    s = _einsum("BKGTH,BKSH->BKGTS", q, k) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, None, None], s, _NEVER)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _blockwise(q, k, v, q_tokens, k_tokens, start, chunk_size, bq, bk):
    return _forward(q, k, v, q_tokens, k_tokens, start, chunk_size, bq, bk)[0]


def _forward(q, k, v, q_tokens, k_tokens, start, chunk_size, bq, bk):
    shape = (*q.shape[:3], bq)

    def query_block(i):
        def key_block(j, sums):
            s, _, _ = _scores(q, k, q_tokens, k_tokens, i, j, bq, bk, chunk_size)
            return _add_block(sums, s, _take(v, j, bk, 2))

        low, high = _range(i, bq, bk, k.shape[2], chunk_size, start)
        sums = jax.lax.fori_loop(low, high, key_block, _no_blocks(shape, v.shape[-1]))
        out, lse = _finish(sums)
        return out.astype(q.dtype), lse

    blocks = q.shape[3] // bq
    if blocks == 1:
        out, lse = query_block(0)
    else:
        out, lse = jax.lax.map(query_block, jnp.arange(blocks))
        out, lse = _join(out), _join(lse)
    return out, (q, k, v, q_tokens, k_tokens, start, out, lse)


def _no_blocks(shape, H):
    """A running softmax that has seen no keys: largest score, sum, weighted sum of values."""
    return jnp.full(shape, _NEVER), jnp.zeros(shape), jnp.zeros((*shape, H))


def _add_block(sums, s, v_BKSH):
    """The running softmax after one more block of masked scores [B, K, G, T, S]."""
    top, total, acc = sums
    new_top = jnp.maximum(top, s.max(-1))
    # A row of which nothing is seen yet has top == _NEVER: exp(0) there must not count.
    p = jnp.where(s > _NEVER / 2, jnp.exp(s - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    pv = _einsum("BKGTS,BKSH->BKGTH", p.astype(v_BKSH.dtype), v_BKSH)
    return new_top, total * shrink + p.sum(-1), acc * shrink[..., None] + pv


def _finish(sums):
    """Attention, and the logarithm of the softmax's denominator; zeros where nothing was seen."""
    top, total, acc = sums
    total = jnp.where(total == 0.0, 1.0, total)
    return acc / total[..., None], top + jnp.log(total)


def _join(x):
    """[blocks, B, K, G, bq, ...] -> [B, K, G, T, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _backward(chunk_size, bq, bk, saved, d_out):
    q, k, v, q_tokens, k_tokens, start, out, lse = saved
    d_out = d_out.astype(q.dtype)
    # sum_s p_s dp_s of the softmax gradient, without p (arXiv 2205.14135, appendix B.4).
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def query_block(carry, i):
        d_i = _take(d_out, i, bq, 3)
        lse_i, delta_i = (_take(x, i, bq, 3)[..., None] for x in (lse, delta))

        def key_block(j, carry):
            dq, dk, dv = carry
            s, q_i, k_j = _scores(q, k, q_tokens, k_tokens, i, j, bq, bk, chunk_size)
            p = jnp.where(s > _NEVER / 2, jnp.exp(s - lse_i), 0.0)
            dp = _einsum("BKGTH,BKSH->BKGTS", d_i, _take(v, j, bk, 2))
            ds = (p * (dp - delta_i) * q.shape[-1] ** -0.5).astype(q.dtype)
            dq += _einsum("BKGTS,BKSH->BKGTH", ds, k_j)
            dk = _add(dk, _einsum("BKGTS,BKGTH->BKSH", ds, q_i), j * bk)
            dv = _add(dv, _einsum("BKGTS,BKGTH->BKSH", p.astype(q.dtype), d_i), j * bk)
            return dq, dk, dv

        low, high = _range(i, bq, bk, k.shape[2], chunk_size, start)
        dq = jnp.zeros(d_i.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(low, high, key_block, (dq, *carry))
        return (dk, dv), dq.astype(q.dtype)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    blocks = q.shape[3] // bq
    if blocks == 1:
        (dk, dv), dq = query_block(zeros, 0)
    else:
        (dk, dv), dq = jax.lax.scan(query_block, zeros, jnp.arange(blocks))
        dq = _join(dq)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


def _add(total, part, start):
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 2)


_blockwise.defvjp(_forward, _backward)


def attend_parts(q_BTKGH, q_tokens: Tokens, parts, *, chunk_size=0):
    """`attend` over the keys of several places, without a gradient.

    Blocks of keys that no query may see, by their positions, are not read: of a cache only what is
    filled, of a chunk only what is left of it.

    Args:
      q_BTKGH: query g of key head k.
      q_tokens, chunk_size: see `attend`.
      parts: of each place the `Tokens` [B, S] of its keys, and a function of `start` and `size`
        that gives the keys and values [B, size, K, H] there.

    Returns:
      [B, T, K, G, H] in q's dtype.
    """
    B, T, K, G, H = q_BTKGH.shape
    bq = min(T, _BLOCK)
    q = _pad(q_BTKGH, bq).transpose(0, 2, 3, 1, 4)
    q_tokens = jax.tree.map(lambda x: _pad(x, bq), q_tokens)
    sizes = [min(k_tokens.positions_BT.shape[1], _BLOCK) for k_tokens, _ in parts]
    ranges = [
        _reach(q_tokens, k_tokens, bq, bk, chunk_size)
        for (k_tokens, _), bk in zip(parts, sizes, strict=True)
    ]

    def query_block(i):
        q_i, tokens_i = _take(q, i, bq, 3), jax.tree.map(lambda x: _take(x, i, bq, 1), q_tokens)
        sums = _no_blocks((B, K, G, bq), H)
        for (k_tokens, take), bk, (low_I, high_I) in zip(parts, sizes, ranges, strict=True):
            S = k_tokens.positions_BT.shape[1]

            def key_block(j, sums, k_tokens=k_tokens, take=take, bk=bk, S=S):
                # The last block begins earlier where blocks do not divide the slots.
                start = jnp.minimum(j * bk, S - bk)
                k_j, v_j = (x.swapaxes(1, 2).astype(q.dtype) for x in take(start, bk))
                tokens_j = jax.tree.map(
                    lambda x: jax.lax.dynamic_slice_in_dim(x, start, bk, 1), k_tokens
                )
                seen = visible(tokens_i, tokens_j, chunk_size)
                seen &= start + jnp.arange(bk) >= j * bk
                return _add_block(sums, _masked(q_i, k_j, seen), v_j)

            if S == bk:
                sums = key_block(0, sums)
            else:
                sums = jax.lax.fori_loop(low_I[i], high_I[i], key_block, sums)
        return _finish(sums)[0].astype(q.dtype)

    blocks = q.shape[3] // bq
    out = query_block(0) if blocks == 1 else _join(jax.lax.map(query_block, jnp.arange(blocks)))
    return out.transpose(0, 3, 1, 2, 4)[:, :T]


def _reach(q_tokens: Tokens, k_tokens: Tokens, bq, bk, chunk_size):
    """For each block of queries, blocks of keys [low, high) beyond which it sees nothing."""

    def span(tokens, block):
        """Lowest and highest position of a block, padding apart: [B, blocks]."""
        positions, live = tokens.positions_BT, tokens.segments_BT != 0
        ends = ((jnp.where(live, positions, _FAR), _FAR), (jnp.where(live, positions, -1), -1))
        low, high = (
            jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)
            .reshape(len(x), -1, block)
            for x, fill in ends
        )  # fmt: skip
        return low.min(-1), high.max(-1)

    q_low, q_high = (x[:, :, None] for x in span(q_tokens, bq))
    k_low, k_high = (x[:, None, :] for x in span(k_tokens, bk))
    seen_BIJ = (k_low <= q_high) & (k_high >= 0)
    if chunk_size:
        seen_BIJ &= k_high // chunk_size >= q_low // chunk_size
    seen_IJ = seen_BIJ.any(0)
    low_I = jnp.argmax(seen_IJ, 1)
    high_I = seen_IJ.shape[1] - jnp.argmax(seen_IJ[:, ::-1], 1)
    return low_I, jnp.where(seen_IJ.any(1), high_I, low_I)

"""Which query sees which key: one rule for causal, chunked, packed and cached attention."""

import flax
import jax
import jax.numpy as jnp


class Tokens(flax.struct.PyTreeNode):
    """Where tokens stand: their position in the document and which document it is.

    `segments` is 0 for padding and empty cache slots, which see nothing and are seen by nothing.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array
    # Whether the tokens of a row are in zig-zag order, see `context`.
    zigzag: bool = flax.struct.field(pytree_node=False, default=False)


def visible(q: Tokens, k: Tokens, chunk_size: int):
    """Whether query t sees key s: same document, not later, and in the same chunk.

    Chunks are blocks of `chunk_size` positions counted from the document's start, not a sliding
    window; 0 means no chunks (Llama 4 RoPE layers have them, NoPE layers do not).

    Returns:
      bool [B, T, S].
    """
    qp, kp = q.positions_BT[:, :, None], k.positions_BT[:, None, :]
    qs, ks = q.segments_BT[:, :, None], k.segments_BT[:, None, :]
    seen = (qs == ks) & (qs != 0) & (kp <= qp)
    if chunk_size:
        seen &= qp // chunk_size == kp // chunk_size
    return seen


def default_tokens(shape) -> Tokens:
    """Every row one whole document from its first token."""
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return Tokens(positions, jnp.ones(shape, jnp.int32))

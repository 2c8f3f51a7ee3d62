"""The key/value cache of generation: a pytree that goes in and comes out of the model.

A layer that attends within chunks keeps one chunk only, so at 10 million positions a Llama 4
cache is a quarter of what full layers would need.
"""

import flax
import jax
import jax.numpy as jnp

from ..configs.schema import ModelConfig
from .masks import Tokens


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer (or of a scanned stack of them, with a leading axis).

    Slot s holds the token at position s, or the last one at a position that is s modulo the
    chunk size; `positions_BS` says which, -1 where the slot is empty.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    chunk_size: int = flax.struct.field(pytree_node=False)

    def extend(self, k_BTKH, v_BTKH, tokens: Tokens):
        """Write new tokens.

        Returns:
          keys, values and their `Tokens` that the new tokens may attend to, and the new cache.
        """
        B, T = tokens.positions_BT.shape
        S = self.k_BSKH.shape[1]
        positions, valid = tokens.positions_BT, tokens.segments_BT != 0
        slots = positions
        if self.chunk_size:
            # Of several chunks at once only the last is ever looked at again.
            last = jnp.max(jnp.where(valid, positions, -1), axis=1, keepdims=True)
            valid &= positions // self.chunk_size == last // self.chunk_size
            slots = positions % self.chunk_size
        # Slot S is out of range: dropped.
        where = (jnp.arange(B)[:, None], jnp.where(valid, slots, S))
        new = self.replace(
            k_BSKH=self.k_BSKH.at[where].set(k_BTKH, mode="drop"),
            v_BSKH=self.v_BSKH.at[where].set(v_BTKH, mode="drop"),
            positions_BS=self.positions_BS.at[where].set(positions, mode="drop"),
        )
        if T == 1 or not self.chunk_size:
            return new.k_BSKH, new.v_BSKH, new.tokens(), new
        # Several tokens may cross a chunk border and overwrite what the first of them see.
        keys = jnp.concatenate([self.k_BSKH, k_BTKH], axis=1)
        values = jnp.concatenate([self.v_BSKH, v_BTKH], axis=1)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), self.tokens(), tokens)
        return keys, values, both, new

    def tokens(self) -> Tokens:
        return Tokens(self.positions_BS, (self.positions_BS >= 0).astype(jnp.int32))


class Cache(flax.struct.PyTreeNode):
    """Caches of all layers and how many tokens each row has seen."""

    layers: dict
    lengths_B: jax.Array


def init_cache(config: ModelConfig, batch_size: int, max_length: int, dtype=None) -> Cache:
    """An empty cache for `batch_size` rows of at most `max_length` tokens."""

    def layer(index, *stack):
        chunk = config.chunk_size if config.uses_rope(index) else 0
        slots = min(chunk, max_length) if chunk else max_length
        shape = (*stack, batch_size, slots, config.num_kv_heads, config.head_dim)
        # Two arrays, not one twice: a donated cache may hold each buffer once.
        k, v = (jnp.zeros(shape, dtype or config.compute_dtype) for _ in range(2))
        return LayerCache(k, v, jnp.full(shape[:-2], -1, jnp.int32), chunk)

    blocks, rest = divmod(config.num_layers, config.period)
    layers = {"blocks": {f"layer_{j}": layer(j, blocks) for j in range(config.period)}}
    if not blocks:
        layers = {}
    if rest:
        layers["tail"] = {f"layer_{j}": layer(j) for j in range(rest)}
    return Cache(layers, jnp.zeros((batch_size,), jnp.int32))

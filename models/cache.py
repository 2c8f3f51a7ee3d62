"""The key/value cache of generation: a pytree that goes in and comes out of the model.

A layer that attends within chunks keeps one chunk only, so at 10 million positions a Llama 4
cache is a quarter of what full layers would need.
"""

import flax
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..configs.schema import ModelConfig
from . import bits
from .masks import Tokens
from .parallel import sharding


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer, or of a stack of layers (with a leading axis).

    Slot s holds the token at position s, or the last one at a position that is s modulo the
    chunk size; `positions_BS` says which, -1 where the slot is empty. Keys and values are as
    `bits.pack` gives them. `layer` is the number in its stack of the layer that is computed.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    chunk_size: int = flax.struct.field(pytree_node=False)
    layer: jax.Array | None = None

    def extend(self, k_BTKH, v_BTKH, tokens: Tokens):
        """Write new tokens, in place where the buffers may be used again.

        Returns:
          the new cache, and where the keys are that the new tokens may attend to, as
          `blockwise.attend_parts` takes it.
        """
        B, T = tokens.positions_BT.shape
        S = self.k_BSKH.shape[-3]
        positions, kept = tokens.positions_BT, tokens.segments_BT != 0
        slots = positions
        if self.chunk_size:
            # Of several chunks at once only the last is ever looked at again.
            last = jnp.max(jnp.where(kept, positions, -1), axis=1, keepdims=True)
            kept &= positions // self.chunk_size == last // self.chunk_size
            slots = positions % self.chunk_size
        # Slot S is out of range: dropped.
        at = (*self._index(), jnp.arange(B)[:, None], jnp.where(kept, slots, S))
        arrays = (self.k_BSKH, self.v_BSKH, self.positions_BS)
        new = (bits.pack(k_BTKH), bits.pack(v_BTKH), positions)
        lost = []
        if T > 1 and self.chunk_size:
            # Several tokens may cross a chunk border and overwrite what the first of them see: what
            # goes in and what does not stay change places. Written so, the old values are read
            # before; else XLA would copy the cache to be sure of that.
            old = [x.at[at].get(mode="clip") for x in arrays]
            swap = [kept[..., None, None], kept[..., None, None], kept]
            out = [jnp.where(w, o, n) for w, o, n in zip(swap, old, new, strict=True)]
            new = [jnp.where(w, n, o) for w, o, n in zip(swap, old, new, strict=True)]
            # What is written again, at the same position, is not lost but wrong.
            left = (old[2] >= 0) & (old[2] < positions)
            seen = jnp.where(kept, left, tokens.segments_BT != 0)
            lost = [(Tokens(out[2], seen.astype(jnp.int32)), _taker(*out[:2]))]
        k, v, p = (x.at[at].set(n, mode="drop") for x, n in zip(arrays, new, strict=True))
        cache = self.replace(k_BSKH=k, v_BSKH=v, positions_BS=p)
        return cache, [(cache.tokens(), _taker(k, v, *self._index())), *lost]

    def tokens(self) -> Tokens:
        """Of the layer's slots."""
        positions_BS = self.positions_BS[self._index()]
        return Tokens(positions_BS, (positions_BS >= 0).astype(jnp.int32))

    def _index(self):
        return () if self.layer is None else (self.layer,)

    def specs(self):
        """A `LayerCache` of the `PartitionSpec` of each array on the current mesh."""

        def spec(x, *names):
            return sharding.activation(x.shape, (None,) * (x.ndim - len(names)) + names)

        kv = ("batch", None, "act_kv_heads", None)
        return LayerCache(
            spec(self.k_BSKH, *kv), spec(self.v_BSKH, *kv), spec(self.positions_BS, "batch", None),
            self.chunk_size, None if self.layer is None else PartitionSpec(),
        )  # fmt: skip


def _taker(k, v, *layer):
    """A function that gives the keys and values [B, size, K, H] of `size` slots from `start` on."""

    def take(start, size):
        def of(x):
            B, _, K, H = x.shape[-4:]
            zero = jnp.zeros((), jnp.int32)
            start_at = (*layer, zero, start, zero, zero)
            part = jax.lax.dynamic_slice(x, start_at, (1,) * len(layer) + (B, size, K, H))
            return bits.unpack(part.reshape(B, size, K, H))

        return of(k), of(v)

    return take


class Cache(flax.struct.PyTreeNode):
    """Caches of all layers and how many tokens each row has seen."""

    layers: dict
    lengths_B: jax.Array


def init_cache(config: ModelConfig, batch_size: int, max_length: int, dtype=None) -> Cache:
    """An empty cache for `batch_size` rows of at most `max_length` tokens."""
    kept = bits.dtype(dtype or config.compute_dtype)

    def layer(index, *stack):
        chunk = config.chunk_size if config.uses_rope(index) else 0
        slots = min(chunk, max_length) if chunk else max_length
        shape = (*stack, batch_size, slots, config.num_kv_heads, config.head_dim)
        # Two arrays, not one twice: a donated cache may hold each buffer once.
        k, v = (jnp.zeros(shape, kept) for _ in range(2))
        return LayerCache(k, v, jnp.full(shape[:-2], -1, jnp.int32), chunk)

    blocks, rest = divmod(config.num_layers, config.period)
    layers = {"blocks": {f"layer_{j}": layer(j, blocks) for j in range(config.period)}}
    if not blocks:
        layers = {}
    if rest:
        layers["tail"] = {f"layer_{j}": layer(j) for j in range(rest)}
    return Cache(layers, jnp.zeros((batch_size,), jnp.int32))

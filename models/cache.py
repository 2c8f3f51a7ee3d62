"""The key/value cache of generation: a pytree that goes in and comes out of the model.

A layer that attends within chunks keeps one chunk only, so at 10 million positions a Llama 4
cache is a quarter of what full layers would need. Keys and values can be kept in a byte each.
"""

import flax
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from ..configs.schema import ModelConfig
from . import bits
from .fusion import features_per_image
from .masks import Tokens
from .parallel import sharding

# Largest number of the dtypes of one byte.
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
DTYPES = ("float32", "bfloat16", *_LARGEST)


class Bytes(flax.struct.PyTreeNode):
    """Keys or values [..., K, H] of a byte each: `values * scale`, a scale a position and head.

    values: int8, or the bits of float8_e4m3fn in uint8, since XLA for CPUs moves those as they are.
    scale: float32 [..., K, 1]; the largest of the H numbers is the largest that the dtype has. So
      the error of a number is at most 1/254 of that one's size with int8; with float8_e4m3fn at
      most 1/16 of its own, or 2^-10 / 448 of that one's where it is smaller.
    """

    values: jax.Array
    scale: jax.Array

    @classmethod
    def empty(cls, shape, dtype: str) -> "Bytes":
        """Zeros."""
        kept = jnp.int8 if dtype == "int8" else jnp.uint8
        return cls(jnp.zeros(shape, kept), jnp.zeros((*shape[:-1], 1)))

    def like(self, x) -> "Bytes":
        """Another array, as this one is kept."""
        x, is_int = x.astype(jnp.float32), self.values.dtype == jnp.int8
        largest = _LARGEST["int8" if is_int else "float8_e4m3fn"]
        scale = jnp.max(jnp.abs(x), -1, keepdims=True) / largest
        # The division may round beyond the largest number, which float8 has only NaN for.
        x = jnp.clip(x / jnp.where(scale == 0, 1.0, scale), -largest, largest)
        if is_int:
            return Bytes(jnp.round(x).astype(jnp.int8), scale)
        return Bytes(jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8), scale)

    def numbers(self):
        """As one float32 array."""
        values = self.values
        if values.dtype == jnp.uint8:
            values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
        return values.astype(jnp.float32) * self.scale


def _pack(x, kept):
    """New keys or values as those of a cache are kept."""
    if isinstance(kept, Bytes):
        return kept.like(x)
    of = jnp.bfloat16 if kept.dtype == jnp.uint16 else kept.dtype
    return bits.pack(x.astype(of))


def _unpack(kept):
    return kept.numbers() if isinstance(kept, Bytes) else bits.unpack(kept)


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer, or of a stack of layers (with a leading axis).

    Slot s holds the token at position s, or the last one at a position that is s modulo the
    chunk size; `positions_BS` says which, -1 where the slot is empty. Keys and values are `Bytes`,
    or as `bits.pack` gives them. `layer` is the number in its stack of the layer that is computed.
    """

    k_BSKH: jax.Array | Bytes
    v_BSKH: jax.Array | Bytes
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
        S = self.positions_BS.shape[-1]
        positions, kept = tokens.positions_BT, tokens.segments_BT != 0
        slots = positions
        if self.chunk_size:
            # Of several chunks at once only the last is ever looked at again.
            last = jnp.max(jnp.where(kept, positions, -1), axis=1, keepdims=True)
            kept &= positions // self.chunk_size == last // self.chunk_size
            slots = positions % self.chunk_size
        # Slot S is out of range: dropped.
        at = (*_index(self), jnp.arange(B)[:, None], jnp.where(kept, slots, S))
        arrays = (self.k_BSKH, self.v_BSKH, self.positions_BS)
        new = (_pack(k_BTKH, self.k_BSKH), _pack(v_BTKH, self.v_BSKH), positions)
        lost = []
        if T > 1 and self.chunk_size:
            # Several tokens may cross a chunk border and overwrite what the first of them see: what
            # goes in and what does not stay change places. Written so, the old values are read
            # before; else XLA would copy the cache to be sure of that.
            old = jax.tree.map(lambda x: x.at[at].get(mode="clip"), arrays)

            def both(first, second):
                def one(a, b):
                    return jnp.where(kept.reshape(*kept.shape, *[1] * (a.ndim - 2)), a, b)

                return jax.tree.map(one, first, second)

            out, new = both(old, new), both(new, old)
            # What is written again, at the same position, is not lost but wrong.
            left = (old[2] >= 0) & (old[2] < positions)
            seen = jnp.where(kept, left, tokens.segments_BT != 0)
            lost = [(Tokens(out[2], seen.astype(jnp.int32)), _taker(*out[:2]))]
        k, v, p = jax.tree.map(lambda x, n: x.at[at].set(n, mode="drop"), arrays, new)
        cache = self.replace(k_BSKH=k, v_BSKH=v, positions_BS=p)
        return cache, [(cache.tokens(), _taker(k, v, *_index(self))), *lost]

    def tokens(self) -> Tokens:
        """Of the layer's slots."""
        positions_BS = self.positions_BS[_index(self)]
        return Tokens(positions_BS, (positions_BS >= 0).astype(jnp.int32))

    def specs(self):
        """A `LayerCache` of the `PartitionSpec` of each array on the current mesh."""

        def spec(x, *names):
            return sharding.activation(x.shape, (None,) * (x.ndim - len(names)) + names)

        k, v = jax.tree.map(
            lambda x: spec(x, "batch", None, "act_kv_heads", None), (self.k_BSKH, self.v_BSKH)
        )
        return LayerCache(
            k, v, spec(self.positions_BS, "batch", None), self.chunk_size,
            None if self.layer is None else PartitionSpec(),
        )  # fmt: skip


def _index(cache):
    return () if cache.layer is None else (cache.layer,)


def _in_order(part):
    """A part of the cache, as the cache lies in memory."""
    if sharding.platform() != "gpu":
        return part
    # XLA would turn the cache, all of it, into the order that the product with a block likes, and
    # back, at each token.
    return with_layout_constraint(part, Layout(tuple(range(part.ndim))))


def _taker(k, v, *layer):
    """A function that gives the keys and values [B, size, K, H] of `size` slots from `start` on."""

    def take(start, size):
        def of(x):
            B, _, K, H = x.shape[-4:]
            zero = jnp.zeros((), jnp.int32)
            start_at = (*layer, zero, start, zero, zero)
            part = jax.lax.dynamic_slice(x, start_at, (1,) * len(layer) + (B, size, K, H))
            return _in_order(part.reshape(B, size, K, H))

        return _unpack(jax.tree.map(of, k)), _unpack(jax.tree.map(of, v))

    return take


class PagedCache(flax.struct.PyTreeNode):
    """Keys and values of one layer without chunks, or of a stack of such, in pages that rows share.

    A page holds S tokens; pages are split over the mesh as rows are, and a row has pages of its own
    part only. `table_BN` has their numbers within that part, in order, and one beyond the last
    where there is none: nothing is written there, and what is read there no query may see.
    `None` where the cache is not in use: it comes with each call. `layer` as in `LayerCache`.
    """

    k_PSKH: jax.Array | Bytes
    v_PSKH: jax.Array | Bytes
    table_BN: jax.Array | None = None
    layer: jax.Array | None = None
    chunk_size: int = flax.struct.field(pytree_node=False, default=0)

    def extend(self, k_BTKH, v_BTKH, tokens: Tokens):
        """As `LayerCache.extend`."""
        assert self.table_BN is not None
        arrays = (self.k_PSKH, self.v_PSKH)
        P, S = jax.tree.leaves(arrays)[0].shape[-4:-2]
        at_BT = tokens.positions_BT
        page_BT = jnp.take_along_axis(self.table_BN, at_BT // S, axis=1, mode="fill", fill_value=P)
        page_BT = jnp.where(tokens.segments_BT != 0, page_BT, P)
        at = (*_index(self), page_BT, at_BT % S)
        new = (_pack(k_BTKH, self.k_PSKH), _pack(v_BTKH, self.v_PSKH))
        k, v = jax.tree.map(lambda x, n: x.at[at].set(n, mode="drop"), arrays, new)
        # All up to a query is written, and nothing behind it is seen.
        B, N = self.table_BN.shape
        held = Tokens(
            jnp.broadcast_to(jnp.arange(N * S), (B, N * S)), jnp.ones((B, N * S), jnp.int32)
        )
        return self.replace(k_PSKH=k, v_PSKH=v), [(held, self._taker(k, v, S))]

    def _taker(self, k, v, S):
        """As `_taker`, of whole pages."""

        def take(start, size):
            pages_BN = jax.lax.dynamic_slice_in_dim(self.table_BN, start // S, size // S, 1)

            def of(x):
                part = x.at[(*_index(self), pages_BN)].get(mode="clip")
                return _in_order(part.reshape(len(pages_BN), size, *x.shape[-2:]))

            return _unpack(jax.tree.map(of, k)), _unpack(jax.tree.map(of, v))

        return take

    def copy(self, pages_G2):
        """Copy in each part of the mesh the first page of its pair to the second."""

        def local(arrays, pages_G2):
            source, target = pages_G2[0]

            def of(x):
                axis = x.ndim - 4
                page = jax.lax.dynamic_slice_in_dim(x, source, 1, axis)
                return jax.lax.dynamic_update_slice_in_dim(x, page, target, axis)

            return jax.tree.map(of, arrays)

        arrays = (self.k_PSKH, self.v_PSKH)
        if not sharding.split_axes():
            k, v = local(arrays, pages_G2)
        else:
            specs = self.specs()
            specs = (specs.k_PSKH, specs.v_PSKH)
            pairs = sharding.activation(pages_G2.shape, ("batch", None))
            k, v = sharding.per_device(local, (specs, pairs), specs)(arrays, pages_G2)
        return self.replace(k_PSKH=k, v_PSKH=v)

    def specs(self):
        """A `PagedCache` of the `PartitionSpec` of each array on the current mesh."""

        def spec(x):
            stack = (None,) * (x.ndim - 4)
            return sharding.activation(x.shape, (*stack, "batch", None, "act_kv_heads", None))

        k, v = jax.tree.map(spec, (self.k_PSKH, self.v_PSKH))
        table = self.table_BN
        table = table if table is None else sharding.activation(table.shape, ("batch", None))
        return PagedCache(k, v, table, None if self.layer is None else PartitionSpec())


class ImageCache(flax.struct.PyTreeNode):
    """Keys and values of a row's images in one layer that attends to them, or in a stack of such.

    As in `LayerCache`; they are written once, by the call that has the images.
    """

    k_BUKH: jax.Array | Bytes
    v_BUKH: jax.Array | Bytes
    layer: jax.Array | None = None

    def write(self, k_BUKH, v_BUKH):
        """The cache with these in it, in place where the buffers may be used again."""
        old = (self.k_BUKH, self.v_BUKH)
        new = (_pack(k_BUKH, self.k_BUKH), _pack(v_BUKH, self.v_BUKH))
        k, v = jax.tree.map(lambda x, n: x.at[(*_index(self), ...)].set(n), old, new)
        return self.replace(k_BUKH=k, v_BUKH=v)

    def part(self, tokens: Tokens):
        """What `blockwise.attend_parts` takes, by the `Tokens` of the features."""
        return tokens, _taker(self.k_BUKH, self.v_BUKH, *_index(self))

    def specs(self):
        """An `ImageCache` of the `PartitionSpec` of each array on the current mesh."""

        def spec(x):
            stack = (None,) * (x.ndim - 4)
            return sharding.activation(x.shape, (*stack, "batch", None, "act_kv_heads", None))

        k, v = jax.tree.map(spec, (self.k_BUKH, self.v_BUKH))
        return ImageCache(k, v, None if self.layer is None else PartitionSpec())


class Seen(flax.struct.PyTreeNode):
    """What the tokens of each row so far say of its images, for `cross.look` at the next ones.

    count_B: tokens of images. run_B: number of the first image of their latest run, counted from
    1; 0 for none. open_B: whether the last token is of the run. runs_BM: the same for each image; 0
    where its token is not read. valid_BU: features that exist.
    """

    count_B: jax.Array
    run_B: jax.Array
    open_B: jax.Array
    runs_BM: jax.Array
    valid_BU: jax.Array


def nothing_seen(num_images: int, valid_BU) -> Seen:
    """`Seen` of rows of which no token is read."""
    zero_B = jnp.zeros(len(valid_BU), jnp.int32)
    runs_BM = jnp.zeros((len(valid_BU), num_images), jnp.int32)
    # Arrays of their own: a donated cache may hold each buffer once.
    return Seen(zero_B, jnp.zeros_like(zero_B), zero_B != 0, runs_BM, valid_BU)


# Caches of a layer.
KINDS = LayerCache | PagedCache | ImageCache


class Cache(flax.struct.PyTreeNode):
    """Caches of all layers, how many tokens each row has seen, and which images they name."""

    layers: dict
    lengths_B: jax.Array
    seen: Seen | None = None

    def take(self, rows_R):
        """The cache whose r-th row is a copy of row `rows_R[r]` of this one."""
        return over_rows(lambda axis, x: jnp.take(x, rows_R, axis=axis, mode="clip"), self)

    def paged(self, table_BN) -> "Cache":
        """With the pages of each row, see `PagedCache`; None takes them out."""
        return self._over_pages(lambda layer: layer.replace(table_BN=table_BN))

    def copy_pages(self, pages_G2) -> "Cache":
        """See `PagedCache.copy`."""
        return self._over_pages(lambda layer: layer.copy(pages_G2))

    def _over_pages(self, change):
        def one(layer):
            return change(layer) if isinstance(layer, PagedCache) else layer

        return self.replace(layers=jax.tree.map(one, self.layers, is_leaf=_is_layer))

    def without_images(self) -> "Cache":
        """What layers need that attend to the text, for rows that have no image."""
        layers = jax.tree.map(
            lambda layer: None if isinstance(layer, ImageCache) else layer, self.layers,
            is_leaf=_is_layer,
        )  # fmt: skip
        return self.replace(layers=layers, seen=None)

    def with_images(self, other: "Cache") -> "Cache":
        """Undo `without_images`, with what `other` holds of images."""
        layers = jax.tree.map(
            lambda theirs, ours: theirs if isinstance(theirs, ImageCache) else ours,
            other.layers, self.layers, is_leaf=_is_layer,
        )  # fmt: skip
        return self.replace(layers=layers, seen=other.seen)


def _is_layer(x):
    return isinstance(x, KINDS)


def over_rows(change, *caches: Cache) -> Cache:
    """Apply `change(axis of rows, array, ...)` to the arrays of caches that are alike.

    Of what rows share, the result has the last cache's.
    """

    def one(path, *arrays):
        # The letters of the field say where its rows are: `k_BSKH`, perhaps with axes before.
        names = (part.name for part in path if isinstance(part, jax.tree_util.GetAttrKey))
        name = next((name for name in names if "_B" in name), None)
        if name is None:
            return arrays[-1]
        letters = name.rpartition("_")[2]
        return change(arrays[0].ndim - len(letters), *arrays)

    return jax.tree.map_with_path(one, *caches)


def init_cache(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    dtype=None,
    images: int = 0,
    pages: tuple[int, int] | None = None,
) -> Cache:
    """An empty cache for `batch_size` rows of at most `max_length` tokens.

    Args:
      dtype: one of `DTYPES`; the model's activations' when left out.
      images: most images of a row, where layers attend to those; 0 for a text alone.
      pages: how many, and tokens of each, where layers without chunks have a `PagedCache`.
    """
    dtype = jnp.dtype(dtype or config.activation_dtype).name
    num_features = images * features_per_image(config.vision)

    def kept(shape):
        return (
            Bytes.empty(shape, dtype) if dtype in _LARGEST else jnp.zeros(shape, bits.dtype(dtype))
        )

    def layer(index, *stack):
        if config.is_cross(index):
            if not images:
                return None
            shape = (*stack, batch_size, num_features, config.num_kv_heads, config.head_dim)
            return ImageCache(kept(shape), kept(shape))
        chunk = config.chunk_size if config.uses_rope(index) else 0
        if pages and not chunk:
            shape = (*stack, *pages, config.num_kv_heads, config.head_dim)
            return PagedCache(kept(shape), kept(shape))
        slots = min(chunk, max_length) if chunk else max_length
        shape = (*stack, batch_size, slots, config.num_kv_heads, config.head_dim)
        # Two arrays, not one twice: a donated cache may hold each buffer once.
        return LayerCache(kept(shape), kept(shape), jnp.full(shape[:-2], -1, jnp.int32), chunk)

    blocks, rest = divmod(config.num_layers, config.period)
    layers = {"blocks": {f"layer_{j}": layer(j, blocks) for j in range(config.period)}}
    if not blocks:
        layers = {}
    if rest:
        layers["tail"] = {f"layer_{j}": layer(j) for j in range(rest)}
    seen = None
    if config.cross.interval and images:
        seen = nothing_seen(images, jnp.zeros((batch_size, num_features), bool))
    return Cache(layers, jnp.zeros((batch_size,), jnp.int32), seen)

"""A model with a cache of all slots: what devices do for `slots.Engine`, compiled once a shape.

It decides nothing: the engine says which slot and which tokens, and what to do with the results.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import bits
from ..adapters import choose
from ..cache import LayerCache, init_cache, over_rows
from ..cross import look
from ..fusion import Features
from ..leaf import settled
from ..parallel import sharding
from .engine import constrain_cache, for_decoding, next_ids, row_keys
from .sampling import Sampling

# Likeliest ids that a request can have beside each token.
TOP = 20
# The number of a row's adapter where it has none.
BASE = -1
# A word of a mask that forbids nothing.
EVERY = 0xFFFFFFFF


class Place(NamedTuple):
    """Where the text of each row stands, and how its next tokens are drawn; arrays [B].

    lengths: tokens before the next input; what the cache has from there on is not looked at.
    steps: tokens made before. numbers, sampling: see `Engine.insert`. adapters: see
    `adapters.choose`.
    """

    lengths_B: np.ndarray
    steps_B: np.ndarray
    numbers_B: np.ndarray
    sampling: Sampling
    adapters_B: np.ndarray

    def keys(self, step):
        """The random keys of the tokens `step` after those made before."""
        keys_B = row_keys(self.sampling.seed, self.numbers_B)
        return jax.vmap(jax.random.fold_in)(keys_B, self.steps_B + step)


class CachedModel:
    """A model, its parameters and a cache that its methods change; works under `jax.set_mesh`."""

    def __init__(self, model, params, num_rows: int, max_length: int, vocab_size: int,
                 cache_dtype: str = "", max_images: int = 0,
                 pages: tuple[int, int] | None = None):  # fmt: skip
        """Make the cache, see `init_cache`; ids from `vocab_size` on are never made."""
        self.model, self.params = for_decoding(model), settled(params)
        self.vocab_size = min(vocab_size, model.config.vocab_size)
        self._kept = bits.view(self.params)
        config = self.model.config
        shape = (config, num_rows, max_length, cache_dtype, max_images, pages)
        self._cache = jax.jit(lambda: constrain_cache(init_cache(*shape)))()

    def read(self, slot: int, tokens_BT, segments_BT, source: int, keep: int, adapter: int,
             table_N, copy, images: Features | None = None, before_BS=None,
             audio: Features | None = None) -> None:  # fmt: skip
        """Put a piece of a prompt into a slot, after its first `keep` tokens.

        Only the first of B rows counts: the others let a mesh that splits rows do so.

        Args:
          source: the slot that has those tokens, in what is not in pages.
          table_N: the pages of the slot, see `PagedCache`.
          copy: a page, and the one that becomes a copy of it before.
          images: features of the patch tokens in the piece; with `model.cross` those of all images
            of the prompt, where the slot does not have them.
          before_BS: with `model.cross` the prompt, if it has images.
          audio: features of the tokens of clips in the piece.
        """
        attends = before_BS is not None
        cache = read_piece(
            self.model, self._kept, self._part(attends), np.int32(slot), self._known(tokens_BT),
            segments_BT, np.int32(source), np.int32(keep), np.int32(adapter),
            np.array(table_N, np.int32), np.array(copy, np.int32), images, before_BS, audio,
        )  # fmt: skip
        self._put(cache, attends)

    def write(self, inputs_BT, counts_B, place: Place, tops_B, masks_BTW, images_B, table_BN):
        """Draw the id that follows each of the first `counts_B` of T inputs, none for count 0.

        Args:
          tops_B: more than 0 where a row wants the likeliest ids.
          masks_BTW: bits of the ids that may follow, see `grammar.Constraint.allowed`.
          images_B: rows that attend to images.
          table_BN: the pages of each row, see `PagedCache`.

        Returns:
          On the host: ids_BT, see `engine.check_ids`; logprobs_BT, see `engine.Block`; and, if
          any row wants them, the `TOP` likeliest ids and their log-probabilities [B, T, TOP].
        """
        attends = bool(np.any(images_B))
        cache, found = write_tokens(
            self.model, self.params, self._kept, self._part(attends), inputs_BT, counts_B, place,
            tops_B, masks_BTW, self.vocab_size, images_B if attends else None, table_BN,
        )  # fmt: skip
        self._put(cache, attends)
        return jax.device_get(found)

    def propose(self, last_B, limits_B, place: Place, masks_BW, num_tokens: int, table_BN):
        """The `num_tokens` ids [B, num_tokens] that would follow `last_B`, in the cache with it.

        Args:
          limits_B: how many of them a row wants; -1 for nothing at all, not even `last_B`.
          masks_BW: of the first of them, as in `write`.
        """
        self._cache, ids_BT = _propose(
            self.model, self.params, self._kept, self._cache, self._known(last_B), limits_B, place,
            masks_BW, self.vocab_size, num_tokens, table_BN,
        )  # fmt: skip
        return np.asarray(ids_BT)

    def _known(self, tokens):
        # A draft may lack the token of pictures.
        return np.where(tokens < self.model.config.embedding_rows, tokens, 0)

    def _part(self, attends: bool):
        """The cache; without what it holds of images, where no row attends to them."""
        return self._cache if attends else self._cache.without_images()

    def _put(self, cache, attends: bool) -> None:
        self._cache = cache if attends else cache.with_images(self._cache)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def read_piece(model, kept, cache, slot, tokens_BT, segments_BT, source, keep, adapter, table_N,
               copy, images, before_BS, audio):  # fmt: skip
    """The program of `CachedModel.read`: the new cache."""
    parts = len(tokens_BT)
    # The row that counts must be computed where the slot's pages are.
    part = slot // (len(cache.lengths_B) // parts)

    def placed(tree):
        return jax.tree.map(lambda x: jnp.roll(x, part, axis=0), tree)

    tokens_BT, segments_BT, images, before_BS, audio = placed(
        (tokens_BT, segments_BT, images, before_BS, audio)
    )
    copies_G2 = jnp.where((jnp.arange(parts) == part)[:, None], copy, 0)

    def take(axis, x):
        row = jax.lax.dynamic_slice_in_dim(x, source, 1, axis)
        return jnp.repeat(row, len(tokens_BT), axis)

    def put(axis, x, rows):
        row = jax.lax.dynamic_slice_in_dim(rows, part, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(x, row, slot, axis)

    def cut(layer):
        if not isinstance(layer, LayerCache):
            return layer
        known = layer.positions_BS < keep
        return layer.replace(positions_BS=jnp.where(known, layer.positions_BS, -1))

    rows = over_rows(take, cache)
    layers = jax.tree.map(cut, rows.layers, is_leaf=lambda x: isinstance(x, LayerCache))
    seen = rows.seen
    if seen is not None:
        known_S = (jnp.arange(before_BS.shape[1]) < keep).astype(jnp.int32)
        seen = _nothing(seen, jnp.ones(len(tokens_BT), bool))
        known_BS = jnp.broadcast_to(known_S, before_BS.shape)
        _, seen = look(model.config, before_BS, known_BS, None, seen)
    lengths_B = jnp.full(len(tokens_BT), keep, cache.lengths_B.dtype)
    rows = rows.replace(layers=layers, lengths_B=lengths_B, seen=seen).copy_pages(copies_G2)
    rows = constrain_cache(rows.paged(jnp.broadcast_to(table_N, (parts, len(table_N)))))
    kept = choose(kept, jnp.full(len(tokens_BT), adapter))
    rows = model.apply(
        {"params": kept},
        tokens_BT,
        segment_ids_BT=segments_BT,
        cache=rows,
        images=images,
        audio=audio,
        method="states",
    ).cache
    return constrain_cache(over_rows(put, cache, rows.paged(None)))


def _nothing(seen, where_B):
    """The rows as before their first token, where said."""

    def of(x):
        return jnp.where(where_B.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x)

    return jax.tree.map(of, seen).replace(valid_BU=seen.valid_BU)


def _states(model, kept, cache, tokens_BT, segments_BT, place, step=0):
    # What rows have from their length on, proposals that were refused, is not removed: a query
    # sees no later position, and before it sees one that position has been written again. Nor is
    # any proposal an image.
    return model.apply(
        {"params": choose(kept, place.adapters_B)}, tokens_BT,
        segment_ids_BT=segments_BT.astype(jnp.int32),
        cache=cache.replace(lengths_B=place.lengths_B + step), method="states",
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def write_tokens(model, params, kept, cache, inputs_BT, counts_B, place, tops_B, masks_BTW,
                 vocab_size, images_B, table_BN):  # fmt: skip
    """The program of `CachedModel.write`: the new cache, and what that returns."""
    B, T = inputs_BT.shape
    cache = cache.paged(table_BN)
    if images_B is not None:  # a text may lie where another request had images
        cache = cache.replace(seen=_nothing(cache.seen, ~images_B))
    segments_BT = jnp.arange(T) < counts_B[:, None]
    states = _states(model, kept, cache, inputs_BT, segments_BT, place)
    # From here on each token is a row: B T of them.
    hidden = states.hidden_BTD.reshape(B * T, 1, -1)
    keys = jax.vmap(place.keys, out_axes=1)(jnp.arange(T)).reshape(-1)
    sampling = jax.tree.map(lambda x: jnp.repeat(x, T), place.sampling)
    masks = masks_BTW.reshape(B * T, -1)
    params = choose(params, jnp.repeat(place.adapters_B, T))
    ids, logprobs, _, logits = next_ids(model, params, hidden, keys, sampling, vocab_size, masks)
    width = min(TOP, logits.shape[-1])

    def likeliest():
        known_V = jnp.arange(logits.shape[-1]) < vocab_size
        return jax.lax.top_k(jnp.where(known_V, jax.nn.log_softmax(logits), -jnp.inf), width)

    def nothing():
        return [jnp.zeros((B * T, width), logits.dtype), jnp.zeros((B * T, width), jnp.int32)]

    top_logprobs, top_ids = jax.lax.cond(jnp.any(tops_B > 0), likeliest, nothing)
    found = (x.reshape(B, T, *x.shape[1:]) for x in (ids, logprobs, top_ids, top_logprobs))
    return constrain_cache(states.cache.paged(None)), tuple(
        sharding.constrain(x, *[None] * x.ndim) for x in found
    )


@functools.partial(jax.jit, static_argnames=("model", "num_tokens"), donate_argnames="cache")
def _propose(model, params, kept, cache, last_B, limits_B, place, masks_BW, vocab_size, num_tokens,
             table_BN):  # fmt: skip
    cache = constrain_cache(cache.paged(table_BN))

    def step(carry, i):
        cache, last_B = carry
        segments_BT = (i <= limits_B)[:, None]
        states = _states(model, kept, cache, last_B[:, None], segments_BT, place, i)
        masks = jnp.where(i == 0, masks_BW, jnp.uint32(EVERY))
        ids_B, *_ = next_ids(
            model, params, states.hidden_BTD, place.keys(i), place.sampling, vocab_size, masks
        )
        # The model may fail, see `next_ids`, but its next input must be some id.
        return (states.cache, jnp.maximum(ids_B, 0)), ids_B

    # The last step draws nothing that is used: it brings its input into the cache.
    (cache, _), ids_TB = jax.lax.scan(step, (cache, last_B), jnp.arange(num_tokens + 1))
    return constrain_cache(cache.paged(None)), sharding.constrain(ids_TB[:num_tokens].T, None, None)

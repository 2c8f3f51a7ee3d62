"""Cached decoding equals the full forward pass, however the tokens are dealt out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs.schema import ModelConfig
from puna.models import bits, transformer
from puna.models import cache as cache_lib
from puna.models.kernels import blockwise
from puna.models.parallel import sharding

B, T, SLOTS = 3, 23, 32
CHUNK = 5

DENSE = ModelConfig(
    vocab_size=61, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, rope_theta=100.0, compute_dtype="float32",
)  # fmt: skip
# Five layers: a scanned period of two, of which one has no RoPE, twice, and a tail of one.
LLAMA4 = dataclasses.replace(
    DENSE, num_layers=5, nope_interval=2, chunk_size=CHUNK, qk_norm=True, temperature_scale=0.1,
    temperature_floor=4,
)  # fmt: skip
both = pytest.mark.parametrize("config", [DENSE, LLAMA4], ids=["dense", "llama4"])


def random_params(config):
    """Parameters that compile nothing, larger than a real start so that every layer counts."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.normal(size=shape.shape)
        x = 1 + 0.1 * x if "norm" in str(path[-2]) else 0.3 * x
        return jax.device_put(np.float32(x).astype(shape.dtype))

    shapes = sharding.unbox(transformer.abstract_params(config))
    return jax.tree.map_with_path(draw, shapes)


@functools.cache
def setup(config):
    """Compiled calls, random rows, and the logits of one full forward pass."""
    # Chunks, temperature and the like have no parameters: with them off these are the same.
    params = random_params(config)
    model = transformer.Transformer(config)
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (B, T), np.int32)
    full = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits_BTV)

    @jax.jit
    def extend(tokens, segments, cache):
        out = model.apply({"params": params}, tokens, segment_ids_BT=segments, cache=cache)
        return out.logits_BTV, out.cache

    return extend, tokens_BT, np.asarray(full(tokens_BT))


def empty(config, slots=SLOTS):
    return cache_lib.init_cache(config, B, slots)


def feed(config, cache, starts, counts, width, noise=0):
    """Give row b `counts[b]` tokens from `starts[b]`, padded on the right; check their logits."""
    extend, tokens_BT, want = setup(config)
    tokens = np.full((B, width), noise, np.int32)
    segments = np.zeros((B, width), np.int32)
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        tokens[b, :count] = tokens_BT[b, start : start + count]
        segments[b, :count] = 1
    logits, cache = extend(tokens, segments, cache)
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        np.testing.assert_allclose(
            logits[b, :count], want[b, start : start + count], atol=2e-5, rtol=2e-5
        )
    np.testing.assert_array_equal(cache.lengths_B, np.add(starts, counts))
    return cache


@both
@pytest.mark.parametrize(
    "pieces",
    [[T], [7, 9, 7], [12, *[1] * (T - 12)], [1] * T],
    ids=["whole", "pieces", "prefill-then-decode", "token-by-token"],
)
def test_any_pieces_give_the_full_forward(config, pieces):
    cache, start = empty(config), 0
    for n in pieces:
        # One token at a time takes a path of its own.
        cache = feed(config, cache, [start] * B, [n] * B, 1 if n == 1 else T)
        start += n
    assert start == T


@both
@given(st.data())
def test_rows_of_any_lengths_in_any_pieces(config, data):
    cache, starts = empty(config), np.zeros(B, int)
    while np.any(starts < T):
        counts = data.draw(st.lists(st.integers(0, 9), min_size=B, max_size=B))
        counts = np.minimum(counts, T - starts)
        if not counts.any():
            counts = np.minimum(9, T - starts)
        cache = feed(config, cache, starts, counts, T)
        starts = starts + counts


@both
def test_unequal_prompts_then_one_token_a_step(config):
    counts = np.array([12, 3, 0])
    cache = feed(config, empty(config), np.zeros(B, int), counts, T)
    for step in range(8):
        cache = feed(config, cache, counts + step, [1, 1, 1], 1)
    # A row that has ended stays as it is while the others go on.
    feed(config, cache, counts + 8, [1, 0, 1], 1)


@both
def test_padding_leaves_no_trace(config):
    caches = [feed(config, empty(config), [0] * B, [12, 3, 0], T, noise) for noise in (0, 60)]
    jax.tree.map(np.testing.assert_array_equal, *caches)


def test_the_features_are_on():
    """The comparisons above would pass if chunks and temperature did nothing."""
    want = setup(LLAMA4)[2]
    for off in ({"chunk_size": 0}, {"temperature_scale": 0.0}):
        other = setup(dataclasses.replace(LLAMA4, **off))[2]
        assert np.abs(other[:, -1] - want[:, -1]).max() > 1e-3, off


def test_a_chunked_layer_keeps_one_chunk():
    layers = empty(LLAMA4).layers
    slots = {
        f"{part}/{name}": layer.k_BSKH.shape[-3]
        for part, stack in layers.items()
        for name, layer in stack.items()
    }
    assert slots == {"blocks/layer_0": CHUNK, "blocks/layer_1": SLOTS, "tail/layer_0": CHUNK}
    # A text shorter than a chunk needs no more than its own length.
    short = empty(LLAMA4, slots=3).layers["blocks"]["layer_0"]
    assert short.k_BSKH.shape == (2, B, 3, 2, 8)


def test_no_slot_of_a_chunk_is_written_twice():
    """Which of two writers of one slot wins is not defined, whatever a CPU does."""
    cache = feed(LLAMA4, empty(LLAMA4), [0] * B, [T] * B, T)
    written = cache.layers["blocks"]["layer_0"].positions_BS[0]
    last_chunk = range(T // CHUNK * CHUNK, T)
    want = [p if (p := T // CHUNK * CHUNK + s) in last_chunk else -1 for s in range(CHUNK)]
    np.testing.assert_array_equal(written, [want] * B)


def test_a_cache_is_a_pytree_that_can_be_given_away():
    cache = jax.jit(lambda: empty(LLAMA4))()
    give = jax.jit(lambda c: jax.tree.map(lambda x: x + 1, c), donate_argnums=0)
    new = give(cache)
    assert new.layers["blocks"]["layer_0"].chunk_size == CHUNK
    assert jnp.all(new.lengths_B == 1)


def test_only_what_is_filled_is_read(monkeypatch):
    """NaN in the empty slots would come out of any product with them, whatever the mask."""
    monkeypatch.setattr(blockwise, "_BLOCK", 4)
    config = dataclasses.replace(LLAMA4, rope_theta=101.0)  # traced anew
    cache = feed(config, empty(config), [0] * B, [8] * B, T)

    def spoil(layer):
        unfilled = (jnp.arange(layer.positions_BS.shape[-1]) >= 12)[:, None, None]
        k, v = (jnp.where(unfilled, jnp.nan, x) for x in (layer.k_BSKH, layer.v_BSKH))
        return layer.replace(k_BSKH=k, v_BSKH=v)

    layers = jax.tree.map(
        spoil, cache.layers, is_leaf=lambda x: isinstance(x, cache_lib.LayerCache)
    )
    cache = feed(config, cache.replace(layers=layers), [8] * B, [1] * B, 1)
    feed(config, cache, [9] * B, [3] * B, T)


def test_bfloat16_as_its_bits_gives_the_same():
    config = dataclasses.replace(LLAMA4, compute_dtype="bfloat16")
    model = transformer.Transformer(config)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    kept = bits.view(params)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("uint16")}

    @jax.jit
    def both(params, kept, cache, tokens_BT):
        logits = [model.apply({"params": p}, tokens_BT).logits_BTV for p in (params, kept)]
        out = model.apply({"params": kept}, tokens_BT, cache=cache)
        return *logits, out.logits_BTV, out.cache

    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (B, T), np.int32)
    plain, packed, cached, cache = both(params, kept, empty(config), tokens_BT)
    assert cache.layers["blocks"]["layer_0"].k_BSKH.dtype == jnp.uint16
    np.testing.assert_array_equal(plain, packed)
    # Sums of another order, each rounded to 8 bits.
    assert np.abs(cached - plain).max() < 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@given(
    data=st.lists(
        st.floats(-(2**99), 2**99, width=32, allow_subnormal=False), min_size=8, max_size=8
    ),
    small=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_the_error_of_a_byte(dtype, data, small):
    x = np.array(data, np.float32).reshape(1, 2, 4)
    x[0, 1] *= small
    kept = cache_lib.Bytes.empty(x.shape, dtype).like(jnp.asarray(x))
    assert kept.values.dtype.itemsize == 1
    top = np.abs(x).max(-1, keepdims=True)
    bound = top / 254 if dtype == "int8" else np.maximum(np.abs(x) / 16, top / 448 / 1024)
    # A scale below the least normal number is 0.
    assert np.all(np.abs(kept.numbers() - x) <= 1.001 * bound + 448 * 1.2e-38)


# Root mean square, of the logits' own: these random parameters give 0.7%, 1.9% and 8.2%.
@pytest.mark.parametrize(
    "dtype, bound",
    [("float32", 1e-5), ("bfloat16", 0.01), ("int8", 0.025), ("float8_e4m3fn", 0.1)],
)
def test_logits_of_a_cache_of_fewer_bits(dtype, bound):
    """In pieces, across chunks: what leaves a chunk while it is read comes from the cache, too."""
    extend, tokens_BT, want = setup(LLAMA4)
    cache = cache_lib.init_cache(LLAMA4, B, SLOTS, dtype)
    found = []
    for start in range(0, T, 4):
        piece = tokens_BT[:, start : start + 4]
        logits, cache = extend(piece, np.ones_like(piece), cache)
        found.append(np.asarray(logits))
    error = np.concatenate(found, 1) - want
    assert bound / 20 < np.sqrt(np.mean(error**2) / np.mean(want**2)) < bound


def test_memory_of_a_cache_of_bytes():
    """A byte a number and four a head: 0.516 of bfloat16's at heads of 128."""
    config = dataclasses.replace(LLAMA4, head_dim=128)

    def size(dtype):
        layers = jax.eval_shape(lambda: cache_lib.init_cache(config, 2, 64, dtype)).layers
        kept = [(c.k_BSKH, c.v_BSKH) for c in jax.tree.leaves(
            layers, is_leaf=lambda x: isinstance(x, cache_lib.LayerCache))]  # fmt: skip
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))

    for dtype in ("int8", "float8_e4m3fn"):
        assert size(dtype) / size("bfloat16") == (128 + 4) / 256
    assert size("float32") == 2 * size("bfloat16")

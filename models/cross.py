"""Cross-attention: layers in which the tokens of a row attend to its images (Llama 3.2 Vision).

One token stands for an image. A token sees the images of the latest run of such tokens, each from
its own token on, up to the first token of the next run or the end of the document. A token that
sees none keeps its state, so a text does not depend on what it is batched with; under
`model.cross.imageless` its attention goes to all features of its row, as in transformers. Letters:
M images of a row, U their features.
"""

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from ..configs.schema import ModelConfig
from .cache import ImageCache, Seen, nothing_seen
from .fusion import Features, features_per_image
from .kernels import blockwise
from .layers import RMSNorm, contract, gate, normal, param, residual_std, zeros
from .masks import Tokens, visible
from .parallel import context, sharding
from .parallel.sharding import constrain


class Sight(flax.struct.PyTreeNode):
    """The images of each row, and who sees them by `masks.visible`.

    queries: of the row's tokens: how many images came so far, and the first of the run that is
    seen, counted from 1; 0 for none. keys: of the features: the number of their image, and the
    first of its run. sees_BT: whether a token sees anything. features_BUD: None where keys and
    values are in the cache already.
    """

    queries: Tokens
    keys: Tokens
    sees_BT: jax.Array
    features_BUD: jax.Array | None


def look(config: ModelConfig, tokens_BT, segments_BT, features: Features | None, seen: Seen | None):
    """Find out which token sees which image.

    Args:
      segments_BT: document of each token, 0 for padding.
      features: of all images of each row; None where an earlier call had them.
      seen: what `look` returned for the tokens of the rows before these, of a cache.

    Returns:
      The `Sight` of these tokens, and the new `Seen`.
    """
    B, T = tokens_BT.shape
    values_BUD = None
    if features is not None:
        values_BUD, valid_BU = features.values_BUD, features.valid_BU
        M = valid_BU.shape[1] // features_per_image(config.vision)
        seen = nothing_seen(M, valid_BU) if seen is None else seen.replace(valid_BU=valid_BU)
    assert seen is not None, "neither features nor a cache that has some"
    valid_BU = seen.valid_BU
    M = seen.runs_BM.shape[1]
    live_BT = segments_BT != 0
    image_BT = (tokens_BT == config.vision.token_id) & live_BT
    same_BT = jnp.pad(
        segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    after_image_BT = jnp.concatenate([seen.open_B[:, None], image_BT[:, :-1]], axis=1)
    count_BT = seen.count_B[:, None] + jnp.cumsum(image_BT, axis=1, dtype=jnp.int32)
    begins_BT = image_BT & ~(after_image_BT & same_BT)
    run_BT = jnp.maximum(_latest(begins_BT, count_BT), seen.run_B[:, None])
    # Those of earlier documents are not seen.
    before_BT = _latest(~same_BT, count_BT - image_BT)
    now_BT = jnp.where((run_BT > before_BT) & live_BT, run_BT, 0)
    # Image M is out of range: dropped.
    at = (jnp.arange(B)[:, None], jnp.where(image_BT, count_BT - 1, M))
    runs_BM = seen.runs_BM.at[at].set(now_BT, mode="drop")
    last_B = jnp.max(jnp.where(live_BT, jnp.arange(T), -1), axis=1)
    ends_B = jnp.take_along_axis(image_BT, jnp.maximum(last_B, 0)[:, None], axis=1)[:, 0]
    seen = seen.replace(
        count_B=count_BT[:, -1], run_B=run_BT[:, -1], runs_BM=runs_BM,
        open_B=jnp.where(last_B < 0, seen.open_B, ends_B),
    )  # fmt: skip
    number_BM = jnp.broadcast_to(jnp.arange(1, M + 1, dtype=jnp.int32), (B, M))
    there_BM = jnp.any(valid_BU.reshape(B, M, -1), axis=2)
    queries = Tokens(count_BT, now_BT)
    sees_BT = jnp.any(
        visible(queries, Tokens(number_BM, jnp.where(there_BM, runs_BM, 0)), 0), axis=2
    )
    number_BU, runs_BU = (
        jnp.repeat(x_BM, features_per_image(config.vision), axis=1) for x_BM in (number_BM, runs_BM)
    )
    keys = Tokens(number_BU, jnp.where(valid_BU, runs_BU, 0))
    return Sight(queries, keys, sees_BT, values_BUD), seen


def _latest(chosen_BT, values_BT):
    """The value at the latest chosen token, where values do not fall; 0 before the first."""
    return jax.lax.cummax(jnp.where(chosen_BT, values_BT, 0), axis=1)


def to_zigzag(sight: Sight) -> Sight:
    """The same for tokens in zig-zag order."""
    queries = jax.tree.map(context.to_zigzag, sight.queries)
    return sight.replace(queries=queries, sees_BT=context.to_zigzag(sight.sees_BT))


class CrossAttention(nn.Module):
    """Attention of tokens to the features of images, behind a gate; no RoPE."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, sight: Sight, cache: ImageCache | None):
        """Returns the output [B, T, D] and the layer's new cache."""
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        read, write = normal(D**-0.5), normal(residual_std(N * H, c))
        kv_names = ("embed", "kv_heads", "head_dim")
        wq_DNH = param(self, "wq_DNH", (D, N, H), ("embed", "heads", "head_dim"), read,
                       c.param_dtype)  # fmt: skip
        wo_NHD = param(self, "wo_NHD", (N, H, D), ("heads", "head_dim", "embed"), write,
                       c.param_dtype)  # fmt: skip
        q_BTNH = contract("BTD,DNH->BTNH", x_BTD, wq_DNH, c.compute_dtype)
        q_BTNH = RMSNorm(c, name="q_norm")(constrain(q_BTNH, "batch", "length", "act_heads", None))
        if sight.features_BUD is not None:
            wk_DKH = param(self, "wk_DKH", (D, K, H), kv_names, read, c.param_dtype)
            wv_DKH = param(self, "wv_DKH", (D, K, H), kv_names, read, c.param_dtype)
            k_BUKH = contract("BUD,DKH->BUKH", sight.features_BUD, wk_DKH, c.compute_dtype)
            v_BUKH = contract("BUD,DKH->BUKH", sight.features_BUD, wv_DKH, c.compute_dtype)
            k_BUKH, v_BUKH = (
                constrain(x, "batch", None, "act_kv_heads", None) for x in (k_BUKH, v_BUKH)
            )
            k_BUKH = RMSNorm(c, name="k_norm")(k_BUKH)
            kept = (k_BUKH, v_BUKH)
            cache = None if cache is None else cache.write(k_BUKH, v_BUKH)
        if cache is not None:
            kept = cache

        a_BTNH = _attend(c, q_BTNH, kept, sight.queries, sight.keys)
        if c.cross.imageless:
            everyone, all_keys = (
                jax.tree.map(jnp.ones_like, tokens) for tokens in (sight.queries, sight.keys)
            )
            all_BTNH = _attend(c, q_BTNH, kept, everyone, all_keys)
            a_BTNH = jnp.where(sight.sees_BT[:, :, None, None], a_BTNH, all_BTNH)
        y_BTD = contract("BTNH,NHD->BTD", a_BTNH, wo_NHD, c.compute_dtype)
        y_BTD = constrain(y_BTD, "batch", "residual_length", "act_embed")
        return gate(self, "gate_1", y_BTD, zeros, c), cache


def _attend(config: ModelConfig, q_BTNH, kept, queries: Tokens, keys: Tokens):
    """Attention to the images; each device has the whole of a row's features.

    Args:
      kept: keys and values [B, U, K, H], or the `ImageCache` that holds them.
    """
    cached = isinstance(kept, ImageCache)
    G = config.num_heads // config.num_kv_heads

    def local(q_BTNH, kept, queries, keys):
        if not cached:
            return blockwise.attend(q_BTNH, *kept, queries, keys)
        B, T, N, H = q_BTNH.shape
        q_BTKGH = q_BTNH.reshape(B, T, N // G, G, H)
        return blockwise.attend_parts(q_BTKGH, queries, [kept.part(keys)]).reshape(q_BTNH.shape)

    if not sharding.split_axes():
        return local(q_BTNH, kept, queries, keys)
    q_spec = sharding.activation(q_BTNH.shape, ("batch", "length", "act_heads", None))
    rows = sharding.activation(q_BTNH.shape[:2], ("batch", "length"))
    columns = sharding.activation(keys.positions_BT.shape, ("batch", None))
    if cached:
        kv_spec = kept.specs()
    else:
        one = sharding.activation(kept[0].shape, ("batch", None, "act_kv_heads", None))
        kv_spec = (one, one)
    return sharding.per_device(local, (q_spec, kv_spec, rows, columns), q_spec)(
        q_BTNH, kept, queries, keys
    )

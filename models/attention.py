"""Grouped-query attention of one layer: projections, RoPE or NoPE, cache, and the softmax."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..configs.schema import ModelConfig
from . import rope
from .cache import LayerCache
from .kernels import attention as kernels
from .kernels import blockwise
from .layers import add_bias, contract, normal, param, residual_std, rms_norm, zeros
from .masks import Tokens
from .parallel import context, sharding
from .parallel.sharding import constrain


class Attention(nn.Module):
    """Self-attention of one layer: causal, chunked where it has RoPE and the config has chunks."""

    config: ModelConfig
    use_rope: bool

    @nn.compact
    def __call__(self, x_BTD, tokens: Tokens, cache: LayerCache | None):
        """Returns the output [B, T, D] and the layer's new cache."""
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        project, write = normal(D**-0.5), normal(residual_std(N * H, c))
        kv_names = ("embed", "kv_heads", "head_dim")
        wq_DNH = param(self, "wq_DNH", (D, N, H), ("embed", "heads", "head_dim"), project,
                       c.param_dtype)  # fmt: skip
        wk_DKH = param(self, "wk_DKH", (D, K, H), kv_names, project, c.param_dtype)
        wv_DKH = param(self, "wv_DKH", (D, K, H), kv_names, project, c.param_dtype)
        wo_NHD = param(self, "wo_NHD", (N, H, D), ("heads", "head_dim", "embed"), write,
                       c.param_dtype)  # fmt: skip
        q_BTNH = contract("BTD,DNH->BTNH", x_BTD, wq_DNH, c.compute_dtype)
        k_BTKH = contract("BTD,DKH->BTKH", x_BTD, wk_DKH, c.compute_dtype)
        v_BTKH = contract("BTD,DKH->BTKH", x_BTD, wv_DKH, c.compute_dtype)
        q_BTNH = constrain(q_BTNH, "batch", "length", "act_heads", None)
        k_BTKH = constrain(k_BTKH, "batch", "length", "act_kv_heads", None)
        v_BTKH = constrain(v_BTKH, "batch", "length", "act_kv_heads", None)
        if c.attention_bias != "none":
            # One dim, not two: optimizers take what has two for a matrix. Q = N * H, M = K * H.
            bq_Q = param(self, "bq_Q", (N * H,), ("heads",), zeros, c.param_dtype)
            bk_M = param(self, "bk_M", (K * H,), ("kv_heads",), zeros, c.param_dtype)
            bv_M = param(self, "bv_M", (K * H,), ("kv_heads",), zeros, c.param_dtype)
            q_BTNH = add_bias(q_BTNH, bq_Q.reshape(N, H))
            k_BTKH, v_BTKH = (
                add_bias(x, b.reshape(K, H)) for x, b in ((k_BTKH, bk_M), (v_BTKH, bv_M))
            )

        if self.use_rope:
            angles_BTJ = rope.angles(tokens.positions_BT, rope.frequencies(c))
            q_BTNH, k_BTKH = rope.rotate(q_BTNH, angles_BTJ), rope.rotate(k_BTKH, angles_BTJ)
            if c.rope_attention_factor != 1.0:  # that of k is in the one of q
                q_BTNH = (q_BTNH * c.rope_attention_factor**2).astype(q_BTNH.dtype)
            if c.qk_norm:
                q_BTNH, k_BTKH = (rms_norm(x, None, c.norm_eps) for x in (q_BTNH, k_BTKH))
        elif c.temperature_scale:
            factor_BT = temperature(tokens.positions_BT, c)
            q_BTNH = (q_BTNH * factor_BT[:, :, None, None]).astype(q_BTNH.dtype)

        chunk_size = c.chunk_size if self.use_rope else 0
        if cache is None:
            a_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, tokens, chunk_size)
        else:
            a_BTNH, cache = attend_cached(q_BTNH, k_BTKH, v_BTKH, tokens, cache)
        y_BTD = contract("BTNH,NHD->BTD", a_BTNH, wo_NHD, c.compute_dtype)
        y_BTD = constrain(y_BTD, "batch", "residual_length", "act_embed")
        if c.attention_bias == "all":
            bo_D = param(self, "bo_D", (D,), ("norm",), zeros, c.param_dtype)
            y_BTD = add_bias(y_BTD, bo_D)
        return y_BTD, cache


def attend(q_BTNH, k_BTKH, v_BTKH, tokens: Tokens, chunk_size: int):
    """Attention of the tokens of a row to each other, each device computing its own part.

    Under context parallelism rows are in zig-zag order and a device gathers the keys of the row.
    """
    attend = functools.partial(kernels.attend, chunk_size=chunk_size)
    T = q_BTNH.shape[1]
    n = context.devices(T)

    def local(q, k, v, tokens):
        if n == 1:
            return attend(q, k, v, tokens, tokens, start=0)
        k, v, k_tokens = (jax.tree.map(lambda x: context.gather(x, n), x) for x in (k, v, tokens))
        halves = zip(
            *(jnp.split(x, 2, 1) for x in (q, tokens.positions_BT, tokens.segments_BT)),
            context.starts(n, T), strict=True,
        )  # fmt: skip
        return jnp.concatenate(
            [attend(q, k, v, Tokens(p, s), k_tokens, start=start) for q, p, s, start in halves],
            axis=1,
        )

    if not sharding.split_axes():
        return local(q_BTNH, k_BTKH, v_BTKH, tokens)
    length = "length" if n > 1 else None
    q_spec = sharding.activation(q_BTNH.shape, ("batch", length, "act_heads", None))
    kv_spec = sharding.activation(k_BTKH.shape, ("batch", length, "act_kv_heads", None))
    tokens_spec = sharding.activation(tokens.positions_BT.shape, ("batch", length))
    return sharding.per_device(local, (q_spec, kv_spec, kv_spec, tokens_spec), q_spec)(
        q_BTNH, k_BTKH, v_BTKH, tokens
    )


def attend_cached(q_BTNH, k_BTKH, v_BTKH, tokens: Tokens, cache: LayerCache):
    """Attention of new tokens to the cache and to each other, and the cache with them in it.

    A row of the cache is whole on every device that has one.
    """

    def local(q_BTNH, q_tokens, k_BTKH, v_BTKH, tokens, cache):
        cache, parts = cache.extend(k_BTKH, v_BTKH, tokens)
        B, T, N, H = q_BTNH.shape
        K = k_BTKH.shape[2]
        q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
        a_BTKGH = blockwise.attend_parts(q_BTKGH, q_tokens, parts, chunk_size=cache.chunk_size)
        return a_BTKGH.reshape(B, T, N, H), cache

    arrays = (q_BTNH, tokens, k_BTKH, v_BTKH, tokens, cache)
    if not sharding.split_axes():
        return local(*arrays)
    q_spec = sharding.activation(q_BTNH.shape, ("batch", "length", "act_heads", None))
    kv_spec = sharding.activation(k_BTKH.shape, ("batch", None, "act_kv_heads", None))
    q_rows = sharding.activation(q_BTNH.shape[:2], ("batch", "length"))
    rows = sharding.activation(q_BTNH.shape[:2], ("batch", None))
    caches = cache.specs()
    in_specs = (q_spec, q_rows, kv_spec, kv_spec, rows, caches)
    return sharding.per_device(local, in_specs, (q_spec, caches))(*arrays)


def temperature(positions_BT, config: ModelConfig):
    """Factor on the queries of a NoPE layer, growing with the position (Llama 4).

    1 + scale * log(1 + floor((position + 1) / floor)); exactly 1 for the first positions.
    """
    steps = (positions_BT + 1) // config.temperature_floor
    return 1.0 + config.temperature_scale * jnp.log1p(steps.astype(jnp.float32))

"""The encoder of tiles and of sound: pre-LN layers with GELU and full attention.

It is the encoder of Llama 4's vision tower (after ViT, arXiv 2010.11929), between a LayerNorm at
each end; audio uses the same. Positions come in as RoPE angles, one set for every row. The layers
are those of Llama 3.2's tower too (`tiled_vision`), which has no RoPE and no biases in attention.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..configs.architecture import AudioConfig, ModelConfig, VisionConfig
from . import rope
from .kernels.blockwise import attend
from .layers import add_bias, contract, gate, normal, ones, param, zeros
from .masks import Tokens
from .parallel.sharding import constrain
from .remat import rematerialized

# torch's default, which Llama 4 keeps whatever its config says.
_EPS = 1e-5


def gelu(x):
    """Gaussian error linear unit by erf, in float32, back in x's dtype (arXiv 1606.08415)."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last dim, in float32 (arXiv 1607.06450)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        shape, dtype = x_BTD.shape[-1:], self.config.param_dtype
        scale_D = param(self, "scale_D", shape, ("norm",), ones, dtype).astype(jnp.float32)
        bias_D = param(self, "bias_D", shape, ("norm",), zeros, dtype).astype(jnp.float32)
        y_BTD = x_BTD.astype(jnp.float32)
        y_BTD -= jnp.mean(y_BTD, axis=-1, keepdims=True)
        y_BTD *= jax.lax.rsqrt(jnp.mean(y_BTD * y_BTD, axis=-1, keepdims=True) + _EPS)
        return (y_BTD * scale_D + bias_D).astype(x_BTD.dtype)


class SelfAttention(nn.Module):
    """Every token of a row attends to every token of it that it sees.

    Args of the call:
      angles_1TJ: see `Encoder`; None leaves RoPE out, and the biases of the projections.
      queries, keys: the same tokens as what attends and as what is attended to.
    """

    config: ModelConfig
    sizes: VisionConfig | AudioConfig

    @nn.compact
    def __call__(self, x_BTD, angles_1TJ, queries: Tokens, keys: Tokens):
        c, D, N = self.config, self.sizes.embed_dim, self.sizes.num_heads
        H = D // N
        read, write = normal(D**-0.5), normal(_residual_std(self.sizes, D))

        def project(name):
            w_DNH = param(self, f"w{name}_DNH", (D, N, H), ("embed", "heads", "head_dim"), read,
                          c.param_dtype)  # fmt: skip
            x_BTNH = contract("BTD,DNH->BTNH", x_BTD, w_DNH, c.activation_dtype)
            x_BTNH = constrain(x_BTNH, "batch", None, "act_heads", None)
            if angles_1TJ is None:
                return x_BTNH
            # One dim, not two: optimizers take what has two for a matrix.
            b_D = param(self, f"b{name}_D", (D,), ("heads",), zeros, c.param_dtype)
            return add_bias(x_BTNH, b_D.reshape(N, H))

        q_BTNH, k_BTNH, v_BTNH = (project(name) for name in "qkv")
        if angles_1TJ is not None:
            q_BTNH, k_BTNH = rope.rotate(q_BTNH, angles_1TJ), rope.rotate(k_BTNH, angles_1TJ)
        a_BTNH = attend(q_BTNH, k_BTNH, v_BTNH, queries, keys)
        wo_NHD = param(self, "wo_NHD", (N, H, D), ("heads", "head_dim", "embed"), write,
                       c.param_dtype)  # fmt: skip
        y_BTD = contract("BTNH,NHD->BTD", a_BTNH, wo_NHD, c.activation_dtype)
        y_BTD = constrain(y_BTD, "batch", None, "act_embed")
        if angles_1TJ is None:
            return y_BTD
        bo_D = param(self, "bo_D", (D,), ("norm",), zeros, c.param_dtype)
        return add_bias(y_BTD, bo_D)


def half_open(key, shape, dtype):
    """Initializer of the gates of encoders."""
    return jnp.full(shape, jnp.pi / 4, dtype)


class MLP(nn.Module):
    """down(gelu(up x)) with biases."""

    config: ModelConfig
    sizes: VisionConfig | AudioConfig

    @nn.compact
    def __call__(self, x_BTD):
        c, D, F = self.config, self.sizes.embed_dim, self.sizes.mlp_dim
        read, write = normal(D**-0.5), normal(_residual_std(self.sizes, F))
        w_up_DF = param(self, "w_up_DF", (D, F), ("embed", "mlp"), read, c.param_dtype)
        b_up_F = param(self, "b_up_F", (F,), ("mlp",), zeros, c.param_dtype)
        w_down_FD = param(self, "w_down_FD", (F, D), ("mlp", "embed"), write, c.param_dtype)
        b_down_D = param(self, "b_down_D", (D,), ("norm",), zeros, c.param_dtype)
        h_BTF = contract("BTD,DF->BTF", x_BTD, w_up_DF, c.activation_dtype)
        h_BTF = gelu(add_bias(constrain(h_BTF, "batch", None, "act_mlp"), b_up_F))
        y_BTD = contract("BTF,FD->BTD", h_BTF, w_down_FD, c.activation_dtype)
        return add_bias(constrain(y_BTD, "batch", None, "act_embed"), b_down_D)


class EncoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and a residual connection, with a gate if `gated`."""

    config: ModelConfig
    sizes: VisionConfig | AudioConfig
    gated: bool = False

    @nn.compact
    def __call__(self, x_BTD, angles_1TJ, queries, keys):
        c, sizes = self.config, self.sizes

        def gated(name, y_BTD):
            return gate(self, f"{name}_gate_1", y_BTD, half_open, c) if self.gated else y_BTD

        h_BTD = LayerNorm(c, name="attention_norm")(x_BTD)
        attention = SelfAttention(c, sizes, name="attention")
        x_BTD += gated("attention", attention(h_BTD, angles_1TJ, queries, keys))
        h_BTD = LayerNorm(c, name="mlp_norm")(x_BTD)
        return x_BTD + gated("mlp", MLP(c, sizes, name="mlp")(h_BTD)), None


class Encoder(nn.Module):
    """Norm, the scanned layers, norm.

    Args of the call:
      x_BTD: in the compute dtype; B is split like the batch of the model.
      angles_1TJ: float32 radians by which the J = H / 2 pairs of a head turn.
      valid_BT: whether a token is there; the others see nothing and are not seen.
    """

    config: ModelConfig
    sizes: VisionConfig | AudioConfig

    @nn.compact
    def __call__(self, x_BTD, angles_1TJ, valid_BT):
        # All positions are equal, so the causal mask hides nothing.
        tokens = Tokens(jnp.zeros(valid_BT.shape, jnp.int32), valid_BT.astype(jnp.int32))
        x_BTD = LayerNorm(self.config, name="norm_in")(x_BTD)
        x_BTD = constrain(x_BTD, "batch", None, "act_embed")
        scan = nn.scan(
            rematerialized(EncoderLayer, self.config),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.sizes.num_layers,
            metadata_params={nn.meta.PARTITION_NAME: "encoder_layers"},
        )
        x_BTD, _ = scan(self.config, self.sizes, name="blocks")(x_BTD, angles_1TJ, tokens, tokens)
        return LayerNorm(self.config, name="norm_out")(x_BTD)


def _residual_std(sizes, fan_in):
    # As in the text model: two writes to the residual stream a layer (GPT-2).
    return (2 * sizes.num_layers * fan_in) ** -0.5

"""The parameter helper, the matmul and the small layers: RMSNorm, Embed, SwiGLU.

Parameters are stored in `param_dtype`, or as another kind of `leaf`; every contraction rounds its
operands to a dtype, `compute_dtype` in the layers and `activation_dtype` elsewhere, and accumulates
in float32, forward and backward. What 8 bits are is in `eight_bits`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ..configs.architecture import EIGHT_BITS, activation_dtype
from ..configs.schema import ModelConfig
from . import bits, eight_bits
from .adapters import Adapted, factor_names, is_adapted
from .leaf import dense, numbers, resolve, settle
from .parallel import sharding
from .parallel.sharding import Param, constrain
from .quantize import Grouped, Int4
from .remat import PRODUCT
from .turned import Turned


def param(module: nn.Module, name: str, shape, names, init, dtype):
    """Declare a parameter: its shape, the logical name of each dim and its initializer together.

    Where the parameters hold another kind of leaf, that leaf is returned.
    """
    held = module.get_variable("params", name)
    if isinstance(base := held.base if isinstance(held, Adapted) else held, Grouped | Turned):
        # Flax would compare the shapes of what is held.
        assert base.shape == shape, f"{name} {base.shape}, not {shape}"
        return settle(bits.unpack(held))
    value = module.param(name, lambda key: Param(init(key, shape, jnp.dtype(dtype)), names))
    return settle(bits.unpack(value))


def normal(std: float):
    """Normal initializer of the given standard deviation."""

    def init(key, shape, dtype):
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return init


def ones(key, shape, dtype):
    """Initializer of norm scales."""
    return jnp.ones(shape, dtype)


def zeros(key, shape, dtype):
    """Initializer of biases, and of gates that begin closed."""
    return jnp.zeros(shape, dtype)


def add_bias(x, bias):
    """x + bias in float32, back in x's dtype."""
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def contract(
    spec: str, x, w, dtype: str, out_dtype: str | None = None,
    split: tuple[str | None, str | None] = (None, None),
):  # fmt: skip
    """Einsum of an activation with a weight, accumulated in float32.

    Args:
      spec: einsum string such as "BTD,DF->BTF"; a letter of an operand stands in the
        other operand, in the result, or in both.
      x: activation.
      w: weight: an array in any float dtype, or another kind of leaf.
      dtype: what both are rounded to: "float32", "bfloat16", or a kind of `eight_bits`.
      out_dtype: of the result; `dtype` where left out, but bfloat16 for 8 bits.
      split: in a `shard_map`, the mesh axes over which the dim lies that is summed over, and the
        dim of w that is not; scales of 8 bits are of whole dims.

    Split the result (`constrain`) before anything else is done with it: where the compiler had to
    choose how, it has been seen to lose partial sums.

    The gradient has its own rule because plain autodiff of `preferred_element_type=float32`
    multiplies a float32 cotangent with a bfloat16 operand, which no hardware does fast. The
    gradient of `w` comes back unrounded in w's dtype.
    """
    weight = resolve(w)
    if weight.scale is None and weight.a is None:
        y = _contract(spec, x, weight.values, dtype, out_dtype, split)
        return checkpoint_name(y, PRODUCT)
    y = _contract(spec, x, weight.values, dtype, "float32", split)
    rest = activation_dtype(dtype)  # of adapters, which are narrow
    if weight.scale is not None:
        y *= _beside(spec, weight.scale)
    if weight.a is not None and weight.b is not None:
        terms, out = spec.split("->")
        left, letters = terms.split(",")
        a, b = factor_names(letters, weight.a.ndim, weight.b.ndim)
        low = "".join(letter for letter in left if letter in out) + "r"
        assert weight.counts_Br is None or left[0] == "B", "rows of x have an adapter each"
        x_low = weight.low(_contract(f"{left},{a}->{low}", x, weight.a, rest, None))
        y += _contract(f"{low},{b}->{out}", x_low, weight.b, rest, "float32")
    if weight.gain is not None:
        y *= _beside(spec, weight.gain)
    return checkpoint_name(y.astype(out_dtype or rest), PRODUCT)


def _beside(spec, scale):
    """The scale of a weight in the dims of the product that `spec` says."""
    terms, out = spec.split("->")
    return eight_bits.beside(terms.split(",")[1], out, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def _contract(spec, x, w, dtype, out_dtype, split=(None, None)):
    if dtype in EIGHT_BITS:
        kind = eight_bits.FORMATS[dtype].forward
        y = eight_bits.einsum(spec, x, numbers(w), kind, kind, split[0])
    elif isinstance(w, Turned) and w.is_for(x):
        y = w.times(x, dtype)
    elif isinstance(w, Int4) and sharding.platform() == "cpu" and (summed := _one_row(spec, x)):
        y = w.times_row(x.astype(dtype).astype(jnp.float32), summed)
        y = y.reshape(*x.shape[: x.ndim - summed], *y.shape)
    else:
        y = _dot(spec, x, w, dtype)
    return y.astype(out_dtype or activation_dtype(dtype))


def _one_row(spec, x) -> int:
    """How many dims are summed over, if they are x's last, w's first and x is one row; else 0."""
    left, right = spec.split("->")[0].split(",")
    summed = sum(letter in left for letter in right)
    is_row = left[len(left) - summed :] == right[:summed] and math.prod(x.shape[:-summed]) == 1
    return summed if is_row and not sharding.split_axes() else 0


def _dot(spec, a, b, dtype):
    # HIGHEST keeps float32 operands float32 where the hardware would round them to bfloat16.
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return jnp.einsum(
        spec, numbers(a).astype(dtype), numbers(b).astype(dtype),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _contract_fwd(spec, x, w, dtype, out_dtype, split):
    return _contract(spec, x, w, dtype, out_dtype, split), (x, w)


def _contract_bwd(spec, dtype, out_dtype, split, saved, g):
    x, w = saved
    terms, out = spec.split("->")
    a, b = terms.split(",")
    back = f"{out},{b}->{a}"
    if dtype in EIGHT_BITS:
        kinds = eight_bits.FORMATS[dtype]
        dx = eight_bits.einsum(back, g, numbers(w), kinds.backward, kinds.forward, split[1])
    else:
        dx = _dot(back, g, w, dtype)
    dx = dx.astype(x.dtype)
    if isinstance(w, Grouped | Turned) or not jnp.issubdtype(w.dtype, jnp.floating):
        return dx, None
    dw = _dot(f"{a},{out}->{b}", x, g, activation_dtype(dtype)).astype(w.dtype)
    return dx, dw


_contract.defvjp(_contract_fwd, _contract_bwd)


def rms_norm(x, scale, eps: float):
    """x / rms(x) * scale over the last dim, in float32, back in x's dtype (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    return y.astype(x.dtype)


def gate(module: nn.Module, name: str, y, init, config: ModelConfig):
    """tanh(g) * y, with g a parameter of one number, in y's dtype."""
    g_1 = param(module, name, (1,), ("norm",), init, config.param_dtype)
    return (jnp.tanh(g_1.astype(jnp.float32)) * y.astype(jnp.float32)).astype(y.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        scale_D = param(self, "scale_D", x_BTD.shape[-1:], ("norm",), ones, c.param_dtype)
        return rms_norm(x_BTD, scale_D, c.norm_eps)


class Embed(nn.Module):
    """The table of token embeddings."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT):
        """Rows [B, T, D]; an id outside the vocabulary gives NaN, not a neighbour's row."""
        c = self.config
        shape, std = (c.embedding_rows, c.embed_dim), c.embed_dim**-0.5
        table_VD = param(self, "table_VD", shape, ("vocab", "embed"), normal(std), c.param_dtype)
        x_BTD = look_up(table_VD, jnp.asarray(tokens_BT), c.activation_dtype)
        return constrain(x_BTD, "batch", "length", "act_embed")


def look_up(table_VD, tokens_BT, dtype: str):
    """Rows of a table, a leaf of any kind, in `dtype`; NaN for an id that it does not have.

    The gradient has its own rule because it adds up the tokens of one id in float32: thousands of
    them, each too small to change a sum in bfloat16.
    """
    weight = resolve(table_VD)
    if weight.scale is None:
        rows_BTD = _look_up(numbers(weight.values), tokens_BT, dtype, "embed")
    else:
        # One byte a number is moved, and not the table in another dtype.
        values_VD = constrain(weight.values, "vocab", None)
        scale_V1 = constrain(weight.scale, "vocab", None)
        rows_BTD = values_VD.at[tokens_BT].get(mode="fill", fill_value=0)
        rows_BTD = rows_BTD * scale_V1.at[tokens_BT].get(mode="fill", fill_value=jnp.nan)
    if weight.a is not None:
        low_BTr = weight.low(_look_up(weight.a, tokens_BT, dtype, "rank"))
        rows_BTD += _contract("BTr,rD->BTD", low_BTr, weight.b, dtype, "float32")
    if weight.gain is not None:
        rows_BTD *= weight.gain[0]
    return rows_BTD.astype(dtype)


def widen(x_BTD, w_DV, dtype: str):
    """The product with a leaf of any kind as one with an array.

    Returns:
      (x', w') such that x' w' = x w: x with what A makes of it beside it, the base with B below it,
      and zeros up to a number of rows that splits as D does.
    """
    weight = resolve(w_DV)
    base_DV = dense(w_DV.base if is_adapted(w_DV) else w_DV)
    if weight.a is None or weight.b is None:
        return x_BTD, base_DV
    low_BTr = _contract("BTD,Dr->BTr", x_BTD, weight.a, dtype, None).astype(x_BTD.dtype)
    low_BTr = weight.low(low_BTr)
    missing = -low_BTr.shape[-1] % sharding.parts("embed")
    low_BTr = jnp.pad(low_BTr, ((0, 0), (0, 0), (0, missing)))
    b_rV = jnp.pad(weight.b, ((0, missing), (0, 0)))
    w_DV = jnp.concatenate([base_DV, b_rV], 0)
    return jnp.concatenate(
        [x_BTD, low_BTr], -1
    ), w_DV if weight.gain is None else w_DV * weight.gain


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table_VD, tokens_BT, dtype, width):
    # Gathered along D first: rows can then be looked up where the tokens are.
    rows_VD = bits.pack(constrain(jnp.asarray(table_VD, dtype), "vocab", "act_embed"))
    nan = np.array(np.nan, dtype).view(rows_VD.dtype)[()]
    return bits.unpack(rows_VD.at[tokens_BT].get(mode="fill", fill_value=nan))


def _look_up_fwd(table_VD, tokens_BT, dtype, width):
    return _look_up(table_VD, tokens_BT, dtype, width), (table_VD, tokens_BT)


def _look_up_bwd(dtype, width, saved, g_BTD):
    table_VD, tokens_BT = saved
    zeros_VD = constrain(jnp.zeros(table_VD.shape, jnp.float32), "vocab", "act_embed")
    d_VD = zeros_VD.at[tokens_BT].add(g_BTD.astype(jnp.float32), mode="drop")
    return constrain(d_VD, "vocab", width).astype(table_VD.dtype), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Unembed(nn.Module):
    """The output projection [D, V] of a model that does not tie it to the embedding."""

    config: ModelConfig

    @nn.compact
    def __call__(self):
        c = self.config
        shape, std = (c.embed_dim, c.vocab_size), c.embed_dim**-0.5
        return param(self, "table_DV", shape, ("embed", "vocab"), normal(std), c.param_dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv 2002.05202), with biases if the config has them."""

    config: ModelConfig
    hidden_dim: int

    @nn.compact
    def __call__(self, x_BTD):
        c, F = self.config, self.hidden_dim
        D = c.embed_dim
        up, down = normal(D**-0.5), normal(residual_std(F, c))
        w_gate_DF = param(self, "w_gate_DF", (D, F), ("embed", "mlp"), up, c.param_dtype)
        w_up_DF = param(self, "w_up_DF", (D, F), ("embed", "mlp"), up, c.param_dtype)
        w_down_FD = param(self, "w_down_FD", (F, D), ("mlp", "embed"), down, c.param_dtype)
        gate_BTF = contract("BTD,DF->BTF", x_BTD, w_gate_DF, c.compute_dtype)
        up_BTF = contract("BTD,DF->BTF", x_BTD, w_up_DF, c.compute_dtype)
        gate_BTF, up_BTF = (constrain(x, "batch", "length", "act_mlp") for x in (gate_BTF, up_BTF))
        if c.mlp_bias:
            b_gate_F, b_up_F = (
                param(self, name, (F,), ("mlp",), zeros, c.param_dtype)
                for name in ("b_gate_F", "b_up_F")
            )
            gate_BTF, up_BTF = add_bias(gate_BTF, b_gate_F), add_bias(up_BTF, b_up_F)
        y_BTD = contract("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), w_down_FD, c.compute_dtype)
        y_BTD = constrain(y_BTD, "batch", "residual_length", "act_embed")
        if not c.mlp_bias:
            return y_BTD
        return add_bias(y_BTD, param(self, "b_down_D", (D,), ("norm",), zeros, c.param_dtype))


def swiglu(gate, up):
    """silu(gate) * up in float32, back in the operands' dtype."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def residual_std(fan_in: int, config: ModelConfig) -> float:
    """Standard deviation of a matrix that writes to the residual stream, 2 a layer (GPT-2)."""
    return (2 * config.num_layers * fan_in) ** -0.5

"""Memory of generation: weights and the key/value cache, by shapes alone."""

import jax

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from ...models import quantize
from ...models.cache import LayerCache, init_cache
from ...models.parallel.sharding import Param
from ...models.transformer import abstract_params
from .figures import Figure

KINDS = ("none", "int8", "int4")
_GROUP = 128  # weights of an int4 matrix that share a bfloat16 scale, as GPTQ and AWQ have it


def weight_bytes(config: ModelConfig, kind: str) -> tuple[int, int]:
    """Bytes of all weights, and of them those of scales.

    Args:
      kind: "none" keeps bfloat16; "int8" is `models.quantize`; "int4" has half a byte a weight and
        a bfloat16 scale for each 128 in the same matrices.
    """
    values = scales = 0
    boxed = quantize.box_int8(abstract_params(config))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, Param | quantize.Int8))
    for leaf in leaves:
        if isinstance(leaf, Param):
            values += 2 * leaf.value.size
        elif kind == "none":
            values += 2 * leaf.values.value.size
        elif kind == "int8":
            values += leaf.values.value.size
            scales += 4 * leaf.scale.value.size
        else:
            values += -(-leaf.values.value.size // 2)
            scales += 2 * -(-leaf.values.value.size // _GROUP)
    return values + scales, scales


def cache_bytes(config: ModelConfig, batch: int, context: int) -> tuple[int, int]:
    """Bytes of all keys and values in bfloat16, and of the positions beside them."""
    cache = jax.eval_shape(lambda: init_cache(config, batch, context, "bfloat16"))
    layers = jax.tree.leaves(cache.layers, is_leaf=lambda x: isinstance(x, LayerCache))
    kept = sum(x.size * x.dtype.itemsize for c in layers for x in (c.k_BSKH, c.v_BSKH))
    return kept, sum(c.positions_BS.size * 4 for c in layers)


def memory(config: ModelConfig, batch: int, context: int, kind: str, devices: int, limit: int):
    """What generation holds.

    Args:
      batch: rows at one time.
      context: tokens of a row, prompt and answer.
      kind: one of KINDS.
      devices: how many share it.
      limit: bytes of one.

    Returns:
      Figures by name, and the bytes that one device lacks (negative: has left).

    Raises:
      UserError: a value that cannot be.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if kind not in KINDS:
        raise UserError(f"--quantize={kind} must be one of {', '.join(KINDS)}")
    weights, scales = weight_bytes(config, kind)
    kept, positions = cache_bytes(config, batch, context)
    each = -(-(weights + kept + positions) // devices)
    origin = "modelled" if kind == "int4" else "counted"
    rows = "a row" if batch == 1 else f"{batch} rows"
    found = {
        "weights": Figure(weights, "bytes", origin, f"{kind}, scales {scales:,} bytes"),
        "cache": Figure(kept, "bytes", "counted", f"keys and values of {rows}, {context:,} tokens"),
        "cache_positions": Figure(positions, "bytes", "counted"),
        "per_device": Figure(each, "bytes", origin if devices == 1 else "modelled",
                             "even share; without activations"),
        "limit": Figure(limit, "bytes", "published"),
        "headroom": Figure(limit - each, "bytes", "modelled", "for activations"),
    }  # fmt: skip
    return found, each - limit

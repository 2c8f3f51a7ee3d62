"""Generation by shapes alone: weights, the key/value cache, and bounds of its speed."""

import jax

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from ...models import quantize
from ...models.cache import LayerCache, init_cache
from ...models.hardware import Chip
from ...models.parallel import sharding
from ...models.transformer import abstract_params, count_params
from ..metrics import active_params
from .figures import Figure, shown
from .timing import product_rate

KINDS = ("none", *quantize.KINDS)


def weight_bytes(config: ModelConfig, kind: str) -> tuple[int, int]:
    """Bytes of all weights, and of them those of scales and offsets.

    Args:
      kind: "none" keeps bfloat16; the others are those of `models.quantize`.
    """
    boxed = abstract_params(config)
    plain = sum(2 * x.size for x in jax.tree.leaves(sharding.unbox(boxed)))
    if kind == "none":
        return plain, 0
    values = scales = 0
    leaves = jax.tree.leaves(quantize.box(boxed, kind), is_leaf=quantize.is_quantized)
    for leaf in leaves:
        if quantize.is_quantized(leaf):
            first, *rest = (x.value for x in jax.tree.leaves(leaf, is_leaf=_is_param))
            values += first.size
            scales += sum(x.size * x.dtype.itemsize for x in rest)
        else:
            values += 2 * leaf.size
    return values + scales, scales


def _is_param(x) -> bool:
    return isinstance(x, sharding.Param)


def cache_bytes(config: ModelConfig, batch: int, context: int) -> tuple[int, int]:
    """Bytes of all keys and values in bfloat16, and of the positions beside them."""
    cache = jax.eval_shape(lambda: init_cache(config, batch, context, "bfloat16"))
    layers = jax.tree.leaves(cache.layers, is_leaf=lambda x: isinstance(x, LayerCache))
    kept = sum(x.size * x.dtype.itemsize for c in layers for x in (c.k_BSKH, c.v_BSKH))
    return kept, sum(c.positions_BS.size * 4 for c in layers)


def plan(
    config: ModelConfig, batch: int, context: int, kind: str, devices: int, limit: int,
    chip: Chip | None,
) -> tuple[dict[str, Figure], bool, str]:  # fmt: skip
    """What generation holds, and bounds of its speed.

    Args:
      batch: rows at one time.
      context: tokens of a row, prompt and answer.
      kind: one of KINDS, or "auto": the first of them that fits, else the last.
      devices: how many share it.
      limit: bytes of one.
      chip: of the devices; None = without bounds.

    Returns:
      Figures by name, whether it fits, and the same in a line.

    Raises:
      UserError: a value that cannot be.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if kind not in (*KINDS, "auto"):
        raise UserError(f"--quantize={kind} must be one of {', '.join(KINDS)}, auto")
    found: dict[str, Figure] = {}
    lacking = 0.0
    for each in KINDS if kind == "auto" else (kind,):
        found, lacking = _memory(config, batch, context, each, devices, limit)
        kind = each
        if lacking <= 0:
            break
    line = verdict(found["per_device"], limit, lacking)
    if lacking > 0:
        more = -(-found["per_device"].value * devices // limit)
        smaller = "" if kind in quantize.GROUPS else ", --quantize=int4"
        line += f"; try {more:.0f} devices{smaller}, a shorter --context or --batch"
    elif kind != "none":
        line += f", weights in {kind}"
    if chip is not None:
        found |= _bounds(config, batch, context, kind, found, devices, chip)
    return found, lacking <= 0, line


def _bounds(config, batch, context, kind, found, devices, chip):
    """Least seconds of a prompt and of a token, of devices that share all of it evenly."""
    flops = 2 * active_params(config) * batch * context
    keys = 0.0
    for layer in filter(lambda i: not config.is_cross(i), range(config.num_layers)):
        chunked = config.chunk_size and config.uses_rope(layer)
        keys += min(context, config.chunk_size if chunked else context) / 2
    flops += 4 * config.num_heads * config.head_dim * keys * batch * context
    prefill = flops / devices / chip.products
    # The experts that no row of the batch has chosen are not read.
    whole, active = count_params(config), active_params(config)
    share = min(1.0, active / whole * batch)
    read = found["weights"].value * share + found["cache"].value
    token = read / devices / chip.memory_bandwidth
    rows = f"a token of each of {batch} rows" if batch > 1 else "a token"
    return {
        "prefill_flops": Figure(flops, "FLOPs", "modelled", f"{context:,} tokens a row"),
        "product_rate": product_rate(chip),
        "prefill_time": Figure(prefill, "s", "modelled", "at least: FLOPs / that rate"),
        "decode_traffic": Figure(
            read, "bytes", "modelled", f"{rows}: weights in use and the whole cache"
        ),
        "decode_time": Figure(token, "s", "modelled", "at least: traffic / bandwidth"),
        "decode_tokens_per_second": Figure(batch / token, "", "modelled", "at most"),
    }


def verdict(needs: Figure, limit: int, lacking: float) -> str:
    """Whether it fits, in words."""
    if lacking > 0:
        return f"does not fit: {room(needs, limit)}, {shown(lacking, 'bytes')} too much"
    return f"fits: {room(needs, limit)}"


def room(needs: Figure, limit: int) -> str:
    """`3 GiB of 16 GiB a device (compiled)`."""
    shares = f"{shown(needs.value, needs.unit)} of {shown(limit, needs.unit)}"
    return f"{shares} a device ({needs.origin})"


def _memory(config, batch, context, kind, devices, limit):
    """Figures by name, and the bytes that one device lacks (negative: has left)."""
    weights, scales = weight_bytes(config, kind)
    kept, positions = cache_bytes(config, batch, context)
    each = -(-(weights + kept + positions) // devices)
    rows = "a row" if batch == 1 else f"{batch} rows"
    found = {
        "weights": Figure(weights, "bytes", "counted", f"{kind}, scales {scales:,} bytes"),
        "cache": Figure(kept, "bytes", "counted", f"keys and values of {rows}, {context:,} tokens"),
        "cache_positions": Figure(positions, "bytes", "counted"),
        "per_device": Figure(each, "bytes", "counted" if devices == 1 else "modelled",
                             "even share; without activations"),
        "limit": Figure(limit, "bytes", "published"),
        "headroom": Figure(limit - each, "bytes", "modelled", "for activations"),
    }  # fmt: skip
    return found, each - limit

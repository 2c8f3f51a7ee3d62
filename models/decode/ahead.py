"""The engine's two programs over shapes alone, to be compiled for devices that are not here.

They are the functions that `cached_model.CachedModel` calls, with the parameters, the cache and the
places that `load` and `slots.Engine` would give them. Weights that `turned.turn` would turn on one
CPU are left as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ...configs.schema import ModelConfig
from .. import bits, quantize
from ..cache import init_cache
from ..parallel import sharding
from ..transformer import Transformer, abstract_params
from .cached_model import Place, read_piece, write_tokens
from .engine import cache_specs, for_decoding
from .pages import PAGE, counts
from .sampling import Sampling, per_row
from .slots import PIECES


class Programs(NamedTuple):
    """What an engine compiles, lowered: a long piece of a prompt, and a token of every slot."""

    prefill: jax.stages.Lowered
    decode: jax.stages.Lowered


def abstract_inputs(config: ModelConfig, mesh, num_slots: int, max_length: int, kind: str = "",
                    cache_dtype: str = ""):  # fmt: skip
    """The parameters and the cache of an engine: shapes, dtypes and places.

    Args:
      config: parameters that are not quantised have its `param_dtype`.
      mesh: any kind of mesh.
      num_slots, max_length, cache_dtype: see `slots.Engine`.
      kind: of quantised weights, one of `quantize.KINDS`; empty for none.

    Raises:
      ConfigError: the mesh does not split a parameter or the cache.
    """
    boxed = abstract_params(config)
    if kind:
        boxed = quantize.box(boxed, kind)
    params = _placed(sharding.unbox(boxed), sharding.shardings(boxed, mesh))
    rows = num_slots + -num_slots % sharding.parts("batch", mesh)
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        parts = sharding.parts("batch", mesh)
        pages = counts(rows, max_length, parts)[1] * parts, PAGE
        cache = jax.eval_shape(
            lambda: init_cache(config, rows, max_length, cache_dtype, pages=pages)
        )
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(cache))
    return params, _placed(cache, places)


def lower(config: ModelConfig, mesh, params, cache, max_length: int) -> Programs:
    """Trace and lower both programs.

    Args:
      mesh: of devices that may be compiled for and not run on, as `train.ahead.devices` gives them.
      params, cache: as `abstract_inputs` gives them, with `max_length`.
    """
    model, vocab_size = for_decoding(Transformer(config)), config.vocab_size
    [rows] = cache.lengths_B.shape
    parts = sharding.parts("batch", mesh)
    of_row, _ = counts(rows, max_length, parts)
    # Not `jax.set_mesh`: see `train.ahead.lower_step`.
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        jax.default_device(mesh.devices.flat[0]),
    ):
        kept = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, bits.dtype(x.dtype), sharding=x.sharding),
            params,
        )
        piece_BT = _ints(parts, min(PIECES[-1], max_length))
        slot = source = keep = adapter = _ints()
        prefill = read_piece.lower(
            model, kept, cache, slot, piece_BT, piece_BT, source, keep, adapter, _ints(of_row),
            _ints(2), None, None, None,
        )  # fmt: skip
        rows_B, inputs_BT = _ints(rows), _ints(rows, 1)
        sampling = jax.eval_shape(lambda: per_row(Sampling(), 1, rows))
        place = Place(rows_B, rows_B, rows_B, sampling, rows_B)
        masks_BTW = jax.ShapeDtypeStruct((rows, 1, -(-vocab_size // 32)), jnp.uint32)
        decode = write_tokens.lower(
            model, params, kept, cache, inputs_BT, rows_B, place, rows_B, masks_BTW, vocab_size,
            None, _ints(rows, of_row),
        )  # fmt: skip
    return Programs(prefill, decode)


def _placed(shapes, places):
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

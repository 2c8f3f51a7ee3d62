"""An engine of what is on disk, as `puna generate`, `chat` and `serve` run it."""

from collections.abc import Callable, Sequence

import jax

from ...configs.schema import ModelConfig
from ..text.tokenizer import load_tokenizer
from ..transformer import abstract_params
from ..turned import turn
from ..weights import adapter_sum
from ..weights.load import load
from .slots import Engine
from .speculation import check_draft

# Tokens that are proposed at a time by a draft model, where nothing else is told.
_SPECULATE = 4


def load_engine(checkpoint: str, tokenizer, mesh, num_slots: int,
                max_length: int | Callable[[ModelConfig], int],
                speculate: int | None = None, draft: str = "", dtype: str = "float32",
                quantize: str = "", adapter: str | Sequence[str] = "",
                cache_dtype: str = "", max_images: int = 1,
                cache_tokens: int = 0) -> Engine:  # fmt: skip
    """Read a model, and perhaps a draft model, onto the mesh and make an engine of it.

    Args:
      checkpoint, dtype, mesh, quantize: see `load`. adapter: as `load` takes it, or several for
        `adapter_sum.of_flags`.
      tokenizer: of the checkpoint.
      max_length: see `Engine`, or what gives it for a model's config.
      speculate, draft, cache_dtype, max_images, cache_tokens: see `Engine`; the draft model as a
        path, loaded like the model but without an adapter. None for 4 with a draft model, else 0.

    Raises:
      UserError: see `load`, `Engine` and `check_draft`.
    """
    if speculate is None:
        speculate = _SPECULATE if draft else 0
    adapters = adapter if isinstance(adapter, str) else adapter_sum.of_flags(adapter)
    names = tuple(adapters) if isinstance(adapters, dict) else ()
    model, params = load(checkpoint, dtype, mesh, quantize, adapters)
    if not isinstance(max_length, int):
        max_length = max_length(model.config)
    second = None
    if draft:
        second = load(draft, dtype, mesh, quantize)
        max_length = min(max_length, model.config.max_positions)
        check_draft(tokenizer, load_tokenizer(draft), model.config, second[0].config, max_length)
        second = second[0], turn(second[1], abstract_params(second[0].config), num_slots)
    params = turn(params, abstract_params(model.config), num_slots * (1 + speculate))
    with jax.set_mesh(mesh):
        return Engine(model, params, tokenizer, num_slots, max_length, names, speculate, second,
                      cache_dtype, max_images, cache_tokens)  # fmt: skip

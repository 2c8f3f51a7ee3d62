"""Writing Meta's own layout, params.json and consolidated.00.pth, of Llama 1 to 3 and 3.2 Vision.

`weights/meta.py` has the table of tensors and reads them. A model for which params.json has no
words is refused: what is written here is read back as the same model. One file is written for any
size, as for one model-parallel rank.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...configs.architecture import ModelConfig
from ...configs.errors import UserError
from ...configs.files import write_json
from ..text.tokenizer import Tokenizer
from ..weights import config as hf_config
from ..weights import meta, meta_cross, torch_files
from . import card

# ffn_dim_multiplier and multiple_of in published files, in the order of trial.
_WIDTHS = ((1.0, 256), (1.5, 256), (1.3, 4096), (1.3, 1024))
# Of ModelConfig: how it is run and trained, and what only counts beside fields that are compared.
_UNSAID = {
    "bias_update_rate", "capacity_factor", "compute_dtype", "expert_dim", "experts_per_token",
    "load_balance_weight", "max_positions", "num_experts", "param_dtype", "pipeline_microbatches",
    "remat", "router", "router_z_weight", "shared_expert", "temperature_floor",
}  # fmt: skip
_SCALING = {"rope_low_freq_factor", "rope_high_freq_factor", "rope_original_positions"}


def write(model, tokenizer: Tokenizer | None, folder: pathlib.Path, name: str) -> None:
    """Write params.json, the weights a tensor of one layer at a time, tokenizer and model card.

    Args:
      model: a source of `convert`.
      tokenizer: its own file is written, which is Meta's tokenizer.model where it came from one.
      folder: where; it is empty.
      name: of the model, on its card.

    Raises:
      UserError: an architecture, a dtype or tables of places that the layout cannot hold.
    """
    config: ModelConfig = model.config
    write_json(folder / "params.json", params(config))
    table = meta.leaves(config)
    places = [(path, layer) for path, leaf in table.items() for layer in range(len(leaf.sources))]
    shapes, described = meta_cross.shapes(config), {}
    for path, layer in places:
        source = table[path].sources[layer]
        for name in meta_cross.names(config, source.name):
            shape = shapes.get(name, source.hf_shape)
            described[_released(config, name)] = shape, model.dtype(path, layer)
    if config.tie_embeddings and not config.cross.interval:  # as Llama 3.2's files have it
        described["output.weight"] = described["tok_embeddings.weight"]
        places.append(("embed/table_VD", 0))

    def arrays() -> Iterator[np.ndarray]:
        for path, layer in tqdm(places, desc="writing", unit="tensor", disable=None):
            source = table[path].sources[layer]
            tensor = np.empty(source.hf_shape, model.dtype(path, layer))
            source.store(model.read(path, table[path], layer), tensor)
            yield from meta_cross.take_apart(config, source.name, tensor)

    torch_files.write_file(folder / "consolidated.00.pth", described, arrays())
    if tokenizer is not None:
        tokenizer.save(folder)
    card.write(folder, name, config, model.origin, model.facts, library="")
    model.finish()


def params(config: ModelConfig) -> dict[str, Any]:
    """The params.json of a model.

    Raises:
      UserError: it would be read back as another model.
    """
    if hf_config.family(config) == hf_config.LLAMA4:
        raise UserError("--to=meta writes Llama 1 to 3 and 3.2 Vision, and this is a Llama 4; "
                        "use --to=hf")  # fmt: skip
    multiplier, multiple = _width(config)
    made = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling_factor != 1.0,
    }
    if multiplier != 1.0:
        made["ffn_dim_multiplier"] = multiplier
    if config.cross.interval:
        made |= meta_cross.params(config)
        made["n_layers"] -= made[meta_cross.LAYERS]
    shapes = {s.name: s.hf_shape for leaf in meta.leaves(config).values() for s in leaf.sources}
    shapes |= meta_cross.shapes(config)
    parts = {name: [np.broadcast_to(np.float32(0), s)] for name, s in shapes.items()}
    if not config.tie_embeddings:
        parts["output.weight"] = [np.ones((1, 1), np.float32)]  # not the embedding's
    _compare(config, meta.config_of(pathlib.Path("params.json"), made, parts), "model.")
    return made


def _compare(wanted, found, prefix: str) -> None:
    """Refuse a model that is read back as another.

    Raises:
      UserError: names the first key that differs.
    """
    for field in dataclasses.fields(wanted):
        value, read = getattr(wanted, field.name), getattr(found, field.name)
        if dataclasses.is_dataclass(value):
            on = getattr(value, "interval", 1) and getattr(value, "num_layers", 1)
            if on or getattr(read, "num_layers", 0):
                _compare(value, read, f"{prefix}{field.name}.")
        elif field.name in _UNSAID or (
            field.name in _SCALING and wanted.rope_scaling_factor == 1.0
        ):
            continue
        elif value != read:
            raise UserError(
                f"{prefix}{field.name}={value!r} must be {read!r} for --to=meta: params.json does "
                "not say it; use --to=hf"
            )


def _width(config: ModelConfig) -> tuple[float, int]:
    """ffn_dim_multiplier and multiple_of that give `mlp_dim`: published ones if any do."""
    plain, wanted = int(8 * config.embed_dim / 3), config.mlp_dim
    for multiplier, multiple in _WIDTHS:
        if -(-int(multiplier * plain) // multiple) * multiple == wanted:
            return multiplier, multiple
    # Rounded up to a multiple of the width itself, from no more than that.
    return min(1.0, wanted / plain) if plain else 1.0, wanted


def _released(config: ModelConfig, name: str) -> str:
    """A tensor's name in released files, where the text model is a part beside the tower."""
    own = config.cross.interval and not name.startswith("vision_model.")
    return f"text_model.{name}" if own else name

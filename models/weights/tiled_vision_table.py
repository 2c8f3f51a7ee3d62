"""Hugging Face's `mllama` files (Llama 3.2 Vision) <-> puna: the tower's tensors, config.json.

Rows are those of `huggingface`, whose table covers the text model. Letters here: D width of the
encoder, U colours, Y and X rows and columns of a patch, C patches and class token of a tile, I
tiles, G grids of tiles and none, O a gate's one number, Q values that the projector reads, T width
of the text model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...configs.architecture import CrossConfig, ModelConfig, VisionConfig
from ...configs.errors import UserError
from ...configs.rules import MOST_TILES
from ..media.images import grids
from . import config as hf_config
from . import keys
from .huggingface import Leaf, Row, Source

MODEL_TYPE = "mllama"


def _norm(puna: str, hf: str):
    return (
        Row(f"{puna}/scale_D", "D", f"{hf}.weight", "D"),
        Row(f"{puna}/bias_D", "D", f"{hf}.bias", "D"),
    )


_POSITIONS = "vision_model.gated_positional_embedding"
_TILE = "vision_model.{}_positional_embedding"
TOWER = (
    Row("patch_WD", "UYX D", "vision_model.patch_embedding.weight", "D U Y X"),
    Row("class_D", "D", "vision_model.class_embedding", "D"),
    Row("positions_gate_1", "O", f"{_POSITIONS}.gate", "O"),
    Row("positions_PD", "C D", f"{_POSITIONS}.embedding", "C D"),
    Row("tile_positions_GIPD", "G I C D", f"{_POSITIONS}.tile_embedding.weight", "G ICD"),
    *(
        row
        for name in ("pre_tile", "post_tile")
        for row in (
            Row(f"{name}_gate_1", "O", f"{_TILE.format(name)}.gate", "O"),
            Row(f"{name}_GID", "G I D", f"{_TILE.format(name)}.embedding.weight", "G ID"),
        )
    ),
    *_norm("norm_in", "vision_model.layernorm_pre"),
    *_norm("norm_out", "vision_model.layernorm_post"),
    Row("projector_FD", "Q T", "multi_modal_projector.weight", "T Q"),
    Row("projector_bias_D", "T", "multi_modal_projector.bias", "T"),
)  # fmt: skip
LAYER = (
    *_norm("attention_norm", "input_layernorm"),
    *_norm("mlp_norm", "post_attention_layernorm"),
    Row("attention/wq_DNH", "D N H", "self_attn.q_proj.weight", "NH D"),
    Row("attention/wk_DNH", "D N H", "self_attn.k_proj.weight", "NH D"),
    Row("attention/wv_DNH", "D N H", "self_attn.v_proj.weight", "NH D"),
    Row("attention/wo_NHD", "N H D", "self_attn.o_proj.weight", "D NH"),
    Row("mlp/w_up_DF", "D F", "mlp.fc1.weight", "F D"),
    Row("mlp/b_up_F", "F", "mlp.fc1.bias", "F"),
    Row("mlp/w_down_FD", "F D", "mlp.fc2.weight", "D F"),
    Row("mlp/b_down_D", "D", "mlp.fc2.bias", "D"),
)
GATES = (
    Row("attention_gate_1", "O", "gate_attn", "O"),
    Row("mlp_gate_1", "O", "gate_ffn", "O"),
)


class Stack(NamedTuple):
    """Layers of the tower: where their leaves stand, what tensors begin with, the rows of each."""

    puna: str
    hf: str
    rows: tuple[Row, ...]


STACKS = (
    Stack("blocks/layer", "vision_model.transformer.layers", LAYER),
    Stack("global_blocks", "vision_model.global_transformer.layers", LAYER + GATES),
)


def leaves(config: ModelConfig) -> dict[str, Leaf]:
    """Return the table of the tower: every leaf under `vision/` by its path.

    Together with `huggingface.leaves(config, "language_model.", LLAMA)` it is that of
    `MllamaForConditionalGeneration`. Empty for a model without layers that attend to images.
    """
    return tower(config, TOWER, STACKS)


def tower(
    config: ModelConfig, root: tuple[Row, ...], stacks: tuple[Stack, Stack]
) -> dict[str, Leaf]:
    """Build the table of the tower from rows of any format.

    Args:
      root: the rows outside the layers.
      stacks: the layers, and the gated ones after them.
    """
    v = config.vision
    if not config.cross.interval:
        return {}
    sizes = {
        "C": (v.image_size // v.patch_size) ** 2 + 1,
        "D": v.embed_dim,
        "F": v.mlp_dim,
        "G": len(grids(v.max_tiles)) + 1,
        "H": v.embed_dim // v.num_heads,
        "I": v.max_tiles,
        "N": v.num_heads,
        "O": 1,
        "Q": _features(v) * v.embed_dim,
        "T": config.embed_dim,
        "U": 3,
        "X": v.patch_size,
        "Y": v.patch_size,
    }
    table = {}
    for row in root:
        source = Source(row.hf, row, sizes)
        table[f"vision/{row.puna}"] = Leaf(source.shape, (source,), stacked=False)
    for stack, depth in zip(stacks, (v.num_layers, v.global_layers), strict=True):
        for row in stack.rows:
            names = [f"{stack.hf}.{i}.{row.hf}" for i in range(depth)]
            sources = tuple(Source(name, row, sizes) for name in names)
            shape = (depth, *sources[0].shape)
            table[f"vision/{stack.puna}/{row.puna}"] = Leaf(shape, sources, stacked=True)
    return table


def _features(v: VisionConfig) -> int:
    """States that the projector reads."""
    return 1 + len(list(filter(None, v.intermediate_layers.split(","))))


# Key of vision_config: field of VisionConfig, default of Hugging Face's class.
_FIELDS = {
    "attention_heads": ("num_heads", 16),
    "hidden_size": ("embed_dim", 1280),
    "image_size": ("image_size", 448),
    "intermediate_size": ("mlp_dim", 5120),
    "max_num_tiles": ("max_tiles", 4),
    "num_global_layers": ("global_layers", 8),
    "num_hidden_layers": ("num_layers", 32),
    "patch_size": ("patch_size", 14),
}
# Keys that may have one value only: that value.
_ONLY = {"hidden_act": "gelu", "norm_eps": 1e-5, "num_channels": 3}
_LAYERS = ("intermediate_layers_indices", [3, 7, 15, 23, 30])
_READ = {"intermediate_layers_indices", "supported_aspect_ratios", "vision_output_dim"}
# What the classes of the text take where a file says nothing.
_TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_CROSS = ("cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38])
_OUTER = {
    "image_token_id", "image_token_index", "text_config", "tie_word_embeddings", "vision_config",
}  # fmt: skip
_IMAGE_TOKEN = 128256
# Rows of the embedding beyond the vocabulary; no key says how many.
_EXTRA_ROWS = 8


def from_hf(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Map the `config.json` of an `mllama` model to keyword arguments of `ModelConfig`.

    Raises:
      UserError: a key that puna does not know, or a value that it cannot honour.
    """
    keys.check(config_json, _OUTER)
    text = _TEXT | dict(config_json.get("text_config") or {})
    if text.pop("model_type", "mllama_text_model") != "mllama_text_model":
        raise UserError("config.json: text_config.model_type must be mllama_text_model")
    found = text.pop(_CROSS[0], None)
    where = _integers(f"text_config.{_CROSS[0]}", _CROSS[1] if found is None else found)
    made = hf_config.from_hf(text | {"model_type": hf_config.LLAMA})
    gaps = {b - a for a, b in zip(where, where[1:], strict=False)} or {made["num_layers"]}
    first, interval = where[0] if where else -1, gaps.pop()
    if first < 0 or list(range(first, made["num_layers"], interval)) != where or first >= interval:
        raise UserError(
            f"config.json: text_config.{_CROSS[0]}={keys.short(where)} must be every n-th of "
            f"num_hidden_layers={made['num_layers']}, the first of them among the first n"
        )
    token = config_json.get("image_token_index", config_json.get("image_token_id", _IMAGE_TOKEN))
    vision = _vision(config_json.get("vision_config") or {})
    return made | {
        "cross": {"first": first, "interval": interval},
        "vision": vision | {"token_id": token, "extra_rows": _EXTRA_ROWS},
    }


def _vision(values: Mapping[str, Any]) -> dict[str, Any]:
    keys.check(values, {*_FIELDS, *_ONLY, *_READ}, "vision_config.")
    made = {field: values.get(key, default) for key, (field, default) in _FIELDS.items()}
    for key, (field, _) in _FIELDS.items():
        if type(made[field]) is not int or not 0 < made[field] < 2**31:
            raise UserError(f"config.json: vision_config.{key}={made[field]!r} must be an integer "
                            "of at least 1")  # fmt: skip
    if made["max_tiles"] > MOST_TILES:
        raise UserError(
            f"config.json: vision_config.max_num_tiles={made['max_tiles']} must be at most "
            f"{MOST_TILES}"
        )
    for key, wanted in _ONLY.items():
        if values.get(key, wanted) != wanted:
            raise UserError(f"config.json: vision_config.{key}={values[key]!r} must be {wanted!r}")
    found = values.get(_LAYERS[0])
    layers = _integers(f"vision_config.{_LAYERS[0]}", _LAYERS[1] if found is None else found)
    if layers != sorted(set(layers)) or layers and layers[0] < 0:
        raise UserError(f"config.json: vision_config.{_LAYERS[0]}={keys.short(layers)} must be "
                        "rising numbers")  # fmt: skip
    made["intermediate_layers"] = ",".join(map(str, layers))
    wanted = [list(grid) for grid in grids(made["max_tiles"])]
    ratios = values.get("supported_aspect_ratios")
    if ratios is not None and [list(ratio) for ratio in ratios] != wanted:
        raise UserError(
            f"config.json: vision_config.supported_aspect_ratios={keys.short(ratios)} must be the "
            f"{len(wanted)} grids of max_num_tiles={made['max_tiles']} tiles at most, in order"
        )
    width = made["embed_dim"] * (1 + len(layers))
    if values.get("vision_output_dim", 7680) != width:
        raise UserError(
            f"config.json: vision_config.vision_output_dim={values.get('vision_output_dim', 7680)} "
            f"must be {width}, hidden_size for the last layer and each intermediate one"
        )
    return made


def _integers(key, value) -> list[int]:
    if not isinstance(value, list) or any(type(v) is not int for v in value):
        raise UserError(f"config.json: {key}={keys.short(value)} must be a list of integers")
    return value


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Map a model to the `config.json` of `MllamaForConditionalGeneration`.

    Raises:
      UserError: an architecture that Hugging Face's class cannot express.
    """
    v = config.vision
    if v.extra_rows != _EXTRA_ROWS:
        raise UserError(
            f"model.vision.extra_rows={v.extra_rows} must be {_EXTRA_ROWS} in a Hugging Face file"
        )
    if config.head_dim * config.num_heads != config.embed_dim:
        raise UserError(
            f"model.head_dim={config.head_dim} must be model.embed_dim / model.num_heads in a "
            "Hugging Face file of a model with model.cross"
        )
    text = dataclasses.replace(config, vision=VisionConfig(), cross=CrossConfig())
    if hf_config.family(text) != hf_config.LLAMA:
        raise UserError(
            f"model.cross.interval={config.cross.interval} must be 0 in a Hugging Face file: only "
            "Llama 3.2 has layers that attend to images"
        )
    text_json = hf_config.to_hf(text) | {"model_type": "mllama_text_model"}
    for key in ("architectures", "attention_bias", "attention_dropout", "head_dim", "mlp_bias"):
        text_json.pop(key, None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if text_json[key] is None:  # the class takes no null: its own values then
            del text_json[key]
    text_json["cross_attention_layers"] = list(
        range(config.cross.first, config.num_layers, config.cross.interval)
    )
    layers = [int(layer) for layer in filter(None, v.intermediate_layers.split(","))]
    vision_json = {key: getattr(v, field) for key, (field, _) in _FIELDS.items()} | {
        "model_type": "mllama_vision_model",
        "intermediate_layers_indices": layers,
        "supported_aspect_ratios": [list(grid) for grid in grids(v.max_tiles)],
        "vision_output_dim": v.embed_dim * _features(v),
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "image_token_index": v.token_id,
        "text_config": text_json,
        "tie_word_embeddings": False,
        "vision_config": vision_json | _ONLY,
    }

"""The image encoder of Hugging Face's `llama4` files <-> puna: tensors and configuration.

Rows are those of `huggingface`, whose table covers the text model. Letters here: D width of the
encoder, L values of a patch, M patches and class token, Q = 4 D after the pixel shuffle, A and Z
the adapter's width, T width of the text model; a head's H = R * P as there. The RoPE pairs of the
files lie side by side.
"""

from collections.abc import Mapping
from typing import Any

from ...configs.architecture import ModelConfig, VisionConfig
from ...configs.errors import UserError
from . import keys
from .huggingface import Leaf, Row, Source


def _linear(puna: str, names: tuple[str, str], dims: str, hf: str, hf_dims: str):
    weight, bias = names
    return (
        Row(f"{puna}/{weight}", dims, f"{hf}.weight", hf_dims),
        Row(f"{puna}/{bias}", hf_dims.split()[0].replace("PR", "RP"), f"{hf}.bias",
            hf_dims.split()[0]),
    )  # fmt: skip


def _norm(puna: str, hf: str):
    return (
        Row(f"{puna}/scale_D", "D", f"{hf}.weight", "D"),
        Row(f"{puna}/bias_D", "D", f"{hf}.bias", "D"),
    )


TOWER = (
    Row("patch_WD", "L D", "vision_model.patch_embedding.linear.weight", "D L"),
    Row("class_D", "D", "vision_model.class_embedding", "D"),
    Row("positions_PD", "M D", "vision_model.positional_embedding_vlm", "M D"),
    *_norm("encoder/norm_in", "vision_model.layernorm_pre"),
    *_norm("encoder/norm_out", "vision_model.layernorm_post"),
    Row("adapter/w_in_FA", "Q A", "vision_model.vision_adapter.mlp.fc1.weight", "A Q"),
    Row("adapter/w_out_AA", "A Z", "vision_model.vision_adapter.mlp.fc2.weight", "Z A"),
    Row("projector_AD", "A T", "multi_modal_projector.linear_1.weight", "T A"),
)
LAYER = (
    *_norm("attention_norm", "input_layernorm"),
    *_norm("mlp_norm", "post_attention_layernorm"),
    *_linear("attention", ("wq_DNH", "bq_D"), "D N RP", "self_attn.q_proj", "NPR D"),
    *_linear("attention", ("wk_DNH", "bk_D"), "D N RP", "self_attn.k_proj", "NPR D"),
    *_linear("attention", ("wv_DNH", "bv_D"), "D N H", "self_attn.v_proj", "NH D"),
    *_linear("attention", ("wo_NHD", "bo_D"), "N H D", "self_attn.o_proj", "D NH"),
    *_linear("mlp", ("w_up_DF", "b_up_F"), "D F", "mlp.fc1", "F D"),
    *_linear("mlp", ("w_down_FD", "b_down_D"), "F D", "mlp.fc2", "D F"),
)


def leaves(config: ModelConfig) -> dict[str, Leaf]:
    """Return the table of the image encoder: every leaf under `vision/` by its path.

    Together with `huggingface.leaves(config, "language_model.", LLAMA4)` it is that of
    `Llama4ForConditionalGeneration`. Empty for a model without vision.
    """
    v = config.vision
    if not v.num_layers or config.cross.interval:
        return {}
    H = v.embed_dim // v.num_heads
    sizes = {
        "A": v.adapter_dim,
        "D": v.embed_dim,
        "F": v.mlp_dim,
        "H": H,
        "L": 3 * v.patch_size**2,
        "M": (v.image_size // v.patch_size) ** 2 + 1,
        "N": v.num_heads,
        "P": H // 2,
        "Q": 4 * v.embed_dim,
        "R": 2,
        "T": config.embed_dim,
        "Z": v.adapter_dim,
    }
    table = {}
    for row in TOWER:
        source = Source(row.hf, row, sizes)
        table[f"vision/{row.puna}"] = Leaf(source.shape, (source,), stacked=False)
    for row in LAYER:
        sources = tuple(
            Source(f"vision_model.model.layers.{i}.{row.hf}", row, sizes)
            for i in range(v.num_layers)
        )
        shape = (v.num_layers, *sources[0].shape)
        table[f"vision/encoder/blocks/{row.puna}"] = Leaf(shape, sources, stacked=True)
    return table


# Key of vision_config: field of VisionConfig, default of Hugging Face's class.
_FIELDS = {
    "hidden_size": ("embed_dim", 768),
    "image_size": ("image_size", 448),
    "intermediate_size": ("mlp_dim", 5632),
    "num_attention_heads": ("num_heads", 16),
    "num_hidden_layers": ("num_layers", 34),
    "patch_size": ("patch_size", 14),
    "projector_output_dim": ("adapter_dim", 4096),
}
# Keys that may have one value only: that value. No code of Llama 4 reads any other norm_eps.
_ONLY = {
    "hidden_act": "gelu",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-5,
    "num_channels": 3,
    "pixel_shuffle_ratio": 0.5,
    "vision_feature_select_strategy": "default",
}
_DROPOUT = {"attention_dropout": 0.0, "projector_dropout": 0.0}
_READ = {
    "projector_input_dim", "rope_parameters", "rope_theta", "vision_feature_layer",
    "vision_output_dim",
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE_TOKEN = 200092


def from_hf(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Map the `config.json` of a `llama4` model to keyword arguments of `VisionConfig`.

    `max_tiles` is not in that file and keeps its default.

    Raises:
      UserError: a value of `vision_config` that puna cannot honour.
    """
    values = config_json.get("vision_config") or {}
    made = {field: values.get(key, default) for key, (field, default) in _FIELDS.items()}
    keys.check(values, {*_FIELDS, *_ONLY, *_READ}, "vision_config.")
    for key, wanted in _ONLY.items():
        if values.get(key, wanted) != wanted:
            raise UserError(f"config.json: vision_config.{key}={values[key]!r} must be {wanted!r}")
    if values.get("vision_feature_layer", -1) != -1:
        raise UserError("config.json: vision_config.vision_feature_layer must be -1")
    rope = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta", 10000)}
    if _ROPE | dict(rope) != _ROPE:
        raise UserError(f"config.json: vision_config.rope_parameters={rope!r} must be {_ROPE!r}")
    for key, (field, _) in _FIELDS.items():
        if type(made[field]) is not int:
            raise UserError(f"config.json: vision_config.{key}={made[field]!r} must be an integer")
    # The tower's one width after the shuffle goes by three names; its input by a fourth.
    same = {
        "projector_input_dim": (4096, made["adapter_dim"]),
        "vision_output_dim": (7680, made["adapter_dim"]),
        "intermediate_size": (made["mlp_dim"], 4 * made["embed_dim"]),
    }
    for key, (default, wanted) in same.items():
        if values.get(key, default) != wanted:
            raise UserError(
                f"config.json: vision_config.{key}={values.get(key, default)!r} must be {wanted}"
            )
    token = config_json.get("image_token_index", config_json.get("image_token_id", _IMAGE_TOKEN))
    return made | {"token_id": token}


def to_hf(config: VisionConfig) -> dict[str, Any]:
    """Map a `VisionConfig` to the keys that it adds to `config.json`.

    Raises:
      UserError: an adapter that Hugging Face's class cannot express.
    """
    if config.mlp_dim != 4 * config.embed_dim:
        raise UserError(
            f"model.vision.mlp_dim={config.mlp_dim} must be 4 * model.vision.embed_dim="
            f"{4 * config.embed_dim} in a Hugging Face file, whose adapter reads as many"
        )
    values = {key: getattr(config, field) for key, (field, _) in _FIELDS.items()}
    widths = dict.fromkeys(("projector_input_dim", "vision_output_dim"), config.adapter_dim)
    vision = {"model_type": "llama4_vision_model", "rope_parameters": dict(_ROPE)}
    return {
        "image_token_index": config.token_id,
        "vision_config": values | widths | _ONLY | _DROPOUT | vision,
    }

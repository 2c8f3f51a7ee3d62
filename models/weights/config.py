"""Hugging Face `config.json` <-> `ModelConfig`, for Llama 1-3.3 and Llama 4.

Names, defaults and meaning are those of `LlamaConfig`, `Llama4TextConfig` and `Llama4Config` in
transformers 5.23; older files are read too, and those of other types whose network is Llama's
(`_NEIGHBOURS`). Every key is mapped, or cannot change a number (`keys.py`), or is refused by its
name. Only the text model is mapped here: the vision keys of a `llama4` file are left for the image
encoder's own mapping.
"""

from collections.abc import Mapping
from typing import Any

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from . import keys, rope_keys

LLAMA = "llama"
LLAMA4 = "llama4_text"
MLLAMA = "mllama_text_model"  # see `tiled_vision_table`
# Other types whose network is Llama's, and where their defaults differ from those of `LlamaConfig`.
_NEIGHBOURS: dict[str, dict[str, Any]] = {
    "internlm": {"bias": True, "vocab_size": 103168},
    "mistral": {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
    },
    "smollm3": {
        "hidden_size": 2048,
        "max_position_embeddings": 32768,
        "no_rope_layer_interval": 4,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
}
# Keys of theirs beside Llama's: of biases, and of layers without RoPE.
_NEIGHBOUR_READ = {
    "internlm": {"bias"},
    "smollm3": {"no_rope_layer_interval", "no_rope_layers"},
}

# Key of config.json: field of ModelConfig.
_BOTH = {
    "hidden_size": "embed_dim",
    "max_position_embeddings": "max_positions",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "vocab_size": "vocab_size",
}
_FIELDS = {
    LLAMA: _BOTH | {"intermediate_size": "mlp_dim"},
    LLAMA4: _BOTH | {"intermediate_size_mlp": "mlp_dim", "use_qk_norm": "qk_norm"},
}
_EXPERT_FIELDS = {
    "intermediate_size": "expert_dim",
    "num_experts_per_tok": "experts_per_token",
    "num_local_experts": "num_experts",
}
_DEFAULTS = {  # of the configuration classes
    LLAMA: {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    LLAMA4: {
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "head_dim": 128,
        "hidden_size": 5120,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 131072,
        "no_rope_layer_interval": 4,
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
}
_READ = {  # keys that functions below read, besides the fields
    LLAMA: {
        "attention_bias",
        "head_dim",
        "mlp_bias",
        "num_key_value_heads",
    }
    | rope_keys.KEYS,
    LLAMA4: {
        "attention_bias",
        "attention_chunk_size",
        "attn_scale",
        "attn_temperature_tuning",
        "floor_scale",
        "head_dim",
        "interleave_moe_layer_step",
        "layer_types",
        "moe_layers",
        "no_rope_layer_interval",
        "no_rope_layers",
        "num_key_value_heads",
    }
    | rope_keys.KEYS,
}

_NULLABLE = {"attention_chunk_size", "head_dim", "num_key_value_heads"}

# The level of a multimodal file that holds the text model and the image encoder.
_MULTIMODAL = {
    "boi_token_id",
    "boi_token_index",
    "eoi_token_id",
    "eoi_token_index",
    "image_token_id",
    "image_token_index",
    "text_config",
    "tie_word_embeddings",
    "vision_config",
}


def family(config: ModelConfig) -> str:
    """Return "llama" where Llama 1-3 can express the model, else "llama4_text" or 3.2 Vision's."""
    if config.cross.interval:
        return MLLAMA
    dense = not (config.moe_interval or config.nope_interval or config.chunk_size)
    return LLAMA if dense and not config.qk_norm else LLAMA4


def from_hf(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Map a Hugging Face `config.json` to keyword arguments of `ModelConfig`.

    Args:
      config_json: the parsed file, of model type `llama`, `llama4_text`, `llama4` or a neighbour's.

    Returns:
      The architecture's fields; those that the file cannot know (dtypes, remat, loss weights)
      are left out and take puna's defaults.

    Raises:
      UserError: a key that puna does not know, or a value that it cannot honour.
    """
    kind = own = config_json.get("model_type")
    values = dict(config_json)
    if kind == "llama4":
        values = _text_of(config_json)
        kind = LLAMA4
    if kind in _NEIGHBOURS:
        values = _NEIGHBOURS[kind] | values
        kind = LLAMA
    if kind not in _FIELDS:
        known = ", ".join((*_FIELDS, "llama4", "mllama", *_NEIGHBOURS))
        raise UserError(f"config.json: model_type={kind!r} must be one of {known}")
    mapped = set(_FIELDS[kind]) | set(_EXPERT_FIELDS if kind == LLAMA4 else ()) | _READ[kind]
    mapped |= _NEIGHBOUR_READ.get(own, set())
    keys.check(values, mapped)
    get = _Reader(values, _DEFAULTS[kind])
    made = {field: get(key) for key, field in _FIELDS[kind].items()}
    made["norm_eps"] = float(made["norm_eps"])
    made["num_kv_heads"] = _or(get("num_key_value_heads"), made["num_heads"])
    made["head_dim"] = _or(get("head_dim"), made["embed_dim"] // made["num_heads"])
    made |= rope_keys.from_hf(values, get, made["max_positions"])
    made |= _biases(own, values)
    if own == "smollm3":
        made["nope_interval"] = _nope_interval(get, made["num_layers"])
    if kind == LLAMA4:
        made |= _llama4(get, made["num_layers"])
    return made


def to_hf(
    config: ModelConfig,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """Map a `ModelConfig` to the `config.json` of `LlamaForCausalLM` or `Llama4ForCausalLM`.

    Args:
      config: a text model.
      bos_token_id, eos_token_id, pad_token_id: what the tokenizer says; written even when None,
        because the defaults of Hugging Face are those of Llama 1.

    Returns:
      The file's content, every architecture key spelt out. The dtype of the weights is the
      business of whoever writes them.

    Raises:
      UserError: an architecture that Hugging Face's Llamas cannot express.
    """
    kind = family(config)
    _check_expressible(config, kind)
    out = {
        "architectures": ["LlamaForCausalLM" if kind == LLAMA else "Llama4ForCausalLM"],
        "model_type": kind,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "attention_bias": config.attention_bias == "all",
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "num_key_value_heads": config.num_kv_heads,
        "rope_parameters": rope_keys.to_hf(config),
    }
    out |= {key: getattr(config, field) for key, field in _FIELDS[kind].items()}
    if config.attention_bias == "qkv":  # Llama's own have one of the output, too
        del out["attention_bias"]
        return out | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    if kind == LLAMA:
        return out | {"mlp_bias": config.mlp_bias}
    layers = range(config.num_layers)
    rope = [config.uses_rope(i) for i in layers]
    chunked = [uses and bool(config.chunk_size) for uses in rope]
    if config.moe_interval:
        out |= {key: getattr(config, field) for key, field in _EXPERT_FIELDS.items()}
    else:  # unused: there is no MoE layer, but the keys' defaults are Scout's
        out |= {"intermediate_size": config.mlp_dim, "num_local_experts": 1}
    return out | {
        # Never read where no layer is chunked, but transformers wants a number.
        "attention_chunk_size": config.chunk_size or config.max_positions,
        "attn_scale": config.temperature_scale or _DEFAULTS[LLAMA4]["attn_scale"],
        "attn_temperature_tuning": bool(config.temperature_scale),
        "floor_scale": config.temperature_floor,
        "interleave_moe_layer_step": config.moe_interval or config.num_layers + 1,
        "layer_types": ["chunked_attention" if c else "full_attention" for c in chunked],
        "moe_layers": [i for i in layers if config.is_moe(i)],
        "no_rope_layer_interval": config.nope_interval or config.num_layers + 1,
        "no_rope_layers": [int(uses) for uses in rope],
    }


class _Reader:
    """Values by Hugging Face key, of the type of the class's default, or that default."""

    def __init__(self, values, defaults):
        self.values, self.defaults = values, defaults

    def __call__(self, key):
        default = self.defaults.get(key)
        value = self.values.get(key, default)
        if default is None or (value is None and key in _NULLABLE):
            return value
        if value is None and default is False:
            return False
        if type(value) is type(default) or (type(default) is float and type(value) is int):
            return value
        if key == "attn_temperature_tuning" and isinstance(value, int):
            return bool(value)  # the first upload of Scout says 4
        raise UserError(f"config.json: {key}={value!r} must be of type {type(default).__name__}")


def _or(value, default):
    return default if value is None else value


def _text_of(config_json):
    """The text model's part of a multimodal file, with what the outer level says about it."""
    keys.check(config_json, _MULTIMODAL)
    text = config_json.get("text_config") or {}
    if text.get("model_type", LLAMA4) != LLAMA4:
        raise UserError(
            f"config.json: text_config.model_type={text['model_type']!r} must be {LLAMA4}"
        )
    # transformers ties by the inner flag; the outer one speaks where that is silent.
    return {"tie_word_embeddings": config_json.get("tie_word_embeddings", False)} | dict(text)


def _biases(kind, values):
    """Which biases there are: of q, k and v in Qwen 2, of all of attention in InternLM."""

    def has(key):
        value = values.get(key) or False
        if not isinstance(value, bool):
            raise UserError(f"config.json: {key}={keys.short(value)} must be true or false")
        return value

    if kind == "qwen2":
        return {"attention_bias": "qkv"}
    of_attention = has("bias" if kind == "internlm" else "attention_bias")
    of_mlp = kind in (LLAMA, "smollm3") and has("mlp_bias")
    return {"attention_bias": "all" if of_attention else "none", "mlp_bias": of_mlp}


def _ropes(get, num_layers):
    """Whether each layer has RoPE."""
    every = get("no_rope_layer_interval")
    rope = get("no_rope_layers")  # 1 = RoPE, whatever the name says; an empty list means absent
    rope = rope or [int(not every or (i + 1) % every != 0) for i in range(num_layers)]
    if len(rope) < num_layers:
        raise UserError(
            f"config.json: no_rope_layers has {len(rope)} entries and must have "
            f"num_hidden_layers={num_layers}"
        )
    return [bool(uses) for uses in rope[:num_layers]]


def _nope_interval(get, num_layers):
    without = [i for i, uses in enumerate(_ropes(get, num_layers)) if not uses]
    return _interval("no_rope_layers", without, num_layers)


def _llama4(get, num_layers):
    """What Llama 4 adds: NoPE layers, chunks, temperature, experts."""
    rope = _ropes(get, num_layers)
    made = {
        "nope_interval": _nope_interval(get, num_layers),
        "chunk_size": _or(get("attention_chunk_size"), 0),
    }
    types = get("layer_types")
    chunked = rope if types is None else [kind == "chunked_attention" for kind in types]
    if set(types or ()) - {"chunked_attention", "full_attention"} or (
        any(chunked) and chunked != rope
    ):
        raise UserError(
            "config.json: layer_types must say chunked_attention for the layers with RoPE and "
            "full_attention for the others, or full_attention for all"
        )
    if not any(chunked):
        made["chunk_size"] = 0
    if made["nope_interval"] and get("attn_temperature_tuning"):
        made["temperature_scale"] = float(get("attn_scale"))
        made["temperature_floor"] = get("floor_scale")
    moe = get("moe_layers")
    if moe is None:
        step = get("interleave_moe_layer_step")
        moe = range(step - 1, num_layers, step) if step else ()
    made["moe_interval"] = _interval("moe_layers", sorted({i for i in moe if i < num_layers}),
                                     num_layers)  # fmt: skip
    if made["moe_interval"]:
        made |= {field: get(key) for key, field in _EXPERT_FIELDS.items()}
        made |= {"router": "sigmoid", "shared_expert": True}
    return made


def _interval(key, layers, num_layers):
    """The n for which `layers` are those with (i + 1) % n == 0; 0 where there are none."""
    if not layers:
        return 0
    n = layers[0] + 1
    if layers != list(range(n - 1, num_layers, n)):
        raise UserError(
            f"config.json: {key} must repeat every n-th layer, not {keys.short(layers)}"
        )
    return n


def _check_expressible(config, kind):
    def refuse(field, rule):
        raise UserError(f"model.{field}={getattr(config, field)} {rule} in a Hugging Face file")

    for field in ("vision", "audio"):
        if getattr(config, field).num_layers:
            raise UserError(f"model.{field}.num_layers must be 0: only the text model is written")
    if config.moe_interval:
        if config.router != "sigmoid":
            refuse("router", "must be sigmoid")
        if not config.shared_expert:
            refuse("shared_expert", "must be True")
        if config.bias_update_rate:
            refuse("bias_update_rate", "must be 0: there is no place for the router's bias")
    if config.mlp_bias and (kind != LLAMA or config.attention_bias == "qkv"):
        refuse("mlp_bias", f"must be False beside attention_bias={config.attention_bias} and "
               f"nope_interval={config.nope_interval}")  # fmt: skip
    if config.attention_bias == "qkv" and kind != LLAMA:
        refuse("attention_bias", "must be none or all in a model of Llama 4's layers")
    if kind == LLAMA and config.embed_dim % config.num_heads:
        refuse("embed_dim", f"must be a multiple of model.num_heads={config.num_heads}")

"""Hugging Face config.json <-> ModelConfig: what maps, what is refused, and that both agree."""

import json
import pathlib

import numpy as np
import pytest

from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.weights.config import family, from_hf, to_hf

FIXTURES = pathlib.Path(__file__).parents[2] / "reference" / "fixtures"

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA4 = {"model_type": "llama4_text"}  # the defaults are Scout's, but for rope and context
SCALED = {
    "rope_theta": 500000.0, "rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0, "rope_original_positions": 8192,
}  # fmt: skip


def made(config_json):
    return schema.from_dict(from_hf(config_json), schema.ModelConfig)


# What the file says on top of LLAMA or LLAMA4 -> fields it must give.
MAPPED = {
    "sizes": (LLAMA, {}, {
        "vocab_size": 128256, "embed_dim": 4096, "mlp_dim": 14336, "num_layers": 32,
        "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "max_positions": 131072,
        "norm_eps": 1e-5, "tie_embeddings": False, "rope_theta": 5e5, "rope_scaling_factor": 1.0,
        "nope_interval": 0, "chunk_size": 0, "moe_interval": 0, "qk_norm": False,
    }),
    "defaults of LlamaConfig": ({"model_type": "llama"}, {}, {
        "vocab_size": 32000, "embed_dim": 4096, "mlp_dim": 11008, "num_layers": 32,
        "num_heads": 32, "num_kv_heads": 32, "max_positions": 2048, "norm_eps": 1e-6,
        "rope_theta": 1e4,
    }),
    "no kv heads, no head_dim": (
        LLAMA, {"num_key_value_heads": None, "head_dim": None},
        {"num_kv_heads": 32, "head_dim": 128},
    ),
    "head_dim": (LLAMA, {"head_dim": 64}, {"head_dim": 64}),
    "tied": (LLAMA, {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "old rope": (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3"}}, SCALED),
    "older rope": (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"type": "llama3"}}, SCALED),
    "new rope": (
        LLAMA, {"rope_parameters": LLAMA3_ROPE | {"rope_type": "llama3", "rope_theta": 2.0}},
        SCALED | {"rope_theta": 2.0},
    ),
    "new rope without theta": (
        LLAMA, {"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 5e5}
    ),
    "scaled rope without the old context": (
        LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                                 "high_freq_factor": 4}},
        SCALED | {"rope_original_positions": 131072},
    ),
    "rope_theta null beside rope_parameters": (
        LLAMA, {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_theta": 7.0},
    ),
    "the old context outside": (
        LLAMA, {"rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3"},
                "original_max_position_embeddings": 4096},
        SCALED | {"rope_original_positions": 4096},
    ),
    "mistral": (
        {"model_type": "mistral"}, {"sliding_window": None},
        {"mlp_dim": 14336, "num_kv_heads": 8, "max_positions": 131072, "rope_theta": 1e4},
    ),
    "linear by 4": (
        LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling_factor": 4.0, "rope_low_freq_factor": 1e9, "rope_high_freq_factor": 1e9},
    ),
    "linear by 1": (
        LLAMA, {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling_factor": 1.0, "rope_theta": 5e5},
    ),
    "unused keys of rope": (
        LLAMA, {"rope_parameters": {"rope_type": "default", "mrope_section": [], "factor": 1.0}},
        {"rope_theta": 5e5},
    ),
    "tied null": (LLAMA, {"tie_word_embeddings": None}, {"tie_embeddings": False}),
    "rope_scaling null": (LLAMA, {"rope_scaling": None}, {"rope_scaling_factor": 1.0}),
    "bookkeeping": (
        LLAMA, {"pretraining_tp": 2, "torch_dtype": "bfloat16", "eos_token_id": [1, 2],
                "attention_bias": False, "hidden_act": "silu", "sliding_window": None,
                "quantization_config": None, "attention_dropout": 0.0},
        {"embed_dim": 4096},
    ),
    "defaults of Llama4TextConfig": (LLAMA4, {}, {
        "vocab_size": 202048, "embed_dim": 5120, "mlp_dim": 16384, "num_layers": 48,
        "num_heads": 40, "num_kv_heads": 8, "head_dim": 128, "max_positions": 131072,
        "norm_eps": 1e-5, "rope_theta": 5e5, "nope_interval": 4, "chunk_size": 8192,
        "temperature_scale": 0.1, "temperature_floor": 8192, "qk_norm": True, "moe_interval": 1,
        "num_experts": 16, "experts_per_token": 1, "expert_dim": 8192, "shared_expert": True,
        "router": "sigmoid",
    }),
    "head_dim null": (LLAMA4, {"head_dim": None}, {"head_dim": 128}),
    "list of rope layers": (
        LLAMA4, {"no_rope_layers": [1, 1, 0, 1, 1, 0, 1], "num_hidden_layers": 7},
        {"nope_interval": 3, "num_layers": 7},
    ),
    "longer list of rope layers": (
        LLAMA4, {"no_rope_layers": [1, 0] * 5, "num_hidden_layers": 4}, {"nope_interval": 2}
    ),
    "empty list of rope layers": (LLAMA4, {"no_rope_layers": []}, {"nope_interval": 4}),
    "rope everywhere": (
        LLAMA4, {"no_rope_layers": [1] * 48}, {"nope_interval": 0, "temperature_scale": 0.0}
    ),
    "nope everywhere": (LLAMA4, {"no_rope_layer_interval": 1}, {"nope_interval": 1}),
    "maverick": (
        LLAMA4, {"interleave_moe_layer_step": 2, "num_local_experts": 128, "use_qk_norm": False},
        {"moe_interval": 2, "num_experts": 128, "qk_norm": False},
    ),
    "list of moe layers": (LLAMA4, {"moe_layers": list(range(2, 48, 3))}, {"moe_interval": 3}),
    "no moe layers": (
        LLAMA4, {"moe_layers": [], "interleave_moe_layer_step": 0},
        {"moe_interval": 0, "num_experts": 0, "mlp_dim": 16384},
    ),
    "no temperature": (LLAMA4, {"attn_temperature_tuning": False}, {"temperature_scale": 0.0}),
    "temperature as a number": (
        LLAMA4, {"attn_temperature_tuning": 4, "attn_scale": 0.2, "floor_scale": 100},
        {"temperature_scale": 0.2, "temperature_floor": 100},
    ),
    "no chunks": (LLAMA4, {"attention_chunk_size": None}, {"chunk_size": 0}),
    "full attention in every layer": (
        LLAMA4, {"layer_types": ["full_attention"] * 48}, {"chunk_size": 0, "nope_interval": 4}
    ),
    "tied inside": (
        {"model_type": "llama4"},
        {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
        {"tie_embeddings": True},
    ),
    "tied outside": (
        {"model_type": "llama4"}, {"tie_word_embeddings": True, "text_config": {}},
        {"tie_embeddings": True},
    ),
    "multimodal": (
        {"model_type": "llama4"},
        {"text_config": LLAMA4 | {"num_hidden_layers": 8, "for_llm_compressor": False},
         "vision_config": {"hidden_size": 1408}, "image_token_index": 200092},
        {"num_layers": 8, "embed_dim": 5120},
    ),
}  # fmt: skip

# What the file says on top of LLAMA or LLAMA4 -> words of the one line that refuses it.
REFUSED = {
    "another model": ({"model_type": "gemma"}, {}, "model_type='gemma'"),
    "a window that slides": ({"model_type": "mistral"}, {}, "sliding_window=4096 must be None"),
    "no model type": ({}, {"hidden_size": 8}, "model_type=None"),
    "3.2 vision's text alone": ({"model_type": "mllama_text_model"}, {}, "'mllama_text_model'"),
    "yarn's truncate": (
        LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate=1"
    ),
    "longrope": (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
    "linear by nothing": (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "rope of no object": (LLAMA, {"rope_scaling": [2.0]}, r"rope_scaling=[2.0] must be an object"),
    "half a rope": (
        LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "high_freq_factor"
    ),
    "unknown rope key": (
        LLAMA, {"rope_parameters": {"rope_type": "default", "beta_fast": 3}}, "beta_fast"
    ),
    "partial rope": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "partial rope inside": (
        LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"
    ),
    "two ropes": (
        LLAMA, {"rope_parameters": {"rope_theta": 3.0},
                "rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3"}},
        "rope_scaling and rope_parameters differ",
    ),
    "rope_theta": (LLAMA, {"rope_theta": "big"}, "rope_theta='big'"),
    "activation": (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "attention bias": (LLAMA, {"attention_bias": "q"}, "attention_bias='q' must be true or false"),
    "mlp bias": (LLAMA, {"mlp_bias": 2}, "mlp_bias=2 must be true or false"),
    "sliding window": (LLAMA, {"sliding_window": 4096}, "sliding_window=4096"),
    "quantized": (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    "layers of several shapes": (LLAMA, {"per_layer_config": {"0": {}}}, "per_layer_config"),
    "unknown key": (LLAMA, {"logit_softcap": 30.0}, "logit_softcap=30.0"),
    "Llama 4 key in Llama 3": (LLAMA, {"attention_chunk_size": 8192}, "attention_chunk_size"),
    "text for a number": (LLAMA, {"hidden_size": "4096"}, "hidden_size='4096'"),
    "null for a number": (LLAMA, {"vocab_size": None}, "vocab_size=None"),
    "rope layers without a pattern": (
        LLAMA4, {"no_rope_layers": [1, 0, 0, 1], "num_hidden_layers": 4}, "no_rope_layers"
    ),
    "rope layers cut short": (LLAMA4, {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers has 4"),
    "moe layers without a pattern": (LLAMA4, {"moe_layers": [0, 5]}, "moe_layers"),
    "moe layers that stop": (LLAMA4, {"moe_layers": [1, 3]}, "moe_layers"),
    "rope_theta null alone": (LLAMA, {"rope_theta": None}, "rope_theta=None"),
    "sliding layers": (
        LLAMA4, {"layer_types": ["sliding_attention"] * 48}, "layer_types must say"
    ),
    "chunked NoPE layers": (
        LLAMA4, {"layer_types": ["chunked_attention"] * 48}, "layer_types must say"
    ),
    "bias inside": (
        {"model_type": "llama4"}, {"text_config": {"mlp_bias": True}}, "mlp_bias=True"
    ),
    "unknown outer key": (
        {"model_type": "llama4"}, {"text_config": {}, "audio_config": {}}, "audio_config"
    ),
    "another text model": (
        {"model_type": "llama4"}, {"text_config": {"model_type": "qwen3"}}, "'qwen3'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPPED)
def test_maps(case):
    base, change, fields = MAPPED[case]
    config = made(base | change)
    assert {name: getattr(config, name) for name in fields} == fields
    again = to_hf(config)
    assert made(json.loads(json.dumps(again))) == config
    assert again["model_type"] == family(config)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case):
    base, change, words = REFUSED[case]
    with pytest.raises(UserError) as caught:
        from_hf(base | change)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("name", sorted(path.stem for path in FIXTURES.glob("*.npz")))
def test_writes_what_transformers_wrote(name):
    """Every key of ours stands in transformers' own file, with the same value."""
    with np.load(FIXTURES / f"{name}.npz") as stored:
        theirs = json.loads(str(stored["config"]))
    ours = to_hf(made(theirs))
    del ours["architectures"]  # a file written by a model's save, not by its config, has it
    unread = {"intermediate_size_mlp"} if theirs.get("interleave_moe_layer_step") == 1 else set()
    same = {key: theirs.get(key) for key in ours if key not in unread}
    assert {key: value for key, value in ours.items() if key not in unread} == same


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router": "softmax"}, "model.router=softmax"),
        ({"shared_expert": False}, "model.shared_expert=False"),
        ({"bias_update_rate": 0.001}, "model.bias_update_rate=0.001"),
    ],
)
def test_does_not_write_what_hugging_face_lacks(fields, words):
    experts = {"moe_interval": 1, "num_experts": 4, "expert_dim": 8}
    with pytest.raises(UserError, match=words):
        to_hf(schema.from_dict(experts | fields, schema.ModelConfig))


def test_does_not_write_a_width_transformers_refuses():
    with pytest.raises(UserError, match="model.embed_dim=256 must be a multiple"):
        to_hf(schema.from_dict({"num_heads": 6, "num_kv_heads": 2}, schema.ModelConfig))


def test_does_not_drop_an_encoder():
    config = schema.from_dict({"vocab_size": 202048, "vision": {"num_layers": 1}},
                              schema.ModelConfig)  # fmt: skip
    with pytest.raises(UserError, match="model.vision.num_layers must be 0"):
        to_hf(config)


def test_writes_the_special_tokens():
    written = to_hf(schema.ModelConfig(), bos_token_id=1, eos_token_id=[2, 3])
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 3])
    assert written["pad_token_id"] is None

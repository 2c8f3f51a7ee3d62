"""Keys of config.json that puna does not map: which may stand there, and which stop a model."""

import json

import numpy as np
import pytest

from puna.configs.errors import UserError
from puna.models.weights import keys
from puna.models.weights.load import load, open_weights

# As found in configs of Llamas and of models near them.
HARMLESS = {
    # who made it and with what
    "is_llama_config": True, "_name_or_path": "x", "license": "mit", "base_model": "meta",
    "unsloth_version": "2025.1", "unsloth_fixed": True, "transformers_version": "4.40",
    "auto_map": {"AutoConfig": "x.X"}, "task_specific_params": {"x": {"y": 1}},
    "id2label": {"0": "a"}, "num_labels": 2, "problem_type": "regression",
    # other programs
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "onnx:opset": 17,
    "_flash_attn_2_enabled": True, "_attn_implementation_autoset": True,
    # how numbers are computed
    "torch_dtype": "bfloat16", "use_cache": True, "use_flash_attention": True, "attn_impl": "torch",
    "kv_cache_dtype": "auto", "pretraining_tp": 2, "tensor_parallel_size": 4, "ep_size": 1,
    "base_model_tp_plan": {"layers.*": "colwise"}, "gradient_checkpointing": True,
    "attention_softmax_in_fp32": True, "chunk_size_feed_forward": 4,
    # training
    "neftune_noise_alpha": 5.0, "attention_dropout": 0.1, "resid_pdrop": 0.1,
    "router_aux_loss_coef": 0.1, "initializer_range": 0.02, "label_smoothing": 0.1,
    # text and sampling
    "bos_token_id": 1, "eos_token_id": [1, 2], "padding_side": "left", "pad_to_multiple_of": 64,
    "do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_assistant_tokens": 20,
    "model_max_length": 4096, "max_seq_len": 4096, "seq_length": 2048,
    # what every Llama is
    "activation": "swiglu", "norm_type": "RMSNorm", "position_embedding_type": "rope",
    "is_causal": True, "use_rope": True, "layer_types": ["full_attention"] * 3, "no_bias": True,
    "hidden_activation": "silu", "is_decoder": True,
    # not used
    "rope_interleaved": False, "use_bias": False, "bias": "none", "qk_layernorm": False,
    "final_logit_softcapping": None, "clip_qkv": None, "num_experts": 0, "moe": {},
    "quantization_config": None, "sliding_window": None, "use_sliding_window": False,
    "max_window_layers": 28, "attention_bias": None, "embedding_multiplier": 1.0,
    "logits_scaling": 1, "partial_rotary_factor": 1.0, "attn_logit_softcapping": 0.0,
}  # fmt: skip
REFUSED = {
    # the network does something else
    "rope_interleaved": True, "rotary_pct": 0.25, "qk_layernorm": True, "use_qk_norm": True,
    "qkv_bias": True, "attention_bias": True, "no_bias": False, "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh", "activation": "relu", "mlp_act": "relu2",
    "norm_type": "layernorm", "position_embedding_type": "alibi", "attention_type": "linear",
    "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 128,
    "num_experts": 8, "num_nextn_predict_layers": 1, "use_parallel_residual": True,
    "parallel_attn": True, "alibi": True, "mup": True, "token_shift": True, "conv_kernel": 4,
    "num_memory_tokens": 4, "use_stable_embedding": True, "add_cross_attention": True,
    "peft_config": {"r": 8}, "audio_config": {"num_layers": 2}, "layer_norm_eps": 1e-5,
    "per_layer_config": {"0": {}}, "logit_softcap": 30.0, "clip_qkv": 8,
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "scale_emb": 12, "logit_scale": 0,
    "attention_multiplier": 1.0, "query_pre_attn_scalar": 256, "attn_temperature": 2.0,
    "transformers_weights": "other.safetensors", "something_new": 3,
    # it does not do what every Llama does
    "is_causal": False, "use_rope": False, "rms_norm": 0, "swiglu": False, "no_rope": True,
    "scale_attn_weights": False, "activation_function": "",
    # the weights are not plain numbers
    "quantization_config": {"quant_method": "awq"}, "quantization": {"bits": 4},
    "compression_config": {"format": "pack"}, "kv_cache_quant_algo": "FP8",
}  # fmt: skip


@pytest.mark.parametrize("key", HARMLESS)
def test_passes(key):
    keys.check({key: HARMLESS[key]}, ())


@pytest.mark.parametrize("key", REFUSED)
def test_stops_with_one_line_that_names_it(key):
    with pytest.raises(UserError) as caught:
        keys.check({key: REFUSED[key]}, ())
    line = str(caught.value)
    assert f"{key}={REFUSED[key]!r}" in line and "\n" not in line and len(line) < 200
    assert ("quantized" in line) == any(word in key for word in ("quant", "compression"))


def test_a_window_as_long_as_the_context_is_none():
    keys.check({"sliding_window": 256, "max_position_embeddings": 256}, {"max_position_embeddings"})
    keys.check({"sliding_window": 8, "use_sliding_window": False}, ())


@pytest.mark.parametrize("key", ["hidden_size", "vision_feature_layer", "image_token_index"])
def test_what_is_mapped_is_left_to_the_mapping(key):
    keys.check({key: object()}, {key})


def test_says_what_it_does_not_do(files, tiny, tmp_path, capsys):
    _, config_json, weights = tiny
    asked = {"attention_dropout": 0.1, "neftune_noise_alpha": 0.0, "resid_pdrop": None,
             "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}  # fmt: skip
    open_weights(files.write_hf(tmp_path / "model", config_json | asked, weights))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "attention_dropout=0.1: puna trains without it" in said[0]
    assert "auto_map names code of its own, which is not run" in said[1]


@pytest.mark.parametrize("level", ["", "text_config", "vision_config"])
def test_every_level_of_a_multimodal_file_is_looked_at(level):
    from puna.models.weights.config import from_hf
    from puna.models.weights.vision_table import from_hf as vision_from_hf

    def read(key, value):
        config = {"model_type": "llama4", "text_config": {}, "vision_config": {}}
        (config[level] if level else config)[key] = value
        from_hf(config)
        vision_from_hf(config | {"vision_config": WIDTHS | config["vision_config"]})

    read("made_by", None)
    read("x.y", 1)
    with pytest.raises(UserError, match="made_by=1 is not a key"):
        read("made_by", 1)


WIDTHS = {"intermediate_size": 4 * 768, "vision_output_dim": 4096}


@pytest.mark.slow
def test_transformers_gives_the_same_numbers_with_all_of_them(tmp_path):
    """Every key that passes, at once: logits as without them; puna loads that file."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    plain = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    plain.save_pretrained(tmp_path)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        wanted = plain(ids).logits.numpy()
    path = tmp_path / "config.json"
    # No GPU here, and transformers refuses what it does not allow together.
    left_out = {"attention_bias", "_attn_implementation_autoset", "problem_type", "id2label"}
    sampling = GenerationConfig._get_default_generation_params()
    extra = {k: v for k, v in HARMLESS.items() if k not in left_out} | {"torch_dtype": "float32"}
    config = json.loads(path.read_text())
    assert not keys.check(sampling, ())
    for more in ({"rope_theta": None}, extra, sampling):
        path.write_text(json.dumps(config | more))
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert np.array_equal(again(ids).logits.numpy(), wanted)
        model, params = load(tmp_path)
        ours = model.apply({"params": params}, ids.numpy()).logits_BTV
        np.testing.assert_allclose(ours, wanted, atol=2e-5)

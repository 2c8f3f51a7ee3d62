"""Models whose network is Llama's under another name, with other RoPE or biases: their logits."""

import jax
import numpy as np
import pytest

import puna
from puna.configs.errors import UserError
from puna.models.release.convert import convert

torch = pytest.importorskip("torch", reason="compares with transformers")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "yarn": YARN,
    "yarn, not rounded": YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn, its factor given": YARN | {"attention_factor": 0.7},
    "yarn, of DeepSeek": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
}
MODELS = {
    "mistral": transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "a window as long as the context": transformers.MistralConfig(**SIZES, sliding_window=64),
    "biases of attention": transformers.LlamaConfig(**SIZES, attention_bias=True),
    "biases of the MLP": transformers.LlamaConfig(**SIZES, mlp_bias=True),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "smollm3": transformers.SmolLM3Config(
        **SIZES | {"num_hidden_layers": 4}, pad_token_id=0, attention_bias=True
    ),
    **{
        name: transformers.LlamaConfig(**SIZES, rope_parameters=rope)
        for name, rope in ROPES.items()
    },
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_and_a_release(config, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    theirs.save_pretrained(tmp_path / "src")
    tokens = np.random.default_rng(0).integers(97, size=(2, 40))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    convert(tmp_path / "src", tmp_path / "release")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "release").eval()
    with torch.no_grad():
        released = again(torch.tensor(tokens)).logits.numpy()
    for path in ("src", "release"):
        model, params = puna.load(tmp_path / path)
        logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens).logits_BTV)
        assert np.max(np.abs(logits - wanted)) / np.max(np.abs(wanted)) < 1e-5
    assert np.max(np.abs(released - wanted)) / np.max(np.abs(wanted)) < 1e-5


def test_internlm_has_biases_where_it_says_so():
    from puna.models.weights import config

    sizes = SIZES | {"model_type": "internlm", "rms_norm_eps": 1e-6}
    assert config.from_hf(sizes)["attention_bias"] == "all"
    assert config.from_hf(sizes | {"bias": False})["attention_bias"] == "none"
    for key, value in (("bias", "all"), ("rotary", {"type": "dynamic", "base": 1e4})):
        with pytest.raises(UserError, match=f"{key}="):
            config.from_hf(sizes | {key: value})

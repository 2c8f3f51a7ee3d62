"""Models whose network is Llama's under another name or RoPE: the logits of `transformers`."""

import jax
import numpy as np
import pytest

import puna
from puna.models.release.convert import convert

torch = pytest.importorskip("torch", reason="compares with transformers")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=None),
        transformers.MistralConfig(**SIZES, sliding_window=64),  # never slides
        transformers.LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
        ),
    ],
    ids=["mistral", "a window as long as the context", "linear"],
)
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

"""Adapters against PEFT itself on transformers: what it saves is read, what is written it loads."""

import jax
import numpy as np
import pytest

import puna
from puna.models import leaf
from puna.models.adapters import is_adapted
from puna.models.weights import huggingface, peft

pytestmark = pytest.mark.slow
lora = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(intermediate_size=48, attn_implementation="eager", **SIZES)
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            intermediate_size=24, intermediate_size_mlp=48, num_local_experts=4,
            num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=8,
            attn_implementation="eager", pad_token_id=None, **SIZES,
        )
    ),
}  # fmt: skip
TARGETS = {
    "llama": {"target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens"],
              "modules_to_save": ["lm_head"], "rank_pattern": {"o_proj": 2}, "use_rslora": True},
    "llama4": {"target_modules": ["q_proj", "v_proj", "up_proj"],
               "target_parameters": ["feed_forward.experts.gate_up_proj",
                                     "feed_forward.experts.down_proj"],
               "alpha_pattern": {"experts.down_proj": 3.0}},
}  # fmt: skip


def randomize(model, adapters):
    """Random weights, or random adapters on those that there are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if adapters:
                if "lora_" in name:
                    tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(
                    1 + 0.1 * noise if "norm" in name else tensor.shape[-1] ** -0.5 * noise
                )
    return model.eval()


class Stored:
    """Adapters as a run has them."""

    folder, scale = "run", 1.0

    def __init__(self, params):
        self.params = params

    def adapter(self, path):
        found = self.params
        for name in path.split("/"):
            found = found[name]
        return (np.asarray(found.a), np.asarray(found.b)) if is_adapted(found) else None


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_peft(tmp_path, name):
    tokens = np.random.default_rng(0).integers(0, 64, (2, 20))

    def logits(model):
        with torch.no_grad():
            return model(torch.tensor(tokens), use_cache=False).logits.numpy()

    base = randomize(MODELS[name](), adapters=False)
    base.save_pretrained(tmp_path / "base")
    plain = logits(base)
    config = lora.LoraConfig(r=3, lora_alpha=4.0, task_type="CAUSAL_LM", **TARGETS[name])
    model = randomize(lora.get_peft_model(base, config), adapters=True)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert np.abs(wanted - plain).max() > 0.1 * np.abs(wanted).max()

    model, params = puna.load(tmp_path / "base", adapter=tmp_path / "adapter")
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens).logits_BTV)
    tolerance = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(apply(params), wanted, atol=tolerance)
    np.testing.assert_allclose(apply(leaf.merge(params)), wanted, atol=tolerance)

    table = huggingface.leaves(model.config, kind="llama4_text" if name == "llama4" else "llama")
    (tmp_path / "written").mkdir()
    peft.write(tmp_path / "written", table, Stored(params), None)
    again = lora.PeftModel.from_pretrained(
        MODELS[name]().from_pretrained(tmp_path / "base", attn_implementation="eager"),
        tmp_path / "written",
    ).eval()  # fmt: skip
    if name == "llama":  # modules_to_save of the first adapter is no adapter
        with torch.no_grad():
            head = torch.tensor(np.array(params["unembed"]["table_DV"]).T)
            again.base_model.model.lm_head.weight.copy_(head)
    np.testing.assert_allclose(logits(again), wanted, atol=tolerance)

"""Adapters against PEFT itself on transformers: what it saves is read, what is written it loads."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

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
MODELS: dict = {
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
MODELS["llama dora"] = MODELS["llama"]
TARGETS = {
    "llama": {"target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens"],
              "modules_to_save": ["lm_head"], "rank_pattern": {"o_proj": 2}, "use_rslora": True},
    "llama4": {"target_modules": ["q_proj", "v_proj", "up_proj"],
               "target_parameters": ["feed_forward.experts.gate_up_proj",
                                     "feed_forward.experts.down_proj"],
               "alpha_pattern": {"experts.down_proj": 3.0}},
    # Some layers alone: the others of their stack keep the lengths they have.
    "llama dora": {"target_modules": r".*(1\.self_attn\.[qo]_proj|down_proj|embed_tokens|lm_head)",
                   "use_dora": True, "use_rslora": True},
}  # fmt: skip


def randomize(model, adapters):
    """Random weights, or random adapters on those that there are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if adapters:
                if "magnitude" in name:
                    tensor.mul_(1 + 0.3 * noise)
                elif "lora_" in name:
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
        if not is_adapted(found):
            return None
        return tuple(x if x is None else np.asarray(x) for x in (found.a, found.b, found.m))


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
    towards = np.random.default_rng(1).normal(size=wanted.shape).astype(np.float32)
    (model(torch.tensor(tokens), use_cache=False).logits * torch.tensor(towards)).sum().backward()
    wanted_gradients = {
        n.replace(".default", ""): p.grad.numpy() for n, p in model.named_parameters()
        if "lora_" in n
    }  # fmt: skip
    assert np.abs(wanted - plain).max() > 0.1 * np.abs(wanted).max()

    model, params = puna.load(tmp_path / "base", adapter=tmp_path / "adapter")
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens).logits_BTV)
    tolerance = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(apply(params), wanted, atol=tolerance)
    np.testing.assert_allclose(apply(leaf.merge(params)), wanted, atol=tolerance)
    gradients = jax.jit(jax.grad(lambda params: (apply(params) * towards).sum()))(params)

    table = huggingface.leaves(model.config, kind="llama4_text" if name == "llama4" else "llama")
    (tmp_path / "written").mkdir()
    peft.write(tmp_path / "written", table, Stored(params), None)
    if name != "llama4":  # gate and up of the experts share one A there
        (tmp_path / "gradients").mkdir()
        peft.write(tmp_path / "gradients", table, Stored(gradients), None)
        found = load_file(tmp_path / "gradients" / peft.WEIGHTS)
        for key, y in wanted_gradients.items():
            x = found[key.replace("vector.weight", "vector")]
            if "_B" in key:  # the scale is a part of B here
                x = x * 4.0 / np.sqrt(len(wanted_gradients[re.sub("_B", "_A", key)]))
            np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max(), err_msg=key)
    again = lora.PeftModel.from_pretrained(
        MODELS[name]().from_pretrained(tmp_path / "base", attn_implementation="eager"),
        tmp_path / "written",
    ).eval()  # fmt: skip
    if name == "llama":  # modules_to_save of the first adapter is no adapter
        with torch.no_grad():
            head = torch.tensor(np.array(params["unembed"]["table_DV"]).T)
            again.base_model.model.lm_head.weight.copy_(head)
    np.testing.assert_allclose(logits(again), wanted, atol=tolerance)

"""Regenerate `fixtures/*.npz` from Hugging Face's models, the numbers puna is held to.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/reference/make_fixtures.py

float32 on the CPU with eager attention. Every file holds the config.json, the state dict
(`weight/NAME`), tokens, logits, the loss of the next token, the gradient of every tensor
(`gradient/NAME`), a prompt and its greedy continuation. The weights are large enough for each
feature to matter; the script switches every one off in turn and prints how far the logits move.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
MAX_BYTES = 300_000
CONTINUATION = 16

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 200.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
DENSE = {
    "model_type": "llama",
    "vocab_size": 59,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA4 = {
    "model_type": "llama4_text",
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 12,
    "intermediate_size_mlp": 20,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-2,  # large, so that its place in the QK norm shows
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 8,
    "floor_scale": 3,
    "attn_scale": 0.5,
    "attn_temperature_tuning": True,
    "use_qk_norm": True,
    # No band between the two factors, as in Scout.
    "rope_parameters": LLAMA3_ROPE | {"factor": 16.0, "high_freq_factor": 1.0},
}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}}
ALL_TOKENS = {"attention_chunk_size": 10_000}
FIRST_HEADS = "every query reads key head 0"
ZERO_ROUTED = "routed experts give 0"
ZERO_SHARED = "shared expert gives 0"
UNIT_NORMS = "norm weights are 1"

# name: (config, features to switch off: what they are -> how the config changes)
CASES = {
    "llama1": (DENSE, {"rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e30}}}),
    "llama2": (
        DENSE | {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        {"grouped heads": FIRST_HEADS, "norm weights": UNIT_NORMS},
    ),
    "llama3_1": (
        DENSE | {"num_key_value_heads": 2, "hidden_size": 32, "rms_norm_eps": 1e-5,
                 "num_hidden_layers": 2, "rope_parameters": LLAMA3_ROPE},
        {"rope scaling": PLAIN_ROPE},
    ),
    "llama3_2": (
        DENSE | {"num_key_value_heads": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
                 "head_dim": 8, "rope_parameters": LLAMA3_ROPE | {"factor": 32.0}},
        {"rope scaling": PLAIN_ROPE, "tied output": {"tie_word_embeddings": False}},
    ),
    "scout": (
        LLAMA4,
        {
            "chunks": ALL_TOKENS,
            "nope layers": {"no_rope_layers": [1] * 6},
            "temperature": {"attn_temperature_tuning": False},
            "qk norm": {"use_qk_norm": False},
            "rope scaling": PLAIN_ROPE,
            "norm eps": {"rms_norm_eps": 1e-5},
            "routed experts": ZERO_ROUTED,
            "shared expert": ZERO_SHARED,
        },
    ),
    "maverick": (
        LLAMA4 | {"num_local_experts": 6, "interleave_moe_layer_step": 2, "use_qk_norm": False,
                  "rms_norm_eps": 1e-5, "intermediate_size": 8} | PLAIN_ROPE,
        {
            "chunks": ALL_TOKENS,
            "nope layers": {"no_rope_layers": [1] * 6},
            "temperature": {"attn_temperature_tuning": False},
            "routed experts": ZERO_ROUTED,
            "shared expert": ZERO_SHARED,
        },
    ),
    "top2": (
        LLAMA4 | {"num_experts_per_tok": 2, "num_hidden_layers": 4, "num_local_experts": 6,
                  "no_rope_layer_interval": 2, "rms_norm_eps": 1e-5},
        {
            "second expert": {"num_experts_per_tok": 1},
            "chunks": ALL_TOKENS,
            "nope layers": {"no_rope_layers": [1] * 4},
            "routed experts": ZERO_ROUTED,
        },
    ),
}  # fmt: skip


def build(config, weights=None, seed=0):
    """Build the Hugging Face model of a config, with given or fresh random weights."""
    config = dict(config)
    llama4 = config.pop("model_type") == "llama4_text"
    config["rope_parameters"] = dict(config["rope_parameters"])  # transformers writes into it
    cls = transformers.Llama4TextConfig if llama4 else transformers.LlamaConfig
    made = cls(bos_token_id=None, eos_token_id=None, attn_implementation="eager", **config)
    model = (transformers.Llama4ForCausalLM if llama4 else transformers.LlamaForCausalLM)(made)
    model = model.eval()  # never model.to(dtype): that would ruin complex buffers
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if weights is not None:
            tensor.copy_(weights.get(name, weights["model.embed_tokens.weight"]))
        elif "norm" in name:
            tensor.copy_(1.0 + 0.2 * torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(_std(name, tensor) * torch.randn(tensor.shape, generator=generator))
    return model


def _std(name, tensor):
    if "embed_tokens" in name:
        return 0.7
    fan_in = tensor.shape[1]  # of a Linear [out, in] and of the experts [E, in, out] alike
    # Sharp attention and routing: a mean over keys would hide who sees whom.
    sharp = 1.8 if "q_proj" in name or "k_proj" in name or "router" in name else 1.2
    return sharp * fan_in**-0.5


def switch_off(config, weights, change):
    """Return the config and weights with one feature gone."""
    if isinstance(change, dict):
        return config | change, weights
    weights = dict(weights)
    for name, tensor in weights.items():
        if change == FIRST_HEADS and ("k_proj" in name or "v_proj" in name):
            heads = tensor.reshape(config["num_key_value_heads"], -1, tensor.shape[1])
            weights[name] = heads[:1].expand_as(heads).reshape(tensor.shape)
        if (change == UNIT_NORMS and "norm" in name) or (
            change == ZERO_ROUTED and "experts.down" in name
        ):
            weights[name] = torch.ones_like(tensor) * (change == UNIT_NORMS)
        if change == ZERO_SHARED and "shared_expert.down" in name:
            weights[name] = torch.zeros_like(tensor)
    return config, weights


def greedy(model, prompt):
    """Return the continuation, and the smallest lead of a choice over the next best.

    Full forward passes and transformers' own cached decoding must agree.
    """
    tokens, lead = prompt, np.inf
    for _ in range(CONTINUATION):
        with torch.no_grad():
            top = model(tokens, use_cache=False).logits[:, -1].topk(2)
        lead = min(lead, float((top.values[:, 0] - top.values[:, 1]).min()))
        tokens = torch.cat([tokens, top.indices[:, :1]], dim=1)
    cached = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else it takes the pad token's id for padding
        max_new_tokens=CONTINUATION,
        do_sample=False,
        pad_token_id=0,
    )
    if not torch.equal(cached, tokens):
        raise SystemExit("cached decoding differs from full forward passes")
    return tokens[:, prompt.shape[1] :], lead


def routing_margin(model, tokens):
    """Return the smallest gap between the last chosen and the first unchosen expert."""
    gaps, handles = [np.inf], []
    for module in model.modules():
        if type(module).__name__ == "Llama4Router":

            def hook(module, args, out):
                ranked = out[1].sort(dim=-1, descending=True).values
                gaps.append(float((ranked[:, module.top_k - 1] - ranked[:, module.top_k]).min()))

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return min(gaps)


def make(name, config, features, seed):
    """Write one fixture; return False where a choice in it hangs on rounding."""
    model = build(config, seed=seed)
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight")
    tokens = torch.randint(
        config["vocab_size"], (2, 27), generator=torch.Generator().manual_seed(seed + 1)
    )
    prompt = tokens[:, :5]
    continuation, lead = greedy(model, prompt)
    margin = routing_margin(model, tokens)
    if lead < 1e-2 or margin < 1e-3:
        return False

    out = model(tokens, use_cache=False)
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    loss.backward()
    logits, loss = out.logits.detach(), loss.detach()
    arrays = {
        "config": np.array(model.config.to_json_string()),
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits.numpy(),
        "loss": loss.numpy(),
        "prompt": prompt.numpy().astype(np.int32),
        "continuation": continuation.numpy().astype(np.int32),
    }
    parameters = dict(model.named_parameters())
    for key, tensor in weights.items():
        arrays[f"weight/{key}"] = tensor.numpy()
        arrays[f"gradient/{key}"] = parameters[key].grad.numpy()
    path = FIXTURES / f"{name}.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    size = path.stat().st_size
    print(
        f"{name}: seed {seed}, {size} bytes, loss {float(loss):.4f}, "
        f"max |logit| {float(logits.abs().max()):.2f}, "
        f"greedy lead {lead:.3f}, routing margin {margin:.4f}"
    )
    if size > MAX_BYTES:
        raise SystemExit(f"{path} is larger than {MAX_BYTES} bytes")
    for feature, change in features.items():
        changed, changed_weights = switch_off(config, weights, change)
        if "lm_head.weight" not in changed_weights:  # an output of its own instead of the tied one
            changed_weights = changed_weights | {
                "lm_head.weight": changed_weights["model.embed_tokens.weight"].flip(0)
            }
        with torch.no_grad():
            other = build(changed, changed_weights)(tokens, use_cache=False).logits
        print(f"  without {feature}: logits move by {float((other - logits).abs().max()):.3f}")
    return True


def main():
    FIXTURES.mkdir(exist_ok=True)
    for name, (config, features) in CASES.items():
        seed = 0
        while not make(name, config, features, seed):
            seed += 10


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(json.dumps({m.__name__: m.__version__ for m in (torch, transformers, np)}))
    main()

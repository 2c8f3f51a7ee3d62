"""Which keys of a `config.json` can change a number, decided by what a key can mean.

Keys that puna maps to its own are read in `config.py` and `vision_table.py`. Any other changes
nothing where
- its value says "not used" (null, false, 0, empty), or a factor is 1: unless that would switch off
  what every Llama does;
- its value names what every Llama is (SwiGLU, RMSNorm, RoPE, causal);
- it belongs to another program (`transformers.js_config`, `_flash_attn_2_enabled`), or is about how
  the numbers are computed, trained or sampled, or who made them, and about no part of the network.
What is left might change a number and is refused by its name.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ...configs.errors import UserError

# Keys that are known to change nothing, whose names alone do not say so.
_HARMLESS = {
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "for_llm_compressor",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "max_window_layers",  # of a sliding window, which has keys of its own
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pruned_heads",
    "remove_invalid_values",
    "tie_encoder_decoder",
    "tie_last_hidden_states",
}
# Keys with values that puna can honour: those values, and why no other.
_ONLY: dict[str, tuple[tuple, str]] = {
    "add_cross_attention": ((False,), "puna's text models are decoders"),
    "attention_bias": ((False,), "puna reads no biases of this type"),
    "hidden_act": (("silu", "swish"), "every Llama is SwiGLU"),
    "is_encoder_decoder": ((False,), "puna's text models are decoders"),
    "mlp_bias": ((False,), "puna reads no biases of this type"),
    "partial_rotary_factor": ((1,), "RoPE turns the whole head"),
    "per_layer_config": ((None, {}), "every layer of a Llama has one shape"),
    "sliding_window": ((None,), "no Llama has a sliding window"),
    "use_sliding_window": ((False,), "no Llama has a sliding window"),
}
_NAMES = re.compile(r"silu|swish|swi?glu|rms(norm)?|rope|rotary|causal|full(attention)?|default")
# What every Llama does: "not used" would be another network. Matched with the whole key.
_OWN = re.compile(
    r"(use_|is_|do_|has_|apply_|enable_)?(causal(_mask|_attention)?|rope|rotary(_emb(edding)?s?)?"
    r"|rms_?norm|((pre|input|final|post_attention)_)?(layer_?)?norm|swi?glu|(gated_)?(mlp|ffn)"
    r"|residual|softmax|scale_(attn|attention|qk)(_weights)?|(\w+_)?act(ivation)?(_fn|_func(tion)?)?"
    r"|(norm|normali[sz]ation|pos\w*|attn|attention|act|activation|mlp|ffn)_type)"
)
_FACTOR = r"multiplier|scale|scaling|factor"
_QUANTIZED = re.compile(r"quant|compression|sparsity|gptq|awq|bitsandbytes|exl2|hqq")
# Applied in training and nowhere else; puna's training has none of it.
_NOISE = re.compile(r"dropout|pdrop|droppath|drop_path|noise|jitter|neftune")


def _words(text: str) -> re.Pattern:
    """Any of these as whole words of a key."""
    return re.compile(rf"(^|_)({'|'.join(text.split())})(_|$)")


# How a number is computed, or how the weights came about: never which number it is.
_HOW = _words(
    "implementation impl flash sdpa xformers cache dtype fp16 bf16 fp32 bfloat16 amp precision "
    "device offload compile checkpointing liger unsloth vllm sglang onnx neuron mlx torchscript "
    "memory_efficient backend megatron deepspeed fsdp fused? batch ([te]p|pp)(_plan|_size)? "
    "(tensor|pipeline|sequence|context|data|model)_parallel(ism)? "
    "loss lr learning optim optimizer grad gradient init initializer initialization seed warmup "
    "epochs? train training pretraining pretrained finetun(ed|ing) frozen freeze labels? "
    "weight_decay dropout pdrop noise jitter neftune"
)
# Sampling, text, lengths and bookkeeping, where no part of the network is named beside it.
_ABOUT = _words(
    "sample sampling temperature beams? penalty ngram suppress forced bad_words early_stopping "
    "cutoff lookbehind assistant top_k top_p min_p typical_p generate generation return "
    "num_return_sequences max_new_tokens "
    "bos eos pad padded padding sep unk cls tokenizer prompt chat length len ctx "
    "name path version author licen[cs]e description comment url commit hash revision date created "
    "library task problem_type languages? datasets? tags? repo base_model llama id2label label2id"
)
_NETWORK = _words(
    "attn attention rope rotary norm layernorm heads? layers? mlp ffn experts? router moe scale "
    "scaling scalar multiplier factor softcap(ping)? logits? window bias residual embeddings? "
    "embd? emb positions? positional act activation qk kv qkv query keys? values? gated? mask "
    "causal hidden intermediate blocks? chunk memory state ssm conv alibi adapter lora"
)


def unused(value: Any) -> bool:
    """Whether a value says that what its key is about is not there."""
    if isinstance(value, Mapping):
        return all(map(unused, value.values()))
    if isinstance(value, list | tuple):
        return all(map(unused, value))
    return value is None or value in (False, 0, "") or str(value).lower() == "none"


def says_nothing(key: str, value: Any) -> bool:
    """Whether a value is the neutral one, whatever exactly the key means."""
    last = key.rpartition(".")[2]
    if value is None:
        return True
    if isinstance(value, bool) and (negated := re.fullmatch(r"(no|disable|without)_(\w+)", last)):
        return says_nothing(negated[2], not value)
    if last.endswith("_config") and isinstance(value, Mapping):
        return False  # even an empty one is of a part that there is, with its defaults
    if _OWN.fullmatch(last):
        return value is True or _names_llama(value)
    if re.search(_FACTOR, last) and not isinstance(value, bool | Mapping | list | str):
        # Of the scores of attention 1 is none: they are divided by sqrt(head_dim).
        return value == 1 and not re.search(r"att|query|qk|softmax", last)
    return unused(value) or _names_llama(value)


def _names_llama(value) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(
        isinstance(v, str) and _NAMES.fullmatch(re.sub("[-_ ]", "", v.lower())) for v in values
    )


def changes_nothing(key: str, value: Any) -> bool:
    """Whether no number of the network can depend on this key, which puna does not map."""
    name = key.lower()
    if name in _HARMLESS or name.startswith("_") or re.search(r"[.:/]", name):
        return True
    if _QUANTIZED.search(name):
        return says_nothing(name, value)
    if _HOW.search(name) or re.search(r"_token_(id|ids|index)$", name):
        return True
    if _ABOUT.search(name) and not _NETWORK.search(name):
        return True
    return says_nothing(name, value)


def check(values: Mapping[str, Any], known: Collection[str], prefix: str = "") -> None:
    """Refuse what might change a number and is not mapped.

    Args:
      values: an object of config.json.
      known: the keys that are mapped.
      prefix: what stands before the keys in messages.

    Raises:
      UserError: one line with the key and the value.
    """
    for key, value in values.items():
        if key in known:
            continue
        shown = f"config.json: {prefix}{key}={short(value)}"
        if key in _ONLY:
            allowed, why = _ONLY[key]
            if value not in allowed and not (value is None and key != "hidden_act"):
                wanted = " or ".join(repr(a) for a in allowed)
                if key != "sliding_window" or not _beyond(values, value):
                    raise UserError(f"{shown} must be {wanted}: {why}")
        elif not changes_nothing(key, value):
            if _QUANTIZED.search(key.lower()):
                raise UserError(
                    f"{shown}: the weights are quantized; load the unquantized model, or a GGUF "
                    "file of it"
                )
            raise UserError(
                f"{shown} is not a key that puna knows for a Llama; "
                "remove it if the weights do not depend on it"
            )


def _beyond(values, window) -> bool:
    """Whether a sliding window is switched off, or as long as the context."""
    if values.get("use_sliding_window") is False:
        return True
    longest = values.get("max_position_embeddings")
    return isinstance(longest, int) and isinstance(window, int) and window >= longest


def notes(values: Mapping[str, Any]) -> list[str]:
    """What a config asks for that changes no number of the network, and that puna does not do."""
    found = [
        f"config.json: {key}={short(value)}: puna trains without it"
        for key, value in values.items()
        if _NOISE.search(key.lower()) and not unused(value)
    ]
    classes = values.get("auto_map")
    if isinstance(classes, Mapping) and any("Model" in name for name in classes):
        found.append("config.json: auto_map names code of its own, which is not run")
    return found


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

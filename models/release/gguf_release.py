"""Writing a GGUF file that llama.cpp runs: a Llama's text model, its tokenizer and chat template.

Names and metadata are those of llama.cpp's own converter. Matrices may be float32, float16,
bfloat16 or Q8_0, norms and routers are always float32. A Llama 4 must be what llama.cpp takes every
Llama 4 for, see `weights/gguf.py`.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from .. import rope
from ..text import hub
from ..text.kinds import LLAMA3_PATTERN, LLAMA4_PATTERN
from ..text.tokenizer import Tokenizer, load_tokenizer
from ..weights import gguf, licences

# What `--dtype` may say, and GGUF's name for it.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def write(
    model,
    tokenizer: Tokenizer | None,
    path: pathlib.Path,
    name: str,
    dtype: str | None,
) -> None:
    """Write `path` as a whole GGUF file, one tensor at a time.

    Args:
      model: a source of `convert`.
      tokenizer: None for a file of weights alone, which llama.cpp cannot run.
      name: `general.name`.
      dtype: of matrices, a key of `DTYPES`; None keeps that of each.

    Raises:
      UserError: an architecture or tokenizer that the format cannot hold; nothing is left then.
    """
    library = _library()
    config: ModelConfig = model.config
    _check_expressible(config)
    if config.rope_ramp != "periods":
        raise UserError("--to=gguf writes no RoPE scaled by YaRN; use --to=hf")
    writer = library.GGUFWriter(None, gguf.architecture(config))
    _add_sizes(writer, config, name, model.origin["licence"])
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, config.vocab_size)
    plans = list(_plans(model, library, dtype))
    factors_J = _rope_factors(config)
    if factors_J is not None:
        plans.insert(0, ("rope_freqs.weight", factors_J.shape, "F32", lambda: factors_J))
    for tensor, shape, kind, _ in plans:
        quantization = library.GGMLQuantizationType[kind]
        block, size = library.GGML_QUANT_SIZES[quantization]
        count = int(np.prod(shape, dtype=object))
        writer.add_tensor_info(
            tensor, shape, np.dtype(np.float32), count // block * size, quantization
        )
    part = path.with_name(f".{path.name}.part")
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, kind, read in tqdm(plans, desc="writing", unit="tensor", disable=None):
            array = np.ascontiguousarray(read())
            if kind != "F32":
                with np.errstate(over="ignore"):
                    quantization = library.GGMLQuantizationType[kind]
                    array = library.quants.quantize(array, quantization)
            writer.write_tensor_data(array)
        writer.close()
        model.finish()
        if tokenizer is not None:
            _check_tokenizer(tokenizer, part)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _library():
    try:
        import gguf
    except ImportError:
        raise UserError("--to=gguf needs the package gguf: pip install 'puna[gguf]'") from None
    return gguf


def _add_sizes(writer, config: ModelConfig, name: str, licence: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    if licence in licences.LICENCES:
        writer.add_license(licence)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if gguf.architecture(config) == "llama4":
        writer.add_interleave_moe_layer_step(config.moe_interval)
        if config.moe_interval:
            writer.add_expert_count(config.num_experts)
            writer.add_expert_used_count(config.experts_per_token)
            writer.add_expert_feed_forward_length(config.expert_dim)
        if not config.chunk_size:
            writer.add_sliding_window(0)
    if config.rope_scaling_factor != 1.0:
        for key in gguf.SCALING:
            writer.add_float32(key, float(getattr(config, key.removeprefix("puna."))))


def _check_expressible(config: ModelConfig) -> None:
    if config.vision.num_layers or config.audio.num_layers:
        raise UserError("--to=gguf writes text models; use --to=hf for one with an encoder")
    if gguf.architecture(config) == "llama":
        return
    if config.bias_update_rate:
        raise UserError("--to=gguf has no place for the bias of a router "
                        f"(model.bias_update_rate={config.bias_update_rate})")  # fmt: skip
    for field, value in gguf.llama4_fields(config.num_experts, bool(config.chunk_size)).items():
        if (found := getattr(config, field)) != value:
            raise UserError(
                f"model.{field}={found} must be {value} for --to=gguf: llama.cpp has it so for "
                "every Llama 4 of this kind; use --to=hf"
            )


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What Llama 3.1's scaling divides each frequency by, [J]."""
    if config.rope_scaling_factor == 1.0:
        return None
    H = config.head_dim
    plain_J = config.rope_theta ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    return (plain_J / rope.frequencies(config)).astype(np.float32)


def _plans(model, library, dtype: str | None) -> Iterator[tuple]:
    """(name, shape, kind, a function that gives the float32 array) of each tensor."""
    block, _ = library.GGML_QUANT_SIZES[library.GGMLQuantizationType.Q8_0]
    for path, leaf in gguf.leaves(model.config).items():
        for layer, source in enumerate(leaf.sources):
            shape = source.hf_shape
            kind = DTYPES.get(dtype or model.dtype(path, layer).name, "F32")
            if len(shape) == 1 or source.name.endswith(gguf.ROUTER):
                kind = "F32"
            elif kind == "Q8_0" and shape[-1] % block:
                kind = "F16"  # as llama.cpp does with rows that no blocks fill

            def read(path=path, leaf=leaf, layer=layer, source=source):
                array = np.empty(source.hf_shape, np.float32)
                source.store(model.read(path, leaf, layer).astype(np.float32), array)
                return array

            yield source.name, shape, kind, read


def _add_tokenizer(writer, tokenizer: Tokenizer, vocab_size: int) -> None:
    made = json.loads(tokenizer.tokenizer_json())
    vocab: dict[str, int] = made["model"]["vocab"]
    added = {token["id"]: token for token in made["added_tokens"]}
    names = {i: piece for piece, i in vocab.items()}
    names |= {i: token["content"] for i, token in added.items()}
    if max(names) >= vocab_size:
        raise UserError(
            f"the tokenizer has the id {max(names)}, and the model an embedding of {vocab_size}"
        )
    pieces = [names.get(i, f"[UNUSED{i}]") for i in range(vocab_size)]
    if len(set(pieces)) < vocab_size:
        raise UserError("the tokenizer has a token twice, which a GGUF file cannot hold")
    unknown = made["model"].get("unk_token")

    def kind(i: int) -> int:
        if i not in names:
            return _UNUSED
        if i in added:
            if names[i] == unknown:
                return _UNKNOWN
            return _CONTROL if added[i]["special"] else _USER_DEFINED
        byte = made["model"].get("byte_fallback") and names[i].startswith("<0x")
        return _BYTE if byte and len(names[i]) == 6 else _NORMAL

    types = [kind(i) for i in range(vocab_size)]
    pre = _words(made)
    if pre is None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # SentencePiece's scores of a BPE: pieces stand in the order in which they are merged.
        writer.add_token_scores([-float(i) if t == _NORMAL else 0.0 for i, t in enumerate(types)])
        writer.add_add_space_prefix('"Strip"' in json.dumps(made["decoder"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        merges = made["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    for add, i in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_eos_token_id, tokenizer.eos_id),
        (writer.add_pad_token_id, tokenizer.pad_id),
    ):
        if i is not None:
            add(i)
    turn = next((i for n, i in tokenizer.special.items() if n in _TURN_ENDS), None)
    if turn is not None and turn != tokenizer.eos_id:
        writer.add_eot_token_id(turn)
    writer.add_add_bos_token(bool(tokenizer.begin_ids))
    writer.add_add_eos_token(False)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = [{"name": n, "template": t} for n, t in template.items()]
    if template:
        writer.add_chat_template(template)


_TURN_ENDS = ("<|eot_id|>", "<|eot|>", "<|im_end|>")


def _words(made: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits words; None for SentencePiece's way.

    Raises:
      UserError: it has no name for this way.
    """
    words = made.get("pre_tokenizer") or {}
    parts = words.get("pretokenizers", [words] if words else [])
    types = [part.get("type") for part in parts]
    if "ByteLevel" not in types:
        if not made["model"].get("byte_fallback"):
            raise UserError("the tokenizer is neither byte-level nor SentencePiece-like")
        return None
    pattern = next((p["pattern"].get("Regex") for p in parts if p.get("type") == "Split"), None)
    own = parts[types.index("ByteLevel")].get("use_regex", True)
    if pattern is None and not made["model"]["merges"]:
        return "gpt-2"  # nothing is merged, so words do not matter
    named = {LLAMA3_PATTERN: "llama-bpe", LLAMA4_PATTERN: "llama4"}
    if types == ["ByteLevel"] and own:
        return "gpt-2"
    if types == ["Digits", "ByteLevel"] and own and parts[0].get("individual_digits"):
        return "smollm"
    if types == ["Split", "ByteLevel"] and not own and pattern in named:
        return named[pattern]
    raise UserError("llama.cpp has no name for how this tokenizer splits words")


def _check_tokenizer(tokenizer: Tokenizer, path: pathlib.Path) -> None:
    """Raise UserError unless the file gives the ids of `tokenizer`."""
    again = load_tokenizer(path)
    for text in hub.PROBES:
        if again.encode(text) != tokenizer.encode(text) or again.begin_ids != tokenizer.begin_ids:
            raise UserError(f"as a GGUF file this tokenizer gives other ids for {text!r:.60}")

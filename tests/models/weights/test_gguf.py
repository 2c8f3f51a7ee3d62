"""GGUF files: every type that is read, the tokenizer inside, and files that lie."""

import struct

import numpy as np
import pytest

import puna
from puna.configs.errors import UserError
from puna.models.weights import gguf_files, huggingface
from puna.models.weights.load import open_weights

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

ALL = (slice(None), slice(None))
# Blocks of 32 and of 256 numbers.
SMALL = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
# Those that the package cannot quantise to, and where in a block their scales lie.
LARGE = {"Q2_K": (-4, -2), "Q3_K": (-2,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (-2,),
         "IQ4_NL": (0,), "IQ4_XS": (0,)}  # fmt: skip


def names(config):
    """GGUF name of each of Meta's tensors, whose order of RoPE pairs these files have too."""
    out = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    for i in range(config.num_layers):
        for a, b in {
            "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wq": "attn_q",
            "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
            "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
            "feed_forward.w3": "ffn_up",
        }.items():  # fmt: skip
            out[f"layers.{i}.{a}"] = f"blk.{i}.{b}"
    return {f"{a}.weight": f"{b}.weight" for a, b in out.items()}


def write(path, config, meta, kind="F32", extra=None, tokenizer=None, leave_out=(),
          frequencies=None):  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "block_count": config.num_layers, "context_length": config.max_positions,
        "embedding_length": config.embed_dim, "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "rope.dimension_count": config.head_dim, "attention.key_length": config.head_dim,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    for key, value in (values | (extra or {})).items():
        if key not in leave_out:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(key if "." in key and key.split(".")[0] == "general" else f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    if tokenizer is not None:
        tokenizer(writer)
    numbers = {}
    for theirs, ours in names(config).items():
        if theirs not in meta:
            continue
        used = gguf.GGMLQuantizationType["F32" if meta[theirs].ndim == 1 else kind]
        if kind in LARGE and meta[theirs].ndim > 1:
            block, size = gguf.GGML_QUANT_SIZES[used]
            rng = np.random.default_rng(len(numbers))
            rows, columns = meta[theirs].shape
            data = rng.integers(0, 128, (rows, columns // block * size), dtype=np.uint8)
            scales = data.reshape(rows, -1, size)  # small ones, or float16 could be infinite
            for at in (at % size for at in LARGE[kind]):
                scales[..., at : at + 2] = np.float16([0.01]).view(np.uint8)
        else:
            data = gguf.quants.quantize(meta[theirs], used)
        writer.add_tensor(ours, data, raw_dtype=used)
        numbers[theirs] = gguf.quants.dequantize(data, used)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


@pytest.mark.parametrize("kind", [*SMALL, *LARGE])
def test_reads_every_type(files, tmp_path, kind):
    wide = {"embed_dim": 256, "mlp_dim": 256, "head_dim": 64, "num_layers": 1}
    config = files.model_config(files.TINY | (wide if kind in LARGE else {}))
    hf = files.random_tensors(files.hf_shapes(config))
    numbers = write(tmp_path / "m.gguf", config, files.to_meta(config, hf), kind)
    opened = open_weights(tmp_path / "m.gguf")
    assert opened.config == config
    ours = {b: a for a, b in names(config).items()}
    for name, tensor in opened.tensors.items():
        wanted = numbers[ours[name]]
        index = (slice(None),) * len(tensor.shape)
        np.testing.assert_array_equal(np.asarray(tensor[index], np.float32), wanted)
        if len(tensor.shape) == 2:  # inside blocks too
            part = (slice(3, 21), slice(5, 30))
            np.testing.assert_array_equal(np.asarray(tensor[part], np.float32), wanted[part])
    if kind == "F32":
        _, params = puna.load(tmp_path / "m.gguf")
        np.testing.assert_array_equal(
            params["blocks"]["layer_0"]["attention"]["wq_DNH"],
            huggingface.to_puna(config, hf)["blocks"]["layer_0"]["attention"]["wq_DNH"],
        )


def test_tied_and_scaled_as_llama_3_2(files, tmp_path):
    config = files.model_config(
        files.TINY | {"tie_embeddings": True, "rope_scaling_factor": 32.0, "head_dim": 64}
    )
    f = config.rope_theta ** (-np.arange(0, 64, 2) / 64)
    wavelength, low, high, old = 2 * np.pi / f, 1.0, 4.0, 8192  # as convert_hf_to_gguf.py has it
    smooth = (old / wavelength - low) / (high - low)
    factors = 1 / ((1 - smooth) / 32.0 + smooth)
    factors = np.where(
        wavelength < old / high, 1.0, np.where(wavelength > old / low, 32.0, factors)
    )
    meta = files.to_meta(config, files.random_tensors(files.hf_shapes(config)))
    write(tmp_path / "m.gguf", config, meta, frequencies=factors)
    assert open_weights(tmp_path).config == config
    write(tmp_path / "m.gguf", config, meta, frequencies=np.sqrt(factors))
    with pytest.raises(UserError, match="is not the scaling of a published Llama 3"):
        open_weights(tmp_path)


# --- the tokenizer inside -----------------------------------------------------------------------


def byte_level(pre):
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|begin_of_text|>", "<|eot_id|>", *alphabet, "he", "ll", "hell"]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
        writer.add_token_merges(["h e", "l l", "he ll"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ messages }}")

    return tokens, add


@pytest.mark.parametrize("pre", ["llama-bpe", "llama4", "smollm", "gpt-2"])
def test_byte_level_tokenizer(files, tiny, tmp_path, pre):
    config, _, hf = tiny
    tokens, add = byte_level(pre)
    write(tmp_path / "m.gguf", config, files.to_meta(config, hf), tokenizer=add)
    tokenizer = puna.load_tokenizer(tmp_path / "m.gguf")
    assert tokenizer.vocab_size == len(tokens)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, (1,))
    assert tokenizer.chat_template == "{{ messages }}"
    ids = tokenizer.encode("hello")
    assert ids == [tokens.index("hell"), tokens.index("o")]
    for text in ("hello  wörld\n 12345 <|eot_id|>", " 🦙"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not {0, 1} & set(ids)
    assert puna.load_tokenizer(tmp_path).encode("hello") == tokenizer.encode("hello")


def test_sentencepiece_tokenizer_equals_sentencepiece(files, tiny, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra [llama]")
    text = "the llama walks over the puna and the other llama walks after it\n" * 40
    (tmp_path / "t.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(tmp_path / "t.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=300,
        model_type="bpe", byte_fallback=True, character_coverage=1.0,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    count = model.GetPieceSize()

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([model.IdToPiece(i) for i in range(count)])
        writer.add_token_scores([model.GetScore(i) for i in range(count)])
        writer.add_token_types([
            2 if model.IsUnknown(i) else 3 if model.IsControl(i) else 6 if model.IsByte(i) else 1
            for i in range(count)
        ])  # fmt: skip
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    config, _, hf = tiny
    write(tmp_path / "m.gguf", config, files.to_meta(config, hf), tokenizer=add)
    tokenizer = puna.load_tokenizer(tmp_path / "m.gguf")
    for sample in ("the llama walks", "other  puna é🦙", "after it and over", ""):
        ids = tokenizer.encode(sample)
        assert ids == model.EncodeAsIds(sample)
        assert tokenizer.decode(ids) == sample


def test_says_which_tokenizer_is_not_read(files, tiny, tmp_path):
    config, _, hf = tiny
    meta = files.to_meta(config, hf)
    write(tmp_path / "m.gguf", config, meta)
    with pytest.raises(UserError, match="holds no tokenizer"):
        puna.load_tokenizer(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", config, meta, tokenizer=byte_level("qwen2")[1])
    with pytest.raises(UserError, match="tokenizer.ggml.pre='qwen2' must be one of"):
        puna.load_tokenizer(tmp_path / "m.gguf")


# --- damaged and hostile ------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def container(tensors=b"", keys=b"", num_tensors=0, num_keys=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + tensors


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def described(name="x", shape=(4,), kind=0, offset=0):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset) + b"\0" * 64


def one(**kwargs):
    return container(described(**kwargs), ARCHITECTURE, 1, 1)


HOSTILE = {
    "only the magic": (b"GGUF", "beyond its end"),
    "version": (container(version=77), "GGUF version 77"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version"),
    "tensors without end": (container(num_tensors=2**60), "cannot fit"),
    "keys without end": (container(num_keys=2**63), "cannot fit"),
    "a long string": (container(keys=struct.pack("<Q", 2**62) + b"x" * 64, num_keys=1),
                      "beyond its end"),
    "a long array": (
        container(keys=text("k") + struct.pack("<IIQ", 9, 4, 2**61), num_keys=1), "beyond its end"
    ),
    "a long array of strings": (
        container(keys=text("k") + struct.pack("<IIQ", 9, 8, 2**61), num_keys=1), "an array of"
    ),
    "arrays in arrays": (
        container(keys=text("k") + struct.pack("<IIQ", 9, 9, 1) * 9, num_keys=1), "unknown type 9"
    ),
    "a key twice": (container(keys=ARCHITECTURE * 2, num_keys=2), "appears twice"),
    "alignment": (
        container(keys=text("general.alignment") + struct.pack("<II", 4, 0), num_keys=1),
        "must be a power of two",
    ),
    "no architecture": (container(keys=b"\0" * 99), "general.architecture=None"),
    "qwen2": (
        container(keys=text("general.architecture") + struct.pack("<I", 8) + text("qwen2"),
                  num_keys=1), "general.architecture='qwen2' must be llama or llama4",
    ),
    "mmproj": (
        container(keys=text("general.architecture") + struct.pack("<I", 8) + text("clip"),
                  num_keys=1), "is an image encoder alone (mmproj)",
    ),
    "dims without end": (one(shape=(1,) * 7), "has 7 dims"),
    "absurd shape": (one(shape=(2**62, 2**62)), "beyond its end"),
    "absurd offset": (one(offset=2**63), "beyond its end"),
    "just too far": (one(shape=(16,), offset=4), "beyond its end"),
    "type TQ1_0": (one(kind=34, shape=(256, 1)), "has type TQ1_0; read are F32"),
    "type 9999": (one(kind=9999), "has type 9999"),
    "blocks": (one(kind=8, shape=(33, 2)), "not made of blocks of 32"),
    "twice": (container(described() [:-64] + described(), ARCHITECTURE, 2, 1),
              "tensor x appears twice"),
    "no sizes": (one(), "llama.block_count is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_line(tmp_path, case):
    data, words = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "m.gguf")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.999])
def test_a_file_cut_short(files, tiny, tmp_path, share):
    config, _, hf = tiny
    write(tmp_path / "m.gguf", config, files.to_meta(config, hf))
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="its end|cannot fit"):
        open_weights(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("extra", "leave_out", "words"),
    [
        ({"expert_count": 8}, (), "llama.expert_count=8"),
        ({"rope.scaling.type": "yarn"}, (), "llama.rope.scaling.type=yarn"),
        ({"rope.dimension_count": 4}, (), "llama.rope.dimension_count=4"),
        ({"block_count": 10**6}, (), "layers cannot be made of"),
        ({"block_count": 4}, (), "tensor blk.3.attn_k.weight is missing"),
        ({"block_count": 2}, (), "is not part of this architecture"),
        ({"feed_forward_length": 48}, (), "the architecture says"),
        ({}, ("embedding_length",), "llama.embedding_length is missing"),
        ({"block_count": "three"}, (), "llama.block_count=three"),
    ],
)  # fmt: skip
def test_metadata_is_honoured_or_refused(files, tiny, tmp_path, extra, leave_out, words):
    config, _, hf = tiny
    meta = files.to_meta(config, hf)
    write(tmp_path / "m.gguf", config, meta, extra=extra, leave_out=leave_out)
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "m.gguf")
    assert words in str(caught.value)


def test_the_header_of_the_package_is_read_alike(files, tiny, tmp_path):
    config, _, hf = tiny
    write(
        tmp_path / "m.gguf", config, files.to_meta(config, hf), "Q8_0", tokenizer=byte_level("x")[1]
    )
    _, metadata, described = gguf_files.read_header(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert metadata.keys() == theirs.keys()
    assert all(np.array_equal(metadata[key], theirs[key]) for key in theirs)
    assert [(n, offset) for n, _, _, offset in described] == [
        (t.name, t.data_offset) for t in reader.tensors
    ]

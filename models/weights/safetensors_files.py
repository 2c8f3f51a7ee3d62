"""Hugging Face directories: config.json and weights, one file or sharded with an index.

Nothing in a file is trusted: `safetensors` checks each header against the file's length, the files
of `torch.save` are read without executing them, and shard names may not leave the directory.
"""

import dataclasses
import json
import pathlib
import re

import numpy as np

from ...configs import schema
from ...configs.errors import UserError
from . import config as hf_config
from . import (
    fp8,
    huggingface,
    keys,
    licences,
    rope_keys,
    tiled_vision_table,
    torch_files,
    vision_table,
)
from .tensors import BFLOAT16, File, Mapped, Tensor, Weights, check, warn

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16,
          "F8_E4M3": fp8.FLOAT8}  # fmt: skip
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
SAFE, BIN = (SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)
_MAX_JSON = 256 * 2**20
# What may hold the weights of a model in such a directory, read or not.
_WEIGHTS = re.compile(
    r".*\.safetensors(\.index\.json)?|(pytorch_|adapter_)model.*\.bin(\.index\.json)?"
    r"|consolidated.*\.pth|.*\.gguf|tf_model.*\.h5|flax_model.*\.msgpack"
)
# Old exports carry the RoPE frequencies of each layer; config.json has them too.
_ROPE = re.compile(r"(language_model\.)?model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def read_json(path: pathlib.Path) -> dict:
    """Read a JSON object.

    Raises:
      UserError: no such file, or something else in it.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UserError(f"{path}: is too large to be what its name says")
        value = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def _no_duplicates(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found


def is_whole(path: pathlib.Path, kinds=SAFE) -> bool:
    """Whether a directory has both config.json and weights in one of `kinds`."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in kinds)


def open_directory(path: pathlib.Path) -> Weights:
    """Open a Hugging Face directory and compare its tensors with its config.json.

    Raises:
      UserError: whatever keeps it from being loaded, in one line.
    """
    values = read_json(path / "config.json")
    tensors: dict[str, Tensor] = dict(open_tensors(path))
    if fp8.is_fp8(quantization := values.get("quantization_config")):
        del values["quantization_config"]
        tensors = fp8.dequantized(path, quantization, tensors)
        warn(f"{path}: weights in FP8 are read as the numbers they stand for; activations are not "
             "rounded")  # fmt: skip
    elif quantization is None and (odd := [n for n, t in tensors.items() if t.dtype == fp8.FLOAT8]):
        raise UserError(
            f"{path}: tensor {odd[0]} is in FP8, and config.json has no quantization_config of a "
            "kind that is read (compressed-tensors float-quantized, fbgemm_fp8, fp8)"
        )
    kind = values.get("model_type")
    several = kind == tiled_vision_table.MODEL_TYPE
    read = tiled_vision_table.from_hf if several else hf_config.from_hf
    fields = _fields(path / "config.json", read, values)
    prefix = ""
    if several:
        kind, prefix = hf_config.LLAMA, "language_model."
    if kind == "llama4":
        kind = hf_config.LLAMA4
        if any(name.startswith("language_model.") for name in tensors):
            prefix = "language_model."
        if values.get("vision_config") or any(n.startswith("vision_model.") for n in tensors):
            fields["vision"] = _fields(path / "config.json", vision_table.from_hf, values)
    model = schema.from_dict(fields, schema.ModelConfig, "model.")
    for level in (values, values.get("text_config"), values.get("vision_config")):
        for note in keys.notes(level or {}) + rope_keys.notes(level or {}):
            warn(f"{path}: {note}")
    check_depth(path, model, tensors)
    ignored = {name for name in tensors if _ROPE.fullmatch(name)}
    head, embedding = prefix + "lm_head.weight", prefix + "model.embed_tokens.weight"
    rewards = "score.weight" in tensors and head not in tensors
    if rewards:
        # Nothing is said of an output, which it lacks: the model is one without a table of its own.
        model = dataclasses.replace(model, tie_embeddings=True)
    if not model.tie_embeddings and embedding in tensors and head not in tensors:
        raise UserError(
            f"{path}: tensor {head} is missing; where it is the embedding, config.json must say "
            "tie_word_embeddings=true"
        )
    if model.tie_embeddings and head in tensors:
        # As transformers does it: what is in the file counts.
        if embedding not in tensors:
            tensors[embedding] = tensors.pop(head)
        elif same(tensors[head], tensors[embedding]):
            ignored.add(head)
        else:
            warn(
                f"{path}: {head} differs from the embedding that config.json ties it to; the file "
                "counts: the model is loaded as one that is not tied"
            )
            model = dataclasses.replace(model, tie_embeddings=False)
    table = huggingface.leaves(model, prefix, kind)
    table |= vision_table.leaves(model) | tiled_vision_table.leaves(model)
    if rewards:
        table[huggingface.REWARD] = huggingface.reward_leaf(model)
    check(path, table, tensors, ignored)
    return Weights(model, table, tensors, licences.origin_of(path, values))


def _fields(where: pathlib.Path, read, values) -> dict:
    """Map config.json; what has the wrong type is the user's to mend too."""
    for level in (values, values.get("text_config")):
        for key in ("rope_parameters", "rope_scaling", "text_config", "vision_config"):
            value = (level or {}).get(key) if isinstance(level, dict | None) else None
            if not isinstance(value, dict | None):
                raise UserError(f"{where}: {key}={str(value)[:60]!r} must be an object")
        heads = level.get("num_attention_heads", 1) if isinstance(level, dict) else 1
        if heads == 0 or not isinstance(heads, int):
            raise UserError(f"{where}: num_attention_heads={heads!r} must be at least 1")
    if not isinstance(values.get("model_type"), str | None):
        raise UserError(f"{where}: model_type={str(values['model_type'])[:60]} must be text")
    try:
        return read(values)
    except (AttributeError, ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{where}: a value has the wrong type ({error})") from None


def check_depth(path, config, tensors) -> None:
    """Refuse a depth that the files cannot have before a table of that size is built."""
    vision = config.vision
    if config.num_layers + vision.num_layers + vision.global_layers > len(tensors):
        raise UserError(
            f"{path}: {config.num_layers} layers cannot be made of {len(tensors)} tensors"
        )


def same(a, b) -> bool:
    """Whether two tensors hold the same numbers, read a few rows at a time."""
    if a.shape != b.shape:
        return False
    rows = max(1, 2**22 // max(1, int(np.prod(a.shape[1:]))))
    rest = (slice(None),) * (len(a.shape) - 1)
    for start in range(0, a.shape[0], rows):
        index = (slice(start, start + rows), *rest)
        one, other = a[index], b[index]
        if a.dtype == b.dtype and one.tobytes() == other.tobytes():
            continue  # NaN too
        if not np.array_equal(one.astype(np.float32), other.astype(np.float32)):
            return False
    return True


def open_tensors(path: pathlib.Path) -> dict[str, Mapped]:
    """The tensors of a directory's files of weights, by name.

    As in transformers, a whole `model.safetensors` counts where there is an index too, and both
    before `pytorch_model.bin`. What may hold weights and is not read is named on standard error.

    Raises:
      UserError: a shard is missing, damaged or named outside the directory, an index that is not
        true, a tensor that stands in two shards.
    """
    read = next((name for name in SAFE + BIN if (path / name).is_file()), None)
    if read is None:
        others = _weights_of(path)
        raise UserError(
            f"{path}: has none of {', '.join(SAFE + BIN)}"
            + (f": save {others[0]} as such with transformers' save_pretrained" if others else "")
        )
    whole = read in (SINGLE, BIN_SINGLE)
    place = None if whole else _read_index(path, read)
    shards = [read] if place is None else sorted(set(place.values()))
    if others := [name for name in _weights_of(path) if name not in {read, *shards}]:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        warn(f"{path}: {read} is read; ignored beside it: {', '.join(others[:4])}{more}")
    tensors: dict[str, Mapped] = {}
    for shard in shards:
        opened = torch_files.open_file if shard.endswith(".bin") else open_file
        for name, tensor in opened(path / shard).items():
            if name in tensors:
                raise UserError(f"{path / shard}: tensor {name} stands in another shard too")
            if place is not None and place.get(name) != shard:
                raise UserError(f"{path / shard}: tensor {name} is not where {read} says")
            tensors[name] = tensor
    if place is not None and (gone := sorted(place.keys() - tensors.keys())):
        raise UserError(f"{path / place[gone[0]]}: lacks tensor {gone[0]}, which {read} names")
    return tensors


def _read_index(path: pathlib.Path, index: str) -> dict[str, str]:
    """The shard of each tensor."""
    place = read_json(path / index).get("weight_map")
    if not isinstance(place, dict) or not all(isinstance(v, str) for v in place.values()):
        raise UserError(f"{path / index}: weight_map must be an object of file names")
    suffix = ".safetensors" if index == INDEX else ".bin"
    for shard in sorted(set(place.values())):
        if not re.fullmatch(r"[\w\-][\w.\-]*" + re.escape(suffix), shard):
            raise UserError(
                f"{path / index}: shard {shard!r} must be the plain name of a {suffix} file"
            )
        if not (path / shard).is_file():
            raise UserError(f"{path / index}: names {shard}, which is missing")
    return place


def _weights_of(path: pathlib.Path) -> list[str]:
    """Names of the files that may hold the weights of a model."""
    return sorted(p.name for p in path.iterdir() if _WEIGHTS.fullmatch(p.name) and p.is_file())


def open_file(path: pathlib.Path) -> dict[str, Mapped]:
    """The tensors of one safetensors file, by name; nothing but the header is read."""
    import safetensors

    file = File(path)
    try:
        with safetensors.safe_open(path, framework="np"):  # checks the whole header
            length = int.from_bytes(file.map[:8], "little")
        header = json.loads(file.map[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({str(error).splitlines()[0][:200]})") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} has dtype {entry['dtype']}; {', '.join(DTYPES)} are read"
            )
        begin = 8 + length + entry["data_offsets"][0]
        tensors[name] = Mapped(file, begin, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    file.release()
    return tensors

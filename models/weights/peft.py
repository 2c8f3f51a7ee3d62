"""Adapters of PEFT (adapter_config.json and adapter_model.safetensors), read and written.
Those of older versions, adapter_model.bin of `torch.save`, are read too.

A LoRA of a Linear is A [r, in] and B [out, r], and DoRA adds the lengths [out] of its rows. The
experts of a layer are one tensor and have one pair for all, in either of two layouts: since PEFT
0.19 A lies on the last dim of the tensor and B on the middle one, before it was the other way
round; this writes the newer one. Their gate and up are one tensor, whose single B says what both
read.

Letters beside those of `huggingface.py`: Z = rank.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.files import write_json
from ...configs.schema import ModelConfig
from . import config as hf_config
from . import huggingface, torch_files
from .huggingface import Leaf, Row, Source
from .safetensors_files import open_file, read_json
from .tensors import warn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BIN = "adapter_model.bin"
_PREFIX = "base_model.model."
_FUSED = "gate_up_proj"
_LENGTH = "lora_magnitude_vector"
# Keys of adapter_config.json that are read here, and those that say how an adapter was trained,
# found or is kept in memory: none of these changes what it computes.
_READ = {
    "alpha_pattern", "lora_alpha", "peft_type", "peft_version", "r", "rank_pattern",
    "target_parameters", "use_dora", "use_rslora",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a folder holds, on the host, by the paths of puna's parameters.

    factors: A and B, their scale included, as `adapters.Adapted` has them; zeros where a layer of a
    stack has none. magnitudes: of DoRA, m by the number of the layer in its stack. replaced: whole
    weights likewise.
    """

    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    magnitudes: dict[str, dict[int, np.ndarray]]
    replaced: dict[str, dict[int, np.ndarray]]
    config: ModelConfig


def factor_rows(row: Row, newer: bool = True) -> tuple[Row, ...]:
    """The rows of A and B, as puna has them, of the weight of a row, and of m where PEFT has it."""
    words = row.dims.split()
    if "experts." in row.hf:
        _, left, right = row.hf_dims.split()
        own = right.replace("S", "")
        a_dims, b_dims = f"{left} ZE" if newer else f"EZ {left}", f"EZ {right}"
        b_dims = b_dims if newer else f"{right} ZE"
        return (
            Row(row.puna, f"E {left} Z", "lora_B.weight" if newer else "lora_A.weight", a_dims),
            Row(row.puna, f"E Z {own}", "lora_A.weight" if newer else "lora_B.weight", b_dims,
                row.part),
        )  # fmt: skip
    out, inner = row.hf_dims.split()
    names = ("lora_A.weight", "lora_B.weight")
    if row.hf.endswith("embed_tokens.weight"):
        out, inner = inner, out  # it is looked up: A has the ids
        names = ("lora_embedding_A", "lora_embedding_B")
    first = " ".join(w for w in words if set(w) <= set(inner))
    last = " ".join(w for w in words if not set(w) <= set(inner))
    return (
        Row(row.puna, f"{first} Z", names[0], f"Z {inner}"),
        Row(row.puna, f"Z {last}", names[1], f"{out} Z"),
        Row(row.puna, last, _LENGTH, out),
    )


def _module(source: Source) -> str:
    return source.name.removesuffix(".weight")


def _factors(source: Source, rank: int, newer: bool = True) -> tuple[Source, Source]:
    """How A and B of one layer's weight lie in PEFT's tensors."""
    sizes = {**source.sizes, "Z": rank}
    a, b, *_ = factor_rows(source.row, newer)
    return Source(a.hf, a, sizes), Source(b.hf, b, sizes)


def _length(source: Source) -> Source | None:
    """How m of one layer's weight lies in PEFT's tensor, without its dims of size 1."""
    _, _, *m = factor_rows(source.row)
    return Source(m[0].hf, m[0], source.sizes) if m else None


# --- reading --------------------------------------------------------------------------------------


def read(path: pathlib.Path, base: pathlib.Path, config: ModelConfig) -> Adapter:
    """Read an adapter of the model at `base`.

    A tied embedding is untied where the adapter changes the embedding or the output: PEFT changes
    one of the two.

    Raises:
      UserError: it is not an adapter, is of another base, or needs what puna lacks.
    """
    values = read_json(path / CONFIG)
    _check_config(path / CONFIG, values)
    file = next((path / name for name in (WEIGHTS, _BIN) if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path}: holds no {WEIGHTS}; save the adapter as safetensors")
    tensors = {}
    for name, tensor in (torch_files.open_file if file.name == _BIN else open_file)(file).items():
        if not name.startswith(_PREFIX):
            raise UserError(f"{file}: tensor {name} must begin with {_PREFIX}")
        tensors[name.removeprefix(_PREFIX).removeprefix("language_model.")] = tensor
    if not tensors:
        raise UserError(f"{file}: holds no tensor")
    if config.tie_embeddings and any("embed_tokens" in n or "lm_head" in n for n in tensors):
        config = dataclasses.replace(config, tie_embeddings=False)
    table = huggingface.leaves(config, kind=_kind(base, config))
    pairs, lengths, whole = _sorted(path, tensors, values)
    factors, magnitudes, replaced = {}, {}, {}
    for name, leaf in table.items():
        layers = {}
        for i, source in enumerate(leaf.sources):
            if source.name in whole:
                replaced.setdefault(name, {})[i] = _whole(path, source, whole[source.name])
            if (module := _module(source)) in pairs:
                layers[i] = _read_pair(path, source, *pairs[module], values)
            if module in lengths:
                m = _read_length(path, source, lengths[module])
                magnitudes.setdefault(name, {})[i] = m
        if layers:
            factors[name] = _stacked(leaf, layers)
    known = {s.name for leaf in table.values() for s in leaf.sources}
    modules = {name.removesuffix(".weight") for name in known}
    for name in sorted({*pairs} - modules | {*whole} - known):
        raise UserError(f"{path}: {name} is not a weight of the model at {base}")
    if odd := [n for n, ab in factors.items() if not all(np.isfinite(x).all() for x in ab)]:
        warn(f"{file}: NaN or infinity in the adapter of {odd[0]}")
    return Adapter(factors, magnitudes, replaced, config)


def _kind(base: pathlib.Path, config: ModelConfig) -> str:
    """The family that names the base's tensors and orders its RoPE pairs."""
    if (base / "config.json").is_file() and base.is_dir():
        kind = str(read_json(base / "config.json").get("model_type", ""))
        return hf_config.LLAMA4 if kind.startswith("llama4") else hf_config.LLAMA
    return hf_config.family(config)


def _check_config(where, values: Mapping[str, Any]) -> None:
    if str(values.get("peft_type")).upper() != "LORA":
        raise UserError(f"{where}: peft_type={values.get('peft_type')!r} must be LORA")
    for key, value in values.items():
        if key in _READ | _HARMLESS or value in (None, False, 0, "", [], {}, "none"):
            continue
        raise UserError(f"{where}: {key}={str(value)[:60]} is not what puna computes; leave it out")
    init = values.get("init_lora_weights", True)
    if not isinstance(init, bool) and str(init).lower().startswith(("pissa", "olora", "loftq")):
        raise UserError(
            f"{where}: init_lora_weights={init} has changed the base; convert the adapter to a "
            "plain LoRA as PEFT's documentation says"
        )
    for key in ("r", "lora_alpha"):
        if not _positive(values.get(key)):
            raise UserError(f"{where}: {key}={values.get(key)!r:.60} must be a number above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(key) or {}
        if not isinstance(patterns, Mapping) or not all(map(_positive, patterns.values())):
            raise UserError(
                f"{where}: {key}={patterns!r:.60} must be an object of patterns and numbers above 0"
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"{where}: {key}: {pattern!r:.60} is no pattern ({error})"
                ) from None
    asked = values.get("target_parameters") or []
    if not isinstance(asked, list) or not all(isinstance(name, str) for name in asked):
        raise UserError(f"{where}: target_parameters={asked!r:.60} must be a list of names")


def _positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _sorted(path, tensors: Mapping[str, Any], values):
    """Tensors as pairs (A, B) and lengths by the module they adapt, and whole weights by names."""
    found: dict[str, dict[str, Any]] = {}
    lengths, whole = {}, {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(rf"(.+)\.{_LENGTH}(\.weight)?", name):
            lengths[match[1]] = tensor
        elif match := re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(\.weight)?", name):
            found.setdefault(match[1], {})[match[2]] = tensor
        else:
            whole[name.replace(".base_layer.weight", ".weight")] = tensor
    for module, pair in found.items():
        if len(pair) < 2:
            raise UserError(f"{path}: {module} has lora_A or lora_B alone")
    for module in sorted(lengths.keys() ^ (found.keys() if values.get("use_dora") else ())):
        raise UserError(
            f"{path}: use_dora={bool(values.get('use_dora'))} in {CONFIG}, and {module} has "
            f"{f'a {_LENGTH}' if module in lengths else f'no {_LENGTH}'}"
        )
    asked = {str(p).rpartition(".")[2] for p in values.get("target_parameters") or ()}
    pairs = {}
    for module, pair in found.items():
        if module.endswith(".experts.base_layer"):
            module = module.removesuffix("base_layer") + _FUSED
        elif module.endswith(".experts"):
            if f"{module}.base_layer" in found:
                module += ".down_proj"
            elif len(asked) == 1:
                module += f".{next(iter(asked))}"
            else:
                raise UserError(
                    f"{path}: {module} has one pair of tensors, and target_parameters={asked} "
                    "does not say of which parameter"
                )
        pairs[module] = (pair["A"], pair["B"])
    return pairs, lengths, whole


def _whole(path, source: Source, tensor) -> np.ndarray:
    if tuple(tensor.shape) != source.hf_shape:
        raise _other_base(path, source.name, tensor.shape, source.hf_shape)
    return source.load(tensor)


def _other_base(path, name, found, wanted) -> UserError:
    return UserError(
        f"{path}: {name} has shape {tuple(found)} and must have {tuple(wanted)}: the "
        "adapter is of another base"
    )


def _read_pair(path, source: Source, tensor_a, tensor_b, values):
    """A and B of one layer's weight, in float32, B with the scale."""
    of_experts = "experts." in source.row.hf
    rank = max(1, tensor_a.shape[0] // (source.sizes["E"] if of_experts else 1))
    shapes = [tuple(tensor_a.shape), tuple(tensor_b.shape)]

    def layout(newer):
        """The two factors by the name of the tensor that each lies in, A's first."""
        return dict(sorted((f.row.hf, f) for f in _factors(source, rank, newer)))

    layouts = [layout(newer) for newer in ((True, False) if of_experts else (True,))]
    wanted = [[f.hf_shape for f in layout.values()] for layout in layouts]
    if shapes not in wanted:
        raise _other_base(path, f"{_module(source)} (A, B)", shapes, wanted[0])
    older = wanted.count(shapes) == 2 and _version(values) < (0, 19)
    found = layouts[1 if older else wanted.index(shapes)]
    loaded = {
        factor.row: factor.load(np.asarray(tensor[:, :], np.float32))
        for factor, tensor in zip(found.values(), (tensor_a, tensor_b), strict=True)
    }
    a, b = (loaded[f.row] for f in _factors(source, rank, newer=found == layouts[0]))
    return a, b * np.float32(_scale(path, _module(source), rank, values))


def _read_length(path, source: Source, tensor) -> np.ndarray:
    """m of one layer, with dims of size 1 where A has its own."""
    found = _length(source)
    if found is None or tuple(tensor.shape) != found.hf_shape:
        wanted = found and found.hf_shape
        raise _other_base(path, f"{_module(source)}.{_LENGTH}", tensor.shape, wanted)
    m = found.load(np.asarray(tensor[:], np.float32))
    return m.reshape((1,) * (len(source.shape) - m.ndim) + m.shape)


def _version(values) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", str(values.get("peft_version") or "0"))[:2])


def _scale(path, module: str, rank: int, values) -> float:
    def of(patterns, default):
        for key, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    wanted = of(values.get("rank_pattern"), values["r"])
    if rank != wanted:
        raise UserError(f"{path}: {module} has rank {rank} and {CONFIG} says {wanted}")
    alpha = of(values.get("alpha_pattern"), values["lora_alpha"])
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _stacked(leaf: Leaf, layers: Mapping[int, tuple[np.ndarray, np.ndarray]]):
    """The factors of a stack of layers, of one rank; zeros add nothing."""
    if not leaf.stacked:
        return layers[0]
    rank = max(a.shape[-1] for a, _ in layers.values())
    a, b = next(iter(layers.values()))
    axis = a.ndim + b.ndim - 2 - len(leaf.sources[0].shape)  # of B's ranks, after experts
    shape_b = (*b.shape[:axis], rank, *b.shape[axis + 1 :])
    whole_a = np.zeros((len(leaf.sources), *a.shape[:-1], rank), np.float32)
    whole_b = np.zeros((len(leaf.sources), *shape_b), np.float32)
    for i, (a, b) in layers.items():
        whole_a[i, ..., : a.shape[-1]] = a
        whole_b[(i, *(slice(None),) * axis, slice(a.shape[-1]))] = b
    return whole_a, whole_b


# --- writing --------------------------------------------------------------------------------------


def write(folder: pathlib.Path, table: Mapping[str, Leaf], stored, base_model: str | None) -> None:
    """Write the adapters of a run in PEFT's newer layout.

    Args:
      table: of the model, as `huggingface.leaves` gives it.
      stored: a `run.Parameters`.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    adapted: dict[str, int] = {}
    rank = 0
    for path, leaf in table.items():
        found = stored.adapter(path)
        if found is None:
            continue
        if path == "embed/table_VD" and "unembed/table_DV" not in table:
            raise UserError(
                "the adapter of embed/table_VD is that of the output too, which PEFT cannot say: "
                "convert the merged model with --to=hf"
            )
        rank = found[0].shape[-1]
        for i, source in enumerate(leaf.sources):
            a, b, m = (x[i] if leaf.stacked and x is not None else x for x in found)
            module = _module(source)
            if m is not None:
                length = _length(source)
                if length is None:
                    raise UserError(
                        f"{path} has an adapter with adapter.dora=True, which PEFT cannot say of "
                        "experts: convert the merged model with --to=hf"
                    )
                tensors[module, _LENGTH] = np.zeros(length.hf_shape, np.float32)
                length.store(m.reshape(length.shape), tensors[module, _LENGTH])
            adapted[module] = adapted.get(module, 0) + rank
            _store(tensors, module, source, a, b)
    if not tensors:
        raise UserError(f"{stored.folder}: the run has no adapters; convert it with --to=hf")
    experts = {m for m in adapted if ".experts." in m}
    both = {
        m.rpartition(".")[0]
        for m in experts
        if {m.rpartition(".")[0] + f".{p}" for p in (_FUSED, "down_proj")} <= experts
    }
    named = {}
    for (module, name), tensor in tensors.items():
        if module in experts:
            module, _, parameter = module.rpartition(".")
            if parameter == _FUSED and module in both:
                module += ".base_layer"
        named[f"{_PREFIX}{module}.{name}"] = np.ascontiguousarray(tensor)
    save_file(named, folder / WEIGHTS, {"format": "pt"})
    ranks = {m: n for m, n in adapted.items() if n != rank}
    alphas = {m: stored.scale * n for m, n in ranks.items()}
    modules, parameters = sorted(adapted.keys() - experts), sorted(experts)
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.19.0",
        "base_model_name_or_path": base_model, "r": rank, "lora_alpha": stored.scale * rank,
        "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": modules,
        "target_parameters": parameters or None,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "use_dora": any(name == _LENGTH for _, name in tensors),
        "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    write_json(folder / CONFIG, values)


def _store(tensors, module: str, source: Source, a: np.ndarray, b: np.ndarray) -> None:
    """Write one layer's factors into PEFT's tensors.

    Gate and up share the tensor that says what they read: the ranks of up follow those of gate, and
    each half of the other tensor is zero at the ranks of the other.
    """
    rank = a.shape[-1]
    first, second = _factors(source, rank)
    of = [(s.row.hf, s.hf_shape, s, x) for s, x in ((first, a), (second, b))]
    for name, shape, factor, x in of:
        new = np.zeros(shape, np.float32)
        factor.store(np.asarray(x, np.float32), new)
        if (module, name) in tensors:
            experts = source.sizes["E"]
            old = tensors[module, name]
            if name == "lora_A.weight":  # E, then ranks, on the first dim
                old, new = (t.reshape(experts, -1, t.shape[1]) for t in (old, new))
                new = np.concatenate([old, new], 1).reshape(-1, old.shape[2])
            else:  # ranks, then E, on the last dim
                new = np.concatenate([old, new], 1)
        tensors[module, name] = new

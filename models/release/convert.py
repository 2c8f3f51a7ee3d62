"""`puna convert`: weights of others into a run of ours, any model into a release or a GGUF file.

Everything is written into a folder beside the destination that takes its name at the end, so a
destination is whole or absent. Tensors pass one leaf at a time and keep the dtype of their source
unless another is asked for.
Writing Meta's format is left out on purpose.
"""

import base64
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm.auto import tqdm

from ...configs import paths, schema
from ...configs.errors import UserError
from ...configs.files import write_json
from ..adapters import Adapted
from ..leaf import dense
from ..parallel import sharding
from ..text.tokenizer import Tokenizer, load_tokenizer
from ..weights import (
    adapter_sum,
    huggingface,
    licences,
    peft,
    placing,
    run,
    safetensors_files,
    vision_table,
)
from ..weights import config as hf_config
from ..weights.load import open_weights
from ..weights.tensors import Weights, cast, warn
from . import card, gguf_release

SHARD_BYTES = 5 * 10**9
DTYPES = ("bfloat16", "float16", "float32")
# Small leaves of a run are read together up to this.
_READ_BYTES = 2**28
_DTYPE_NAMES = {dtype: name for name, dtype in safetensors_files.DTYPES.items()}
# Copied as they are from a directory of others; what they mean is the tokenizer's business.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_KEPT_FILES = ("preprocessor_config.json", "processor_config.json")


def convert(
    src,
    dst,
    to: str = "hf",
    name: str | None = None,
    base_licence: str | None = None,
    ignore_licence_name: bool = False,
    shard_bytes: int = SHARD_BYTES,
    dtype: str | None = None,
    tokenizer: str | None = None,
    adapter: str = "",
) -> None:
    """Write the model at `src` in another format.

    Args:
      src: a Hugging Face or Meta directory, a GGUF file, a run of ours or one of its checkpoints.
      dst: a folder that does not exist or is empty; for "gguf" a file that does not exist.
      to: "hf" for a Hugging Face release, into which adapters are merged, "puna" for a run that
        `puna.load` reads in any process, "gguf" for a file that llama.cpp runs, "peft" for the
        adapters of a run alone.
      name: of the release, on its card; the folder's own name by default.
      base_licence: of the model that the weights come from, one of `licences.CHOICES`; by default
        what stands beside the weights.
      ignore_licence_name: write the release even if the licence does not allow its name.
      shard_bytes: largest file of weights, unless a single tensor is larger.
      dtype: one of `DTYPES`, of all tensors, or "q8_0" for "gguf"; by default each keeps its own.
      tokenizer: where the tokenizer lies; "none" to leave it out; by default beside the weights.
      adapter: of PEFT, as of `load`, to merge into weights of others in float32; the sum is rounded
        once, to the dtype of the weight.

    Raises:
      UserError: nothing readable at `src`, a destination in use, a name the licence forbids, an
        architecture that the format cannot hold, a value that `dtype` cannot hold, a tokenizer that
        cannot be read or written. The destination is then as it was.
    """
    if to not in ("hf", "puna", "gguf", "peft"):
        raise UserError(f"to={to!r} must be hf, puna, gguf or peft")
    dtypes = tuple(gguf_release.DTYPES) if to == "gguf" else DTYPES
    if dtype is not None and dtype not in dtypes:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(dtypes)} with to={to}")
    licences.check_choice(base_licence)
    src, dst = paths.local(src, "SRC"), paths.local(dst, "DST")
    _check_free(dst)
    model = _open(src, np.dtype(dtype) if dtype and to != "gguf" else None)
    if adapter:
        if to not in ("hf", "gguf") or isinstance(model, RunModel):
            raise UserError(
                f"--adapter={adapter} is merged into weights of others with --to=hf or --to=gguf; "
                f"{src} with --to={to} is not that: convert it to --to=hf first"
            )
        model = AdaptedModel(src, model.weights.to, adapter)
    text = _tokenizer_of(model, tokenizer)
    if base_licence is not None:
        model.origin = model.origin | {"licence": base_licence}
    name = name or dst.absolute().name
    if to == "puna":
        if not isinstance(model, OthersModel):
            raise UserError(f"{src}: is a run of puna already")
        with _whole(dst) as folder:
            _write_run(model, text, folder)
    elif to == "peft":
        if not isinstance(model, RunModel):
            raise UserError(f"{src}: is not a run of puna, so it has no adapters to write")
        with _whole(dst) as folder:
            model.write_adapters(folder)
    else:
        if not ignore_licence_name:
            licences.check_name(name, model.origin["licence"])
        if to == "gguf":
            dst.parent.mkdir(parents=True, exist_ok=True)
            gguf_release.write(model, text, dst, name.removesuffix(".gguf"), dtype)
            return
        with _whole(dst) as folder:
            home = src if isinstance(model, OthersModel) and not tokenizer else None
            _write_release(model, text, home, folder, name, shard_bytes)
        if model.origin["licence"] in licences.LICENCES and not model.origin["files"]:
            warn(
                f"{dst}: the licence of the base model ({model.origin['licence']}) must be "
                "copied beside the weights, and the source has no copy: add it as LICENSE"
            )


class OthersModel:
    """What others wrote, leaf by leaf."""

    def __init__(self, path: pathlib.Path, to: np.dtype | None):
        self.path = path
        self.weights: Weights = dataclasses.replace(open_weights(path), to=to)
        self.config = self.weights.config
        self.origin = self.weights.origin
        self.facts: dict[str, Any] = {}
        names = ("tokenizer.json", "tokenizer.model", "puna_tokenizer.json")
        self.has_tokenizer = path.is_file() or any(
            (path / name).exists() for name in names
        ) or any(path.glob("*.gguf"))  # fmt: skip

    def dtype(self, path: str, layer: int) -> np.dtype:
        source = self.weights.table[path].sources[layer]
        return self.weights.to or self.weights.tensors[source.name].dtype

    def read(self, path: str, leaf: huggingface.Leaf, layer: int) -> np.ndarray:
        """One layer of a leaf (0 where it is not stacked)."""
        return self.weights.read(self.weights.table[path].sources[layer])

    def finish(self) -> None:
        self.weights.warn_of_nonfinite(self.path)


class AdaptedModel(OthersModel):
    """What others wrote with an adapter in it, leaf by leaf."""

    def __init__(self, path: pathlib.Path, to: np.dtype | None, adapter: str):
        super().__init__(path, to)
        self.adapter = adapter_sum.read(adapter, path, self.config)
        self.config = self.adapter.config
        self.facts = {"init_from": f"{path} and the adapter {adapter}"}

    def _held(self, path: str) -> str:
        """Where the weights of a parameter lie: an output that was tied is the embedding."""
        return path if path in self.weights.table else "embed/table_VD"

    def dtype(self, path: str, layer: int) -> np.dtype:
        return super().dtype(self._held(path), layer)

    def read(self, path: str, leaf: huggingface.Leaf, layer: int) -> np.ndarray:
        held, dtype = self._held(path), self.dtype(path, layer)
        x = super().read(held, leaf, layer)
        if held != path:
            x = x.T
        new = self.adapter.replaced.get(path, {}).get(layer)
        x = x if new is None else cast(new, dtype, f"parameter {path}")
        factors = self.adapter.factors.get(path)
        if factors is None:
            return x
        a, b = (f[layer] if leaf.stacked else f for f in factors)
        m = self.adapter.magnitudes.get(path, {}).get(layer)
        if m is None and path in self.adapter.magnitudes:  # of another layer alone
            return x
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            whole = dense(Adapted(np.float32(x), a, b, 1.0, m))
        return cast(np.asarray(whole), dtype, f"parameter {path}")


class RunModel:
    """A checkpoint of ours, leaf by leaf, in the dtypes that it has on disk or in one for all."""

    def __init__(self, path: pathlib.Path, to: np.dtype | None):
        self.path, self.to = path, to
        self.folder = run.find(path)
        meta = run.read_meta(self.folder)
        config = schema.build(meta["config"])
        self.config, self.new_tokens = config.model, config.data.new_tokens
        self.has_tokenizer = bool(meta["tokenizer"])
        unknown = {"base_model": licences.UNKNOWN, "licence": licences.UNKNOWN, "files": {}}
        self.origin = unknown | (meta.get("origin") or {})
        home = path if (path / run.CHECKPOINTS).is_dir() else self.folder.parent.parent
        self.facts = card.facts_of_run(home, meta)
        self._held: dict[str, np.ndarray] = {}
        self._stored = run.Parameters(self.folder)
        self._paths = list(hf_table(self.config)[0])

    def dtype(self, path: str, layer: int) -> np.dtype:
        return self.to or self._stored.dtype(path)

    def read(self, path: str, leaf: huggingface.Leaf, layer: int) -> np.ndarray:
        if path not in self._held:
            self._held = self._stored.read(self._batch(path))
        value = self._held[path]
        if value.shape != leaf.shape:
            raise UserError(
                f"{self.folder}: parameter {path} has shape {value.shape}, "
                f"its config says {leaf.shape}"
            )
        return cast(value[layer] if leaf.stacked else value, self.to, f"parameter {path}")

    def write_adapters(self, folder: pathlib.Path) -> None:
        """Write the adapters alone, in PEFT's format."""
        if self.new_tokens:
            raise UserError(
                f"{self.path}: its base has rows of data.new_tokens={self.new_tokens}, which no "
                "base has that PEFT could load: convert the merged model with --to=hf"
            )
        peft.write(folder, hf_table(self.config)[0], self._stored, self.origin["base_model"])

    def _batch(self, first: str) -> list[str]:
        """A leaf and those that follow it while they are small: their checksums are one program."""
        paths, size = [], 0
        for path in self._paths[self._paths.index(first) :]:
            size += math.prod(self._stored.shape(path)) * self._stored.dtype(path).itemsize
            if paths and size > _READ_BYTES:
                break
            paths.append(path)
        return paths

    def finish(self) -> None:
        pass


def _open(src: pathlib.Path, to: np.dtype | None) -> OthersModel | RunModel:
    return RunModel(src, to) if run.is_run(src) else OthersModel(src, to)


def _tokenizer_of(model: OthersModel | RunModel, told: str | None) -> Tokenizer | None:
    """The tokenizer at the path `told`, else the one beside the weights, if there is one.

    Raises:
      UserError: it cannot be read.
    """
    if told and told != "none":
        return load_tokenizer(told)
    if told != "none" and model.has_tokenizer:
        try:
            return load_tokenizer(model.path)
        except UserError as error:
            raise UserError(
                f"{error}; --tokenizer=PATH takes another, --tokenizer=none leaves it out"
            ) from None
    warn(f"no tokenizer is written: {model.path} holds none" if not told else
         "no tokenizer is written, as --tokenizer=none says")  # fmt: skip
    return None


def _check_free(dst: pathlib.Path) -> None:
    if dst.is_symlink() or (dst.exists() and (not dst.is_dir() or any(dst.iterdir()))):
        raise UserError(f"{dst}: is in use; name a folder that does not exist or is empty")


@contextlib.contextmanager
def _whole(dst: pathlib.Path):
    """A folder that becomes `dst` if all goes well and vanishes otherwise."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(dir=dst.parent, prefix=f".{dst.name}."))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        if dst.exists():
            dst.rmdir()
        folder.rename(dst)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# --- a run of ours ------------------------------------------------------------------------------


def _write_run(model: OthersModel, tokenizer: Tokenizer | None, folder: pathlib.Path) -> None:
    # On the host, whose memory is the larger one, and unsplit: any mesh can read it.
    mesh = sharding.make_mesh(schema.MeshConfig(), jax.devices("cpu")[:1])
    params = placing.place(model.weights, mesh, title="converting")
    model.finish()
    half = all(x.dtype == "bfloat16" for x in jax.tree.leaves(params))
    architecture = dataclasses.replace(model.config, param_dtype="bfloat16" if half else "float32")
    seq_len = max(2, min(schema.DataConfig.seq_len, architecture.max_positions))
    config = schema.Config(model=architecture, data=schema.DataConfig(seq_len=seq_len))
    files = {}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as saved:
            tokenizer.save(saved)
            files = {p.name: p.read_bytes() for p in sorted(pathlib.Path(saved).iterdir())}
    meta = {
        "config": schema.to_dict(config),
        "data": {},
        "origin": model.origin,
        "tokenizer": {key: base64.b64encode(data).decode() for key, data in files.items()},
    }
    meta = run.seal(meta, params=params)
    with run.quiet_orbax(), ocp.CheckpointManager((folder / run.CHECKPOINTS).absolute()) as manager:
        manager.save(
            0, args=ocp.args.Composite(params=ocp.args.StandardSave(params),
                                       meta=ocp.args.JsonSave(meta)),
        )  # fmt: skip
        manager.wait_until_finished()


# --- a release ----------------------------------------------------------------------------------


def _write_release(
    model, tokenizer: Tokenizer | None, home: pathlib.Path | None, folder: pathlib.Path,
    name: str, shard_bytes: int,
) -> None:  # fmt: skip
    table, config_json = hf_table(model.config)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, home or folder, folder)
    main_dtype = _write_weights(model, table, folder, shard_bytes)
    ids, generation = {}, {}
    if tokenizer is not None:
        stops = [i for i in (tokenizer.eos_id,) if i is not None]
        stops += [i for i in tokenizer.stop_ids if i not in stops]
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
            "pad_token_id": tokenizer.pad_id,
        }
        generation = tokenizer.generation
        text = config_json.get("text_config", config_json)
        text |= ids
    write_json(folder / "config.json", config_json | {"dtype": main_dtype})
    write_json(folder / "generation_config.json", generation | ids)
    card.write(folder, name, model.config, model.origin, model.facts)
    model.finish()


def hf_table(config: schema.ModelConfig) -> tuple[dict[str, huggingface.Leaf], dict[str, Any]]:
    """The table and the config.json that a model has on Hugging Face.

    Raises:
      UserError: an architecture that Hugging Face's Llamas cannot express.
    """
    if not config.vision.num_layers:
        return huggingface.leaves(config), hf_config.to_hf(config)
    text = dataclasses.replace(config, vision=schema.VisionConfig())
    if hf_config.family(text) != hf_config.LLAMA4:
        raise UserError("model.vision.num_layers must be 0: only Llama 4 has an image encoder")
    text_json = hf_config.to_hf(text)
    del text_json["architectures"]
    config_json = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": text_json,
    } | vision_table.to_hf(config.vision)
    leaves = huggingface.leaves(config, "language_model.", hf_config.LLAMA4)
    return leaves | vision_table.leaves(config), config_json


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor goes: its file, the place in it, its shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: int
    offset: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def _write_weights(model, table, folder: pathlib.Path, shard_bytes: int) -> str:
    """Write the safetensors files; returns the dtype of most of their bytes."""
    slots = _plan(model, table, shard_bytes)
    files = 1 + max(slot.file for slot in slots.values())
    names = [safetensors_files.SINGLE]
    if files > 1:
        names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    starts = [
        _write_header(folder / names[i], {n: s for n, s in slots.items() if s.file == i})
        for i in range(files)
    ]
    total = sum(slot.size for slot in slots.values())
    with tqdm(
        total=total, desc="writing", unit="B", unit_scale=True, unit_divisor=1024, disable=None
    ) as bar:
        for path, leaf in table.items():
            for layer, source in enumerate(leaf.sources):
                slot = slots[source.name]
                block = model.read(path, leaf, layer)
                tensor = np.memmap(
                    folder / names[slot.file], slot.dtype, "r+",
                    starts[slot.file] + slot.offset, slot.shape,
                )  # fmt: skip
                source.store(block, tensor)
                tensor.flush()
                bar.update(block.size * slot.dtype.itemsize)
    if files > 1:
        place = {name: names[slot.file] for name, slot in slots.items()}
        index = {"metadata": {"total_size": total}, "weight_map": place}
        write_json(folder / safetensors_files.INDEX, index)
    sizes: dict[str, int] = {}
    for slot in slots.values():
        sizes[slot.dtype.name] = sizes.get(slot.dtype.name, 0) + slot.size
    return max(sizes, key=lambda dtype: sizes[dtype])


def _plan(model, table: Mapping[str, huggingface.Leaf], shard_bytes: int) -> dict[str, Slot]:
    kinds: dict[str, tuple] = {}
    for path, leaf in table.items():
        for layer, source in enumerate(leaf.sources):
            dtype = model.dtype(path, layer)
            if source.name in kinds:  # two leaves share a tensor
                dtype = np.result_type(dtype, kinds[source.name][1])
            kinds[source.name] = (source.hf_shape, dtype)
    slots, file, offset = {}, 0, 0
    # Layer by layer, so that whoever reads one layer opens one file.
    for name in sorted(kinds, key=lambda n: [int(p) if p.isdigit() else p
                                             for p in re.split(r"(\d+)", n)]):  # fmt: skip
        slot = Slot(*kinds[name], file, offset)
        if offset and offset + slot.size > shard_bytes:
            file, offset = file + 1, 0
            slot = dataclasses.replace(slot, file=file, offset=0)
        slots[name] = slot
        offset += slot.size
    return slots


def _write_header(path: pathlib.Path, slots: Mapping[str, Slot]) -> int:
    """Write a file's header and reserve the rest; returns where the tensors start."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, slot in slots.items():
        if slot.dtype not in _DTYPE_NAMES:
            raise UserError(f"tensor {name} has dtype {slot.dtype}, which is not written")
        header[name] = {
            "dtype": _DTYPE_NAMES[slot.dtype],
            "shape": slot.shape,
            "data_offsets": [slot.offset, slot.offset + slot.size],
        }
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    start = 8 + len(data)
    size = start + sum(slot.size for slot in slots.values())
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.flush()
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here and a crash later
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
    return start


def _write_tokenizer(tokenizer: Tokenizer, home: pathlib.Path, folder: pathlib.Path) -> None:
    """Copy the files of a Hugging Face directory; write such files for every other source."""
    for name in _KEPT_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    if not (home / "tokenizer.json").is_file() or not (home / "tokenizer_config.json").is_file():
        tokenizer.save_for_hub(folder)
        return
    for name in _TOKENIZER_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)

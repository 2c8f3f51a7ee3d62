"""`puna convert`: weights of others into a run of ours, any model into a release or a GGUF file.

Everything is written into a folder beside the destination that takes its name at the end, so a
destination is whole or absent. Tensors pass one leaf at a time and keep the dtype of their source
unless another is asked for.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from ...configs import paths, schema, storage
from ...configs.errors import UserError
from ...configs.files import write_json
from .. import quantize as quantization
from ..leaf import plain
from ..parallel import sharding
from ..text.tokenizer import Tokenizer, load_tokenizer
from ..transformer import abstract_params
from ..weights import huggingface, licences, placing, run, safetensors_files
from ..weights.tensors import warn
from . import card, gguf_release, meta_release, run_release
from .source import AdaptedModel, OthersModel, RunModel, open_model

FORMATS = ("hf", "puna", "meta", "gguf", "peft")
SHARD_BYTES = 5 * 10**9
DTYPES = ("bfloat16", "float16", "float32")
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
    quantize: str = "",
) -> None:
    """Write the model at `src` in another format.

    Args:
      src: a Hugging Face or Meta directory, a GGUF file, a run of ours or one of its checkpoints.
      dst: a folder that does not exist or is empty; for "gguf" a file that does not exist.
      to: "hf" for a Hugging Face release, into which adapters are merged, "puna" for a run that
        `puna.load` reads in any process, "meta" for Meta's layout, adapters merged too, "gguf" for
        a file that llama.cpp runs, "peft" for the adapters of a run alone.
      name: of the release, on its card; the folder's own name by default.
      base_licence: of the model that the weights come from, one of `licences.CHOICES`; by default
        what stands beside the weights.
      ignore_licence_name: write the release even if the licence does not allow its name.
      shard_bytes: largest file of weights, unless a single tensor is larger.
      dtype: one of `DTYPES`, of all tensors, or "q8_0" for "gguf"; by default each keeps its own.
      tokenizer: where the tokenizer lies; "none" to leave it out; by default beside the weights.
      adapter: of PEFT, as of `load`, to merge into weights of others in float32; the sum is rounded
        once, to the dtype of the weight.
      quantize: "int8", "int4" or "nf4": how "puna" keeps matrices, see `models/quantize.py`.

    Raises:
      UserError: nothing readable at `src`, a destination in use, a name the licence forbids, an
        architecture that the format cannot hold, a value that `dtype` cannot hold, a tokenizer that
        cannot be read or written. The destination is then as it was.
    """
    if to not in FORMATS:
        raise UserError(f"to={to!r} must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    dtypes = tuple(gguf_release.DTYPES) if to == "gguf" else DTYPES
    if dtype is not None and dtype not in dtypes:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(dtypes)} with to={to}")
    if quantize and (to != "puna" or quantize not in quantization.KINDS):
        raise UserError(
            f"quantize={quantize!r} must be {quantization.SPELT} with to=puna, else empty"
        )
    licences.check_choice(base_licence)
    src, dst = storage.anywhere(src, "SRC"), paths.local(dst, "DST")
    _check_free(dst)
    model = open_model(src, np.dtype(dtype) if dtype and to != "gguf" else None)
    if adapter:
        if to not in ("hf", "meta", "gguf") or isinstance(model, RunModel):
            raise UserError(
                f"--adapter={adapter} is merged into weights of others with --to=hf, meta or gguf; "
                f"{src} with --to={to} is not that: convert it to --to=hf first"
            )
        model = AdaptedModel(src, model.weights.to, adapter)
    text = _tokenizer_of(model, tokenizer)
    if base_licence is not None:
        model.origin = model.origin | {"licence": base_licence}
    name = name or dst.absolute().name
    if isinstance(model, RunModel) and model.rewards and to != "hf":
        raise UserError(f"{src}: is a reward model, which is written with --to=hf alone")
    if to == "puna":
        if not isinstance(model, OthersModel) and not quantize:
            raise UserError(f"{src}: is a run of puna already")
        with _whole(dst) as folder:
            _write_run(model, text, folder, quantize)
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
            if to == "meta":
                meta_release.write(model, text, folder, name)
            else:
                _write_release(model, text, home, folder, name, shard_bytes)
        if model.origin["licence"] in licences.LICENCES and not model.origin["files"]:
            warn(
                f"{dst}: the licence of the base model ({model.origin['licence']}) must be "
                "copied beside the weights, and the source has no copy: add it as LICENSE"
            )


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


def _write_run(model: OthersModel | RunModel, tokenizer: Tokenizer | None, folder: pathlib.Path,
               kind: str) -> None:  # fmt: skip
    # On the host, whose memory is the larger one, and unsplit: any mesh can read it.
    mesh = sharding.make_mesh(schema.MeshConfig(), jax.devices("cpu")[:1])
    if isinstance(model, RunModel):
        params = plain(run.load(model.folder, model.to and model.to.name, mesh)[1])
        params = quantization.quantize_tree(params, abstract_params(model.config), kind)
    else:
        each = functools.partial(quantization.quantize, kind=kind) if kind else None
        params = placing.place(model.weights, mesh, title="converting", each=each)
    model.finish()
    run_release.write(folder, params, model.config, model.origin, tokenizer)


# --- a release ----------------------------------------------------------------------------------


def _write_release(
    model, tokenizer: Tokenizer | None, home: pathlib.Path | None, folder: pathlib.Path,
    name: str, shard_bytes: int,
) -> None:  # fmt: skip
    table, config_json = model.table()
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

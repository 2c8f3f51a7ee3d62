"""`puna.load`: recognise what a path holds and read it."""

import dataclasses
import functools
import os
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding

from ...configs import paths, schema, storage
from ...configs.errors import UserError
from .. import quantize as quantization
from ..adapters import Adapted, is_adapted
from ..leaf import dense, split_names, with_magnitudes
from ..parallel import sharding
from ..transformer import Transformer, abstract_params
from . import adapter_sum, peft, placing, run
from .tensors import Weights


def load(path, dtype: str | None = "float32", mesh=None, quantize: str = "", adapter=None,
         rewards: bool = False):  # fmt: skip
    """Load a model for evaluation, generation or a notebook.

    Args:
      path: a Hugging Face directory, a Meta directory, a GGUF file, a run's folder (its newest
        checkpoint) or one checkpoint of it; a run also in object storage, `gs://BUCKET/RUN`.
      dtype: "float32" or "bfloat16", of the parameters and of the computation; None leaves every
        parameter as it is stored.
      mesh: a device mesh from `sharding.make_mesh`; all devices by default.
      quantize: "int8", "int4" or "nf4" keeps matrices as such numbers with scales, a parameter at
        a time, see `models/quantize.py`; dtype is then that of the computation and of the rest. A
        run that holds quantised weights has them in any case.
      adapter: folder of a PEFT LoRA of this model, which is laid on it in float32; `leaf.merge`
        adds it in. Several with weights, "0.7*DIR,0.3*DIR", are their exact sum. A dict of such by
        names has them side by side: `adapters.choose` gives each row of a batch one, and
        `decode.slots.Engine` each request.
      rewards: also read a reward model of others (`LlamaForSequenceClassification` with one label),
        which has no output; its vector is params["reward"]["head_D"].

    Returns:
      (model, params): `model.apply({"params": params}, tokens_BT).logits_BTV`;
      `model.config` is the `ModelConfig`.

    Raises:
      UserError: nothing there can be read.
    """
    if dtype not in ("float32", "bfloat16", None):
        raise UserError(f"dtype={dtype!r} must be float32 or bfloat16")
    if quantize and quantize not in quantization.KINDS:
        raise UserError(f"quantize={quantize!r} must be {quantization.SPELT}, or empty")
    each = functools.partial(quantization.quantize, kind=quantize) if quantize else None
    mesh = sharding.make_mesh(schema.MeshConfig()) if mesh is None else mesh
    path = storage.anywhere(path, "path")
    if run.is_run(path):
        model, params = run.load(path, dtype, mesh, each=each)
        config = model.config
        leaves = jax.tree.leaves(params, is_leaf=quantization.is_quantized)
        kinds = {quantization.kind_of(x) for x in leaves} - {""}
        # Among those of 4 bits there are int8 tables.
        held = next(iter(kinds - {"int8"}), "int8")
        if kinds and quantize not in ("", held):
            raise UserError(f"{path}: holds {held} weights: leave quantize={quantize!r} out")
    else:
        weights = open_weights(path, rewards)
        config = weights.config
        params = placing.place(weights, mesh, dtype, each=each)
        weights.warn_of_nonfinite(path)
    if dtype is not None:
        config = dataclasses.replace(config, compute_dtype=dtype, param_dtype=dtype)
    if isinstance(adapter, Mapping) and adapter:
        found, owners = adapter_sum.side_by_side(adapter, path, config)
        config, params = _lay_on(found, config, params, mesh, owners)
    elif adapter:
        config, params = _lay_on(adapter_sum.read(adapter, path, config), config, params, mesh)
    return Transformer(config), params


def _lay_on(adapter: peft.Adapter, config: schema.ModelConfig, params, mesh, owners=None):
    """The architecture and parameters of a model under an adapter.

    Args:
      owners: by path, whose the ranks are where it is several side by side.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    names = sharding.names(abstract_params(adapter.config))

    def put(path, leaf):
        return jax.tree.map(
            lambda x, n: jax.device_put(
                x, NamedSharding(mesh, sharding.resolve(path, x.shape, n, mesh))
            ),
            leaf, split_names(leaf, names[path]),
        )  # fmt: skip

    if config.tie_embeddings and not adapter.config.tie_embeddings:
        flat["unembed/table_DV"] = put("unembed/table_DV", flat["embed/table_VD"].T)
    for path, layers in adapter.replaced.items():
        old = flat[path]
        new = np.array(dense(old))
        for i, value in layers.items():
            new[i if path.startswith("blocks/") else ...] = value
        kind = quantization.kind_of(old)
        plain = put(path, new.astype(np.float32 if kind else old.dtype))
        flat[path] = quantization.quantize(plain, names[path], kind) if kind else plain
    for path, (a, b) in adapter.factors.items():
        if is_adapted(flat[path]):
            raise UserError(f"{path} has an adapter of the run's own; convert the run first")
        layers, m = adapter.magnitudes.get(path), None
        owner_r = owners and owners[path]
        if owners and path.startswith("blocks/"):
            owner_r = np.tile(owner_r, (len(a), 1))
        if layers:
            own = next(iter(layers.values())).shape
            m = np.ones((*flat[path].shape[: -len(own)], *own), np.float32)
        whole = put(path, Adapted(flat[path], a, b, 1.0, m, owner_r=owner_r))
        if layers:
            # Layers of a stack without an adapter keep the length that they have.
            m = with_magnitudes({"": whole}, {"": whole.base})[""].m
            for i, value in layers.items():
                m = m.at[i if path.startswith("blocks/") else ...].set(value)
            whole = whole.replace(m=m)
        flat[path] = whole
    return adapter.config, traverse_util.unflatten_dict(flat, sep="/")


def open_weights(path, rewards: bool = False) -> Weights:
    """Open what others wrote: a Hugging Face or Meta directory, or a GGUF file.

    Args:
      rewards: whether it may be a reward model.

    Raises:
      UserError: nothing there can be read, or it is damaged.
    """
    weights = _open(path)
    if weights.rewards and not rewards:
        raise UserError(
            f"{path}: is a reward model, which scores texts and writes none: measure it with "
            "puna eval --config=reward, or train it on with --config=reward --init_from"
        )
    return weights


def _open(path) -> Weights:
    if isinstance(path, str | os.PathLike) and paths.in_bucket(path):
        raise UserError(
            f"{path} is no run of puna with a finished checkpoint, and what others wrote is read "
            "from a path of this machine: copy it there first"
        )
    path = paths.local(path, "path")
    if not path.exists():
        raise paths.missing(path)
    if path.is_file():
        from . import gguf

        if gguf.is_gguf(path):
            return gguf.open_file(path)
        raise UserError(f"{path}: is not a GGUF file; other formats are given as their directory")
    from . import gguf_files, meta, safetensors_files

    # A folder may hold several formats: what is whole comes first.
    ggufs = gguf_files.models(path)
    if safetensors_files.is_whole(path):
        return safetensors_files.open_directory(path)
    if meta.is_whole(path):
        return meta.open_directory(path)
    if safetensors_files.is_whole(path, safetensors_files.BIN):
        return safetensors_files.open_directory(path)
    if len(ggufs) == 1:
        return _open(ggufs[0])
    if len(ggufs) > 1:
        raise UserError(f"{path}: holds {len(ggufs)} GGUF files: give one of them, as {ggufs[0]}")
    if (path / peft.CONFIG).exists():
        raise UserError(
            f"{path}: is an adapter of PEFT alone: give the folder of its base, and this one as "
            "--adapter; puna convert BASE MERGED --to=hf --adapter makes one model of both"
        )
    if (path / "config.json").exists():
        return safetensors_files.open_directory(path)
    if (path / "params.json").exists() or list(path.glob("consolidated*.pth")):
        return meta.open_directory(path)
    raise UserError(
        f"{path}: is neither a run of puna (no {run.CHECKPOINTS} folder), a Hugging Face directory "
        "(no config.json), a Meta directory (no params.json) nor a GGUF file"
    )

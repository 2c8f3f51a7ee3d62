"""`puna.load`: recognise what a path holds and read it."""

import dataclasses

from ...configs import paths, schema
from ...configs.errors import UserError
from .. import quantize as quantization
from ..parallel import sharding
from ..transformer import Transformer
from . import placing, run
from .tensors import Weights


def load(path, dtype: str | None = "float32", mesh=None, quantize: str = ""):
    """Load a model for evaluation, generation or a notebook.

    Args:
      path: a Hugging Face directory, a Meta directory, a GGUF file, a run's folder (its newest
        checkpoint) or one checkpoint of it.
      dtype: "float32" or "bfloat16", of the parameters and of the computation; None leaves every
        parameter as it is stored.
      mesh: a device mesh from `sharding.make_mesh`; all devices by default.
      quantize: "int8" keeps matrices as int8 with a scale for each output channel, a parameter at a
        time, see `models/quantize.py`; dtype is then that of the computation and of the rest.

    Returns:
      (model, params): `model.apply({"params": params}, tokens_BT).logits_BTV`;
      `model.config` is the `ModelConfig`.

    Raises:
      UserError: nothing there can be read.
    """
    if dtype not in ("float32", "bfloat16", None):
        raise UserError(f"dtype={dtype!r} must be float32 or bfloat16")
    if quantize and quantize not in quantization.KINDS:
        raise UserError(
            f"quantize={quantize!r} must be {' or '.join(quantization.KINDS)}, or empty"
        )
    each = quantization.quantize if quantize else None
    mesh = sharding.make_mesh(schema.MeshConfig()) if mesh is None else mesh
    path = paths.local(path, "path")
    if run.is_run(path):
        model, params = run.load(path, dtype, mesh, each=each)
        config = model.config
    else:
        weights = open_weights(path)
        config = weights.config
        params = placing.place(weights, mesh, dtype, each=each)
        weights.warn_of_nonfinite(path)
    if dtype is not None:
        config = dataclasses.replace(config, compute_dtype=dtype, param_dtype=dtype)
    return Transformer(config), params


def open_weights(path) -> Weights:
    """Open what others wrote: a Hugging Face or Meta directory, or a GGUF file.

    Raises:
      UserError: nothing there can be read, or it is damaged.
    """
    path = paths.local(path, "path")
    if not path.exists():
        raise paths.missing(path)
    if path.is_file():
        from . import gguf

        if gguf.is_gguf(path):
            return gguf.open_file(path)
        raise UserError(f"{path}: is not a GGUF file; other formats are given as their directory")
    from . import meta, safetensors_files

    # A folder may hold several formats: what is whole comes first.
    ggufs = sorted(path.glob("*.gguf"))
    if safetensors_files.is_whole(path):
        return safetensors_files.open_directory(path)
    if meta.is_whole(path):
        return meta.open_directory(path)
    if len(ggufs) == 1:
        return open_weights(ggufs[0])
    if len(ggufs) > 1:
        raise UserError(f"{path}: holds {len(ggufs)} GGUF files: give one of them, as {ggufs[0]}")
    if (path / "config.json").exists():
        return safetensors_files.open_directory(path)
    if (path / "params.json").exists() or list(path.glob("consolidated*.pth")):
        return meta.open_directory(path)
    raise UserError(
        f"{path}: is neither a run of puna (no {run.CHECKPOINTS} folder), a Hugging Face directory "
        "(no config.json), a Meta directory (no params.json) nor a GGUF file"
    )

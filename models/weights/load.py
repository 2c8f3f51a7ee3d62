"""`puna.load`: recognise what a path holds and read it."""

import dataclasses

from ...configs import schema
from ...configs.errors import UserError
from .. import sharding
from ..transformer import Transformer
from . import run


def load(path, dtype: str = "float32", mesh=None):
    """Load a model for evaluation, generation or a notebook.

    Args:
      path: a run's folder (its newest checkpoint) or one checkpoint of it.
      dtype: "float32" or "bfloat16", of the parameters and of the computation.
      mesh: a device mesh from `sharding.make_mesh`; all devices by default.

    Returns:
      (model, params): `model.apply({"params": params}, tokens_BT).logits_BTV`;
      `model.config` is the `ModelConfig`.

    Raises:
      UserError: nothing there can be read.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r} must be float32 or bfloat16")
    mesh = sharding.make_mesh(schema.MeshConfig()) if mesh is None else mesh
    if not run.is_run(path):
        raise UserError(f"{path} is not a run of puna: it has no {run.CHECKPOINTS} folder")
    model, params = run.load(path, dtype, mesh)
    config = dataclasses.replace(model.config, compute_dtype=dtype, param_dtype=dtype)
    return Transformer(config), params

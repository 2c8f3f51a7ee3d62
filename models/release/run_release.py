"""A run of ours that was never trained: one checkpoint with parameters and no optimizer."""

import base64
import dataclasses
import pathlib
import tempfile

import jax
import orbax.checkpoint as ocp

from ...configs import schema
from .. import quantize as quantization
from ..text.tokenizer import Tokenizer
from ..weights import run


def write(folder: pathlib.Path, params, architecture: schema.ModelConfig, origin: dict,
          tokenizer: Tokenizer | None) -> None:  # fmt: skip
    """Write it, with the tokenizer's files inside; plain parameters say the dtype of the config."""
    leaves = jax.tree.leaves(params, is_leaf=quantization.is_quantized)
    half = all(x.dtype == "bfloat16" for x in leaves if not quantization.is_quantized(x))
    architecture = dataclasses.replace(architecture, param_dtype="bfloat16" if half else "float32")
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
        "origin": origin,
        "tokenizer": {key: base64.b64encode(data).decode() for key, data in files.items()},
    }
    meta = run.seal(meta, params=params)
    with run.quiet_orbax(), ocp.CheckpointManager((folder / run.CHECKPOINTS).absolute()) as manager:
        manager.save(
            0, args=ocp.args.Composite(params=ocp.args.StandardSave(params),
                                       meta=ocp.args.JsonSave(meta)),
        )  # fmt: skip
        manager.wait_until_finished()

"""Reading a run of ours: where its checkpoints are, what they say, their parameters.

A run is DIR/checkpoints/STEP/ with the Orbax items `params`, `optimizer` and `meta`; `meta` is
JSON: the resolved config, the data position and the tokenizer's files. `train/checkpoint.py`
writes them.
"""

import base64
import json
import pathlib

import jax
import orbax.checkpoint as ocp

from ...configs import schema
from ...configs.errors import UserError
from .. import sharding
from ..transformer import Transformer, abstract_params

CHECKPOINTS = "checkpoints"


def steps(path) -> list[int]:
    """Steps of the finished checkpoints of a run, oldest first; empty where there is no run."""
    folder = pathlib.Path(path) / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.name.isdigit() and (p / "meta").is_dir())
    return sorted(int(p.name) for p in found)


def is_run(path) -> bool:
    """Whether a path is a run, or one checkpoint of a run."""
    path = pathlib.Path(path)
    return (path / CHECKPOINTS).is_dir() or ((path / "meta").is_dir() and path.name.isdigit())


def find(path, step: int | None = None) -> pathlib.Path:
    """The folder of a checkpoint: the newest of a run, or that of `step`.

    Raises:
      UserError: there is none.
    """
    path = pathlib.Path(path)
    if path.name.isdigit() and (path / "meta").is_dir():
        return path
    have = steps(path)
    if not have:
        raise UserError(f"{path} holds no finished checkpoint; is it the --workdir of a run?")
    if step is not None and step not in have:
        raise UserError(f"{path} has no checkpoint of step {step}; it has {have}")
    return path / CHECKPOINTS / str(have[-1] if step is None else step)


def read_meta(folder: pathlib.Path) -> dict:
    """What a checkpoint says of itself: config, data position, tokenizer files."""
    try:
        # Orbax would have all processes of a run read it at the same time.
        return json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: damaged checkpoint: {str(e).splitlines()[0]}") from e


def read_config(folder: pathlib.Path) -> schema.Config:
    """The resolved config that a checkpoint was trained with."""
    return schema.from_dict(read_meta(folder)["config"])


def tokenizer_files(folder: pathlib.Path) -> dict[str, bytes]:
    """The tokenizer's files by name, as they were saved with the checkpoint."""
    files = read_meta(folder)["tokenizer"]
    return {name: base64.b64decode(text) for name, text in files.items()}


def restore(folder: pathlib.Path, item: str, abstract):
    """Read one item into the shapes, dtypes and shardings of `abstract`.

    Raises:
      UserError: the files are damaged or hold something else.
    """
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(folder.absolute() / item, abstract)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: cannot restore {item}: {str(e).splitlines()[0]}") from e


def load(path, dtype: str, mesh, step: int | None = None):
    """The model and the parameters of a run, placed on the mesh and cast to `dtype`."""
    folder = find(path, step)
    config = read_config(folder).model
    boxed = abstract_params(config)
    places = sharding.shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        sharding.unbox(boxed), places,
    )  # fmt: skip
    params = restore(folder, "params", abstract)
    return Transformer(config), jax.tree.map(lambda x: x.astype(dtype), params)

"""Reading a run of ours: where its checkpoints are, what they say, their parameters.

A run is DIR/checkpoints/STEP/ with the Orbax items `params`, `optimizer` and `meta`; `meta` is
JSON: the resolved config, the data position, the tokenizer's files, a checksum of every array and
one of itself. `train/checkpoint.py` writes them. What is read is compared with its checksum, so a
damaged checkpoint is an error and never other numbers. DIR may be in object storage, where nothing
can be renamed at once: there a checkpoint is finished once the file COMMITTED is in it.
"""

import base64
import contextlib
import errno
import hashlib
import json
import logging
import pathlib
import stat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from ...configs import schema, storage
from ...configs.errors import MACHINE, MachineError, UserError, status, system_error
from ...configs.paths import absolute, is_url
from .. import adapters
from ..adapters import attach, is_adapted
from ..leaf import dense, split_names
from ..parallel import processes, sharding
from ..quantize import is_quantized, of_arrays
from ..transformer import Transformer, abstract_params
from .checksum import checksums
from .stored import Item
from .tensors import warn

CHECKPOINTS = "checkpoints"
# What does not train is saved once, in FROZEN/CHECKSUM/checkpoints/0/params.
FROZEN = "frozen"
COMMITTED = "commit_success.txt"  # as Orbax has it

# The arrays of a quantised weight, and of an adapter, after the path of the weight.
_ENDS = ("/values", "/scale", "/least", "/a", "/b", "/m")

# What the meta of a checkpoint can hold that was saved before there were checksums.
_UNSEALED = ({"config", "data", "tokenizer"}, {"config", "data", "tokenizer", "origin"})


class Damaged(UserError):
    """A checkpoint that is not what was saved."""


# Where reading fails: the machine, the user (such as a permission), or else the checkpoint. Of
# several processes' faults the first in this order counts.
_FAULTS = (MachineError, UserError, Damaged)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def _fault(error: Exception, folder: pathlib.Path) -> type[Exception]:
    """Which of the faults an error is: only files that are missing or wrong are damage."""
    if is_url(folder):
        return storage.fault(error) or Damaged
    said = system_error(error)
    if status(error) == MACHINE:
        return MachineError
    return Damaged if said is None or said.errno in _ABSENT else UserError


def _failed(fault: type[Exception], folder: pathlib.Path, what: str) -> Exception:
    return fault(f"{folder}: {'damaged checkpoint: ' if fault is Damaged else ''}{what}")


def steps(path) -> list[int]:
    """Steps of the finished checkpoints of a run, oldest first; empty where there is no run."""
    folder = storage.at(path) / CHECKPOINTS
    with storage.explained(folder):
        if not _is_folder(folder):
            return []
        found = (p for p in folder.iterdir() if p.name.isdigit() and _is_finished(p))
        return sorted(int(p.name) for p in found)


def _is_finished(folder: pathlib.Path) -> bool:
    return (folder / COMMITTED).exists() if is_url(folder) else _is_folder(folder / "meta")


def _is_folder(path: pathlib.Path) -> bool:
    """`Path.is_dir`, which in newer Pythons says of a disk that fails that there is nothing."""
    if is_url(path):
        return path.is_dir()
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_run(path) -> bool:
    """Whether a path is a run, or one checkpoint of a run."""
    path = storage.at(path)
    with storage.explained(path):
        return (path / CHECKPOINTS).is_dir() or ((path / "meta").is_dir() and path.name.isdigit())


def holds_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether anything is where the checkpoints of a run would be, finished or not."""
    folder = workdir / CHECKPOINTS
    with storage.explained(folder):
        return folder.is_dir() and any(folder.iterdir())


def find(path, step: int | None = None) -> pathlib.Path:
    """The folder of a checkpoint: the newest of a run, or that of `step`.

    Raises:
      UserError: there is none.
    """
    path = storage.at(path)
    with storage.explained(path):
        if path.name.isdigit() and (path / "meta").is_dir():
            return path
    have = steps(path)
    if not have:
        raise UserError(f"{path} holds no finished checkpoint; is it the --workdir of a run?")
    if step is not None and step not in have:
        raise UserError(f"{path} has no checkpoint of step {step}; it has {have}")
    return path / CHECKPOINTS / str(have[-1] if step is None else step)


@contextlib.contextmanager
def quiet_orbax():
    """Without the log of Orbax, which repeats what is raised with tracebacks of its threads."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def seal(meta: dict, known: dict | None = None, **items) -> dict:
    """Complete the meta of a checkpoint with the checksums of its items and of itself.

    Args:
      known: checksums of items that are made already, by name.
    """
    arrays = (known or {}) | {name: checksums(tree) for name, tree in items.items()}
    # As it will be read: JSON knows neither tuples nor numbers as keys.
    meta = json.loads(json.dumps(meta | {"checksums": arrays}))
    return meta | {"sha256": _digest(meta)}


def _digest(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_meta(folder: pathlib.Path) -> dict:
    """What a checkpoint says of itself: config, data position, tokenizer files, checksums.

    Raises:
      Damaged: it is not what was saved.
      MachineError, UserError: it cannot be read, which says nothing about what was saved.
    """
    try:
        # Orbax would have all processes of a run read it at the same time.
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        digest = meta.pop("sha256", None)
        whole = digest == _digest(meta) or (digest is None and meta.keys() in _UNSEALED)
    except Exception as e:
        malformed = isinstance(e, OSError | ValueError | AttributeError | TypeError)
        if not malformed and not is_url(folder):
            raise
        raise _failed(_fault(e, folder), folder, f"meta: {_first_line(e)}") from e
    if not whole:
        raise Damaged(f"{folder}: damaged checkpoint: meta is not what was saved")
    return meta


def ancestry(folder: pathlib.Path, meta: dict) -> list[dict]:
    """What a checkpoint's training has read, after that of the runs that it started from.

    Returns:
      the oldest first: `path`, `step`, and `read` as in `train.data.loader.provenance`.
    """
    before = (meta.get("origin") or {}).get("ancestors", [])
    read = meta.get("provenance")
    own = {"path": str(folder), "step": int(folder.name), "read": read}
    return [*before, own] if read else before


def read_config(folder: pathlib.Path) -> schema.Config:
    """The resolved config that a checkpoint was trained with.

    Not held to the rules that join keys: they may be newer than the run.
    """
    return schema.build(read_meta(folder)["config"])


def tokenizer_files(folder: pathlib.Path) -> dict[str, bytes]:
    """The tokenizer's files by name, as they were saved with the checkpoint."""
    files = read_meta(folder)["tokenizer"]
    return {name: base64.b64decode(text) for name, text in files.items()}


def restore(folder: pathlib.Path, item: str, abstract):
    """Read one item into the shapes, dtypes and shardings of `abstract`, and compare its checksums.

    Trees of the item that `abstract` does not name, such as an objective's own, are left out.
    With several processes all of them call this together; it succeeds in all or in none.

    Raises:
      Damaged: the files hold something else than was saved, or nothing that can be read.
      MachineError, UserError: they cannot be read, which says nothing about what was saved.
    """
    saved = read_meta(folder).get("checksums")
    found: Any = None
    error = None
    try:
        found = Item(folder / item).read(abstract)
    except Exception as e:  # damage shows in many ways
        error = e
    faults = processes.gather(error and _FAULTS.index(_fault(error, folder)))
    if any(fault is not None for fault in faults):
        fault = _FAULTS[min(fault for fault in faults if fault is not None)]
        reason = _first_line(error) if error else "another process cannot read its part"
        raise _failed(fault, folder, f"cannot restore {item}: {reason}") from error
    if saved is None:
        warn(f"{folder}: {item} has no checksums, as older versions saved it; it may be damaged")
        return found
    asked = {p: s for p, s in saved.get(item, {}).items() if p.partition("/")[0] in abstract}
    _compare(folder, item, checksums(found), asked)
    return found


def _compare(folder: pathlib.Path, item: str, now: dict[str, str], saved: dict[str, str]) -> None:
    for path in sorted(now.keys() | saved.keys()):
        if now.get(path) != saved.get(path):
            raise Damaged(f"{folder}: damaged checkpoint: {item}/{path} is not what was saved")


def frozen_name(sums: dict[str, str]) -> str:
    """The name of the folder that holds the parameters with these checksums."""
    return _digest(sums)[:16]


def restore_frozen(folder: pathlib.Path, abstract):
    """Read what does not train, as the checkpoint `folder` knows it; it lies beside checkpoints.

    Raises:
      Damaged: it is missing, or not what it was when the checkpoint was saved.
    """
    sums = read_meta(folder)["checksums"].get("frozen", {})
    return restore(_frozen_home(folder, sums), "params", abstract)


def _frozen_home(folder: pathlib.Path, sums: dict[str, str]):
    try:
        # Absolute: a checkpoint may be given as `2`, or `.`, from within.
        home = find(absolute(folder).parent.parent / FROZEN / frozen_name(sums))
        read_meta(home)
        return home
    except UserError as error:
        raise _failed(_fault(error, folder), folder, f"its frozen parameters: {error}") from None


class Parameters:
    """The parameters of a checkpoint by their paths, those that train and those that do not.

    A weight with an adapter is read merged with it.

    Args:
      folder: of the checkpoint, in a run's folder.

    Raises:
      Damaged: the checkpoint is not what was saved.
    """

    def __init__(self, folder: pathlib.Path):
        meta = read_meta(folder)
        sums, config = meta.get("checksums"), schema.build(meta["config"])
        self.scale = adapters.strength(config.adapter) if config.adapter.rank else 0.0
        self._merged = np.dtype(config.model.param_dtype)
        self.folder, self._sums = folder, sums and sums["params"]
        self._trained, self._frozen = Item(folder / "params"), None
        self._frozen_sums = (sums or {}).get("frozen", {})
        if self._frozen_sums:
            home = _frozen_home(folder, self._frozen_sums)
            self._frozen = Item(home / "params")

    def _place(self, path: str) -> tuple[Item, str, str | None]:
        """Which item holds a parameter, what it is called there, and its checksum."""
        if self._frozen and f"base/{path}" in self._frozen_sums:
            return self._frozen, f"base/{path}", self._frozen_sums[f"base/{path}"]
        return self._trained, path, self._sums and self._sums.get(path)

    def _open(self, path: str):
        item, name, _ = self._place(path)
        try:
            return item.open([name])[0]
        except ValueError as error:
            if "NOT_FOUND" in str(error):
                raise UserError(f"{self.folder}: parameter {path} is missing") from None
            raise _failed(_fault(error, self.folder), self.folder, _first_line(error)) from None

    def shape(self, path: str) -> tuple[int, ...]:
        parts = self._parts(path)
        opened = [self._open(part) for part in parts if part.removeprefix(path) in _ENDS[:3]]
        if not opened:
            return self._open(parts[0]).shape
        return of_arrays(
            *(jax.ShapeDtypeStruct(x.shape, x.dtype.numpy_dtype) for x in opened)
        ).shape

    def dtype(self, path: str) -> np.dtype:
        parts = self._parts(path)
        return self._open(parts[0]).dtype.numpy_dtype if parts == [path] else self._merged

    def _parts(self, path: str) -> list[str]:
        """The arrays of a weight, the one of its shape first."""
        sums = (self._sums or {}).keys() | {p.removeprefix("base/") for p in self._frozen_sums}
        parts = [f"{path}{end}" for end in ("", *_ENDS) if f"{path}{end}" in sums]
        return parts or [path]

    def read(self, paths: list[str]) -> dict[str, np.ndarray]:
        """Read some parameters, compared with their checksums.

        They are as they were saved; what is quantised or has an adapter is in the dtype of the
        run's parameters, rounded once.
        """
        parts = {path: self._parts(path) for path in paths}
        found = self._read([part for several in parts.values() for part in several])
        return {path: self._whole(path, several, found) for path, several in parts.items()}

    def _whole(self, path: str, parts: list[str], found: dict[str, np.ndarray]) -> np.ndarray:
        if parts == [path]:
            return found[path]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            values, scale, least, a, b, m = (
                jnp.asarray(found[p]) if (p := path + end) in found else None for end in _ENDS
            )
            base = found[path] if values is None else of_arrays(values, scale, least)
            leaf = base if a is None else adapters.Adapted(base, a, b, self.scale, m)
            return np.asarray(dense(leaf).astype(self._merged))

    def adapter(self, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
        """A and B of a weight's adapter, if it has one, and m of DoRA.

        The product of A and B counts `self.scale`.
        """
        parts = [p for name in "abm" if (p := f"{path}/{name}") in self._parts(path)]
        if not parts:
            return None
        found = self._read(parts)
        a, b, *m = (found[part] for part in parts)
        return a, b, m[0] if m else None

    def _read(self, paths: list[str]) -> dict[str, np.ndarray]:
        on_host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        found, saved = {}, {}
        for path in paths:
            item, name, saved[path] = self._place(path)
            leaf = jax.ShapeDtypeStruct(self.shape(path), self.dtype(path), sharding=on_host)
            try:
                found[path] = item.read({name: leaf})[name]
            except ValueError as error:
                what = f"cannot restore {path}: {_first_line(error)}"
                raise _failed(_fault(error, self.folder), self.folder, what) from None
        if self._sums:
            _compare(self.folder, "params", checksums(found), saved)
        return {path: np.asarray(x) for path, x in found.items()}


def _first_line(error: BaseException) -> str:
    """What went wrong at the bottom, without TensorStore's own description of it."""
    if said := system_error(error):
        return said.strerror or str(said)
    while error.__cause__:
        error = error.__cause__
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(" [tensorstore_spec")[0]


def load(path, dtype: str | None, mesh, step: int | None = None, each=None):
    """The model and the parameters of a run, placed on the mesh; cast unless `dtype` is None.

    Args:
      each: as of `placing.place`.
    """
    folder = find(path, step)
    meta = read_meta(folder)
    config = schema.build(meta["config"])
    boxed, saved = abstract_params(config.model), meta.get("checksums", {})
    trained, frozen = saved.get("params", {}), saved.get("frozen", {})
    if config.adapter.rank:
        trains = adapters.box(boxed, config.adapter)
        rest = adapters.box_base(boxed, config.adapter)
    else:
        flat = traverse_util.flatten_dict(boxed, sep="/")
        trains, rest = (
            traverse_util.unflatten_dict(
                {path: p for path, p in flat.items() if (f"base/{path}" in frozen) == is_frozen},
                sep="/",
            )
            for is_frozen in (False, True)
        )
        trains = _box_quantized(trains, trained)
    found = restore(folder, "params", _as_stored(trains, trained, mesh))
    if rest:
        found = attach(
            found, restore_frozen(folder, _as_stored({"base": rest}, frozen, mesh))["base"]
        )
    names, flat = sharding.names(boxed), traverse_util.flatten_dict(found, sep="/")
    del found
    for path in flat:
        # One after another, so that there are never two whole models.
        flat[path] = _finished(flat[path], dtype, each, names[path])
    return Transformer(config.model), traverse_util.unflatten_dict(flat, sep="/")


def _box_quantized(boxed, sums: dict[str, str]):
    """Boxed parameters, of which some were saved quantised, as they were saved."""

    def one(path, p):
        names = [f"{sharding.path_name(path)}{end}" for end in _ENDS[:3]]
        parts = [_shape_of(sums[name]) for name in names if name in sums]
        if not parts:
            return p
        leaf = of_arrays(*parts)
        return jax.tree.map(sharding.Param, leaf, split_names(leaf, p.names))

    return jax.tree.map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, sharding.Param))


def _shape_of(checksum: str) -> jax.ShapeDtypeStruct:
    """Of the array that a checksum is of, which begins with its dtype and its shape."""
    dtype, _, rest = checksum.partition("[")
    return jax.ShapeDtypeStruct(tuple(map(int, rest.partition("]")[0].split(","))), dtype)


def _as_stored(boxed, sums: dict[str, str], mesh):
    """What to restore, in the dtypes that it has; a checksum begins with that of its array."""

    def one(path, p, place):
        known = str(sums.get(sharding.path_name(path), p.value.dtype.name))
        return jax.ShapeDtypeStruct(p.value.shape, known.partition("[")[0], sharding=place)

    return jax.tree.map_with_path(
        one, boxed, sharding.shardings(boxed, mesh), is_leaf=lambda x: isinstance(x, sharding.Param)
    )


def _finished(leaf, dtype: str | None, each, names):
    """A leaf in `dtype`, where it holds a plain array; adapters stay in float32."""
    if is_adapted(leaf):
        return leaf.replace(base=_finished(leaf.base, dtype, each, names))
    if is_quantized(leaf):
        return leaf
    leaf = leaf.astype(dtype or leaf.dtype)
    return each(leaf, names) if each else leaf

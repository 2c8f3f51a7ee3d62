"""Writing and restoring checkpoints with Orbax: asynchronous, atomic, checksummed, the newest kept.

One holds all that the run needs to resume bit for bit: parameters, optimizer, data position, the
resolved config and the tokenizer. `models/weights/run.py` has the layout and the checksums. Between
two of them `train.local_dir` can take others, on a disk that is faster and may be lost.
"""

import base64
import contextlib
import itertools
import math
import pathlib
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from ..configs import errors, paths, storage
from ..configs.errors import UserError
from ..configs.schema import Config, build, flatten, keys, to_dict
from ..models.parallel import processes
from ..models.weights import run
from ..models.weights.checksum import checksums
from ..models.weights.tensors import warn
from . import init_from
from .data import sources
from .state import TrainState

# What may differ between the run that saved and the run that resumes: where numbers are computed
# and what is kept of them meanwhile, what is reported, looked for and kept, what follows where
# something is wrong, and how long to train.
_FREE = (
    *("mesh.", "eval.", "data.workers", "data.data_dir", "data.validation", "train.steps"),
    *("train.log_every", "train.save_every", "train.eval_every", "train.keep", "train.local_"),
    *("model.remat", "model.pipeline_microbatches", "train.loss_chunk"),
    *("train.check_replicas_every", "train.bad_step", "data.bad_records", "data.licences"),
)
# What a key that holds paths means, however they are spelt.
_MEANINGS: dict[str, Callable] = {
    "data.train": sources.meaning,
    "data.tokenizer": lambda text: text if text in ("bytes", "train") else paths.real(text),
    "train.init_from": init_from.meaning,
}
# An array is stored in pieces of at most this size; each is unpacked as a whole to be read.
_CHUNK_BYTES = 4 * 2**20
# Replicas share the writing of an array where each has at least this much of it to write: cutting
# its part takes every device a program of its own.
_SLICE_BYTES = 2**20


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder.
      config: saved with every checkpoint and compared on restore.
      tokenizer_files: name -> bytes, saved with every checkpoint.
      origin: where the run comes from (see `init_from.lineage`), saved likewise.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: Config,
        tokenizer_files: dict[str, bytes],
        origin: dict | None = None,
    ):
        self.workdir = workdir
        self.train = config.train
        self.config = to_dict(config)
        self.origin = {} if origin is None else {"origin": origin}
        self.tokenizer = {n: base64.b64encode(b).decode() for n, b in tokenizer_files.items()}
        self.local = None
        if config.train.local_dir:
            # Runs that share the disk must not take each other's.
            disk = paths.local(config.train.local_dir, "train.local_dir")
            self.local = disk.joinpath(*paths.absolute(workdir).parts[1:])
        # The configuration that the newest restored checkpoint was saved with.
        self.restored: Config | None = None
        # Step -> validation loss, where it is known.
        self.losses: dict[int, float] = {}
        self._frozen: dict[str, str] | None = None
        self._managers: dict[pathlib.Path, ocp.CheckpointManager] = {}

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be saved."""
        return self._due(step) or (self.local is not None and not step % self.train.local_every)

    def _due(self, step: int) -> bool:
        return step == self.train.steps or not step % self.train.save_every

    def save(self, state: TrainState, step: int, data_position: dict,
             provenance: list[dict] | None = None) -> None:  # fmt: skip
        """Start saving; training continues while files are written.

        Args:
          provenance: what has been read, see `data.loader.provenance`.

        Raises:
          UserError: this or the save before it could not be written.
        """
        rest = {"step": state.step, "opt_state": state.opt_state}
        meta = run.seal(
            {"config": self.config, "data": data_position, "tokenizer": self.tokenizer,
             "provenance": provenance or []}
            | self.origin,
            {"frozen": self._frozen_sums(state.frozen)}, params=state.params, optimizer=rest,
        )  # fmt: skip
        # A step that is due nowhere is the last one on a machine that may be about to go.
        local = self.local is not None and self.due(step) and not self._due(step)
        folder = self.local if local else self.workdir
        # Of several processes Orbax can save one checkpoint at a time.
        self.wait()
        self._save_frozen(state.frozen, folder)
        with _explained(folder, "save"):
            self._manager(folder).save(
                step,
                args=ocp.args.Composite(
                    params=_in_chunks(state.params),
                    optimizer=_in_chunks(rest),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def _frozen_sums(self, frozen: dict) -> dict[str, str]:
        """Checksums of what does not train, made once: it never changes."""
        if self._frozen is None:
            self._frozen = checksums(frozen)
        return self._frozen

    def _save_frozen(self, frozen: dict, home: pathlib.Path) -> None:
        """Save what does not train, once beside the checkpoints of `home` that need it.

        A folder's name is the checksum of what it holds, so a run that begins anew with other
        weights never meets those of an earlier start.
        """
        if not frozen:
            return
        sums = self._frozen_sums(frozen)
        folder = home / run.FROZEN / run.frozen_name(sums)
        if not any(processes.gather(not run.steps(folder))):
            return
        with _explained(folder, "save"):
            path = _made(folder / run.CHECKPOINTS)
            with _orbax(path) as manager:
                meta = ocp.args.JsonSave(run.seal({}, {"params": sums}))
                manager.save(0, args=ocp.args.Composite(params=_in_chunks(frozen), meta=meta))
                manager.wait_until_finished()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict] | None:
        """The newest whole state and its data position, or None where nothing is saved yet.

        Damaged checkpoints that are newer than a whole one are renamed, with a warning.

        Raises:
          UserError: all are damaged, of another config (which names the key), or of a step beyond
            `train.steps`.
        """
        folders = [run.find(self.workdir, step) for step in run.steps(self.workdir)]
        if self.local is not None:
            self._leave_another_run(self.local)
            folders += [run.find(self.local, step) for step in run.steps(self.local)]
        folders.sort(key=lambda folder: int(folder.name), reverse=True)
        found = newest_whole(folders, lambda folder: self._read(folder, abstract))
        for folder in filter(None, (self.workdir, self.local)):
            self._manager(folder)  # which also removes what a killed save has left
        step = int(found[0].step) if found else 0
        self.losses = {known: loss for known, loss in self.losses.items() if known <= step}
        return found

    def _read(self, folder, abstract):
        meta = run.read_meta(folder)
        self._check_config(folder, meta["config"])
        params = run.restore(folder, "params", abstract.params)
        rest = {"step": abstract.step, "opt_state": abstract.opt_state}
        rest = run.restore(folder, "optimizer", rest)
        frozen = abstract.frozen and run.restore_frozen(folder, abstract.frozen)
        self.restored = build(meta["config"])
        return TrainState(rest["step"], params, frozen, rest["opt_state"]), meta["data"]

    def _check_config(self, folder, saved):
        if int(folder.name) > (steps := self.train.steps):
            raise UserError(
                f"train.steps={steps} must be at least {folder.name}, the step of {folder}; "
                "raise it to train on, or take another --workdir"
            )
        # A key that is newer than the checkpoint had its default's meaning then.
        defaults = {name: default for name, _, default, _ in keys()}
        old, new = defaults | flatten(saved), flatten(self.config)
        for name in sorted(old.keys() | new.keys()):
            if name.startswith(_FREE):
                continue
            before, now = old.get(name), new.get(name)
            meaning = _MEANINGS.get(name, lambda value: value)
            if before != now and meaning(before) != meaning(now):
                raise UserError(
                    f"{name}={now!r} differs from {before!r} in {folder}; "
                    "resume with the same config, or take another --workdir"
                )

    def _leave_another_run(self, local):
        """Set aside local checkpoints whose workdir was removed: this run is a new one."""
        stale = bool(run.steps(local)) and not (self.workdir / "config.json").exists()
        # All have looked before the first one renames, and continue after it has.
        if any(processes.gather(stale)):
            if processes.is_first():
                kept = _set_aside(local / run.CHECKPOINTS, "old")
                warn(f"{local} has checkpoints of an earlier {self.workdir}; they are now {kept}")
            processes.gather(None)

    def _manager(self, folder: pathlib.Path) -> ocp.CheckpointManager:
        if folder not in self._managers:
            main = folder == self.workdir
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self if main else LatestN(1), cleanup_tmp_directories=True
            )
            with _explained(folder, "save"):
                path = _made(folder / run.CHECKPOINTS)
                self._managers[folder] = _orbax(path, options)
        return self._managers[folder]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Which checkpoints stay, as Orbax asks: the newest, the best, and some for ever."""
        del context
        steps, t = sorted(c.step for c in checkpoints), self.train
        kept = {*steps[-t.keep :], *self._best(steps)[: t.keep_best]}
        if t.keep_every:
            kept |= {step for step in steps if step % t.keep_every == 0}
        return [c.step in kept for c in checkpoints]

    def best(self) -> int | None:
        """The step of the checkpoint with the least validation loss; None where none is known."""
        return next(iter(self._best(self._manager(self.workdir).all_steps())), None)

    def _best(self, steps) -> list[int]:
        """Those of the steps whose validation loss is known, the best first."""
        known = [step for step in steps if math.isfinite(self.losses.get(step, math.nan))]
        return sorted(known, key=lambda step: (self.losses[step], step))

    def __enter__(self):
        return self

    def wait(self) -> None:
        """Until the last save has arrived.

        Raises:
          UserError: it could not be written.
        """
        for folder, manager in self._managers.items():
            with _explained(folder, "save"):
                manager.wait_until_finished()

    def __exit__(self, kind, error, traceback):
        for manager in self._managers.values():
            manager.close()


def prepare_to_resume(workdir: pathlib.Path) -> None:
    """Make the newest checkpoint of a run one that says what it is, if there is such a one.

    Raises:
      UserError: all are damaged, or the newest whole one is not the state of a training run.
    """
    folders = [run.find(workdir, step) for step in reversed(run.steps(workdir))]
    meta = newest_whole(folders, run.read_meta)
    if meta is not None and "optimizer" not in meta.get("checksums", {"optimizer": {}}):
        raise UserError(
            f"{workdir} holds weights without optimizer state, as `puna convert` writes them, so "
            f"there is nothing to resume; to train them, give --init_from={workdir} and another "
            "--workdir"
        )


def newest_whole(folders: list[pathlib.Path], read: Callable):
    """What `read` makes of the first checkpoint that is not damaged; those before it are set aside.

    They are renamed only if there is such a one: where none can be read the fault may lie
    elsewhere. With several processes all of them call this together.

    Returns:
      What `read` returned, or None where there are no checkpoints.

    Raises:
      UserError: all are damaged; it says how the first is.
    """
    damaged: dict[pathlib.Path, run.Damaged] = {}
    # Asking all of them is also waiting for all: none renames before all have looked.
    processes.gather(None)
    for folder in folders:
        found = None
        try:
            found = read(folder)
        except run.Damaged as error:
            damaged[folder] = error
        if not all(processes.gather(folder not in damaged)):
            damaged.setdefault(folder, run.Damaged(f"{folder}: damaged checkpoint"))
            continue
        if processes.is_first():
            for bad, error in damaged.items():
                warn(f"{error}; it is now {_set_aside(bad, 'damaged').name}, {folder} is used")
        processes.gather(None)
        return found
    for error in damaged.values():
        raise error
    return None


def _made(folder: pathlib.Path) -> pathlib.Path:
    folder = paths.absolute(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _set_aside(folder: pathlib.Path, why: str) -> pathlib.Path:
    """Rename a folder to a name that nothing has yet; in object storage by copying it."""
    names = (f"{folder.name}.{why}{n or ''}" for n in itertools.count())
    with storage.explained(folder):
        free = next(p for p in map(folder.with_name, names) if not p.exists())
        return folder.rename(free)


def _orbax(
    path: pathlib.Path, options: ocp.CheckpointManagerOptions | None = None
) -> ocp.CheckpointManager:
    """What writes and removes the checkpoints of a folder."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE_BYTES)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handlers = {
        name: ocp.PyTreeCheckpointHandler(type_handler_registry=types)
        for name in ("params", "optimizer")
    }
    handlers["meta"] = ocp.JsonCheckpointHandler()
    return ocp.CheckpointManager(path, options=options, item_handlers=handlers)


def _in_chunks(tree) -> ocp.args.PyTreeSave:
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    return ocp.args.PyTreeSave(tree, save_args=options)


@contextlib.contextmanager
def _explained(workdir: pathlib.Path, what: str):
    """Turn what the system says about files into one line."""
    try:
        yield
    except Exception as error:
        said, status = errors.system_error(error), errors.status(error)
        if paths.is_url(workdir) and (kind := storage.fault(error)):
            raise kind(
                f"{workdir}: cannot {what} a checkpoint: {errors.one_line(str(error))[:300]}; "
                "the checkpoint before it is whole"
            ) from error
        if said is None:
            raise
        kind = errors.MachineError if status == errors.MACHINE else UserError
        raise kind(
            f"{workdir}: cannot {what} a checkpoint: {said.strerror or said}; "
            "the checkpoint before it is whole"
        ) from error

"""Writing and restoring checkpoints with Orbax: asynchronous, atomic, the newest few kept.

One holds all that the run needs to go on bit for bit: parameters, optimizer, data position, the
resolved config and the tokenizer. `models/weights/run.py` has the layout.
"""

import base64
import logging
import pathlib
import re

import jax
import orbax.checkpoint as ocp

from ..configs.errors import UserError
from ..configs.schema import Config, to_dict
from ..models.weights import run
from .state import TrainState

# What may differ between the run that saved and the run that goes on: where numbers are computed,
# what is reported, and how long to go on.
_FREE = (
    *("mesh.", "eval.", "data.workers", "data.data_dir", "data.validation", "train.steps"),
    *("train.log_every", "train.save_every", "train.eval_every", "train.keep", "train.loss_chunk"),
)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder.
      config: saved with every checkpoint and compared on restore.
      tokenizer_files: name -> bytes, saved with every checkpoint.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, tokenizer_files: dict[str, bytes]):
        # Orbax logs what it also raises, with the tracebacks of its threads.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.workdir = workdir
        self.config = to_dict(config)
        self.tokenizer = {n: base64.b64encode(b).decode() for n, b in tokenizer_files.items()}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.train.keep, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(
            (workdir / run.CHECKPOINTS).absolute(), options=options
        )

    def save(self, state: TrainState, step: int, data_position: dict) -> None:
        """Start saving; the step goes on while files are written.

        Raises:
          UserError: this or the save before it could not be written.
        """
        meta = {"config": self.config, "data": data_position, "tokenizer": self.tokenizer}
        with _explained(self.workdir, "save"):
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(
                        {"step": state.step, "opt_state": state.opt_state}
                    ),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict] | None:
        """The newest state and its data position, or None where nothing is saved yet.

        Raises:
          UserError: the checkpoint is damaged, or of another config (which names the key).
        """
        if not run.steps(self.workdir):
            return None
        folder = run.find(self.workdir)
        meta = run.read_meta(folder)
        self._check_config(folder, meta["config"])
        params = run.restore(folder, "params", abstract.params)
        rest = {"step": abstract.step, "opt_state": abstract.opt_state}
        rest = run.restore(folder, "optimizer", rest)
        return TrainState(rest["step"], params, rest["opt_state"]), meta["data"]

    def _check_config(self, folder, saved):
        old, new = _flatten(saved), _flatten(self.config)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and not name.startswith(_FREE):
                raise UserError(
                    f"{name}={new.get(name)!r} differs from {old.get(name)!r} in {folder}; "
                    "go on with the same config, or take another --workdir"
                )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Wait for the last save."""
        try:
            if error is None:
                with _explained(self.workdir, "save"):
                    self.manager.wait_until_finished()
        finally:
            self.manager.close()


class _explained:
    """Turns what goes wrong with files into one line for the user."""

    def __init__(self, workdir: pathlib.Path, what: str):
        self.workdir, self.what = workdir, what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, (OSError, ValueError, RuntimeError, jax.errors.JaxRuntimeError)):
            lines = str(error).splitlines() or [type(error).__name__]
            # Of TensorStore's long chain of paths only what the system said is for people.
            system = re.search(r"([^:]+) \[os_error_code", lines[0])
            reason = system[1].strip() if system else lines[0]
            raise UserError(
                f"{self.workdir}: cannot {self.what} a checkpoint: {reason}; "
                "the checkpoint before it is whole"
            ) from error


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat

"""The training loop, to be read aloud."""

import os
import pathlib
from collections.abc import Callable, Mapping

import jax

from ..configs import schema
from ..configs.errors import ConfigError, UserError
from ..models import sharding
from ..models.transformer import Transformer, abstract_params
from . import metrics
from .checkpoint import Checkpoints
from .data import make_train_loader
from .data.tokenizer import prepare_tokenizer, tokenizer_files
from .optimizer import make_optimizer
from .state import TrainState, abstract_state, init_state
from .step import make_train_step

Evaluator = Callable[..., dict[str, float]]


def train(
    config: Mapping, workdir, evaluators: Mapping[str, Evaluator] | None = None
) -> TrainState:
    """Train, going on from the newest checkpoint in `workdir` if there is one.

    Args:
      config: a `ConfigDict`, as from `puna.get_config`.
      workdir: folder for checkpoints, tokenizer, config, metrics, plot and results.
      evaluators: name -> function of (config, model, params, tokenizer, mesh) giving numbers,
        called every `train.eval_every` steps and at the end; they are logged as `name_number`.

    Returns:
      The final `TrainState`.

    Raises:
      UserError: the config, the data or the folder will not do; one line says why.
    """
    c = schema.from_dict(config)
    workdir = _writable(pathlib.Path(workdir))
    mesh = sharding.make_mesh(c.mesh)
    _check_batch(c, mesh)
    tokenizer = prepare_tokenizer(c, workdir)
    rows = sharding.local_rows(mesh, c.train.batch_size)
    loader = make_train_loader(c.data, tokenizer, c.train.batch_size, rows, c.train.seed)

    model = Transformer(c.model)
    boxed = abstract_params(c.model)
    tx = make_optimizer(c, boxed)
    places = abstract_state(c, tx, mesh)
    print(sharding.table(sharding.unbox(boxed), sharding.shardings(boxed, mesh)), flush=True)

    with jax.set_mesh(mesh), Checkpoints(workdir, c, tokenizer_files(workdir)) as checkpoints:
        restored = checkpoints.restore(places)
        if restored is None:
            state = init_state(c, tx, mesh)
        else:
            state, position = restored
            loader.set_state(position)
        start = int(state.step)
        metrics.write_json(workdir / "config.json", schema.to_dict(c))
        print(f"step {start} of {c.train.steps}; compiling", flush=True)

        log = metrics.RunLog(c, workdir, start)
        step_fn = make_train_step(c, model, tx, tokenizer.token_bytes, places)
        for step in range(start + 1, c.train.steps + 1):
            batch = sharding.put_batch(mesh, log.fetch(loader), rows, c.train.batch_size)
            state, values = step_fn(state, batch)
            log.dispatched(step, values)
            last = step == c.train.steps
            if last or (c.train.eval_every and step % c.train.eval_every == 0):
                for name, evaluate in (evaluators or {}).items():
                    log.add(name, evaluate(c, model, state.params, tokenizer, mesh))
            if last or step % c.train.save_every == 0:
                checkpoints.save(state, step, loader.get_state())
        log.finish()
        loader.close()
    return state


def _writable(workdir: pathlib.Path) -> pathlib.Path:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir={workdir}: {e.strerror}; name a folder to write to") from e
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be written to; name another folder")
    return workdir


def _check_batch(c: schema.Config, mesh) -> None:
    """Every microbatch must split evenly over the devices."""
    rows, parts = c.train.batch_size // c.train.microbatches, sharding.batch_parts(mesh)
    if rows % parts:
        axes = " * ".join(f"mesh.{a}={mesh.shape[a]}" for a in sharding.RULES["batch"])
        raise ConfigError(
            f"train.batch_size={c.train.batch_size} / train.microbatches={c.train.microbatches} = "
            f"{rows} must be a multiple of {axes} = {parts}"
        )

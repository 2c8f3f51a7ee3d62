"""The training loop, to be read aloud."""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from ..configs import paths, schema, storage
from ..configs.errors import ConfigError, UserError
from ..configs.files import write_json
from ..models import adapters
from ..models.parallel import processes, sharding
from ..models.transformer import Transformer, abstract_params
from ..models.weights.tensors import warn
from . import metrics, objectives
from .checkpoint import Checkpoints, prepare_to_resume
from .data import make_train_loader
from .data.loader import provenance
from .data.packing import media_room
from .data.quarantine import prepare_quarantine
from .data.tokenizer import prepare_tokenizer, tokenizer_files
from .init_from import initial_state, lineage, resolve
from .optimizer import make_optimizer, schedule
from .profile import Profile
from .resilience.background import FILE as BACKGROUND
from .resilience.background import background_log
from .resilience.bad_steps import Watch
from .resilience.goodput import Ledger, process_start
from .resilience.lock import Lock, only_run
from .resilience.mirror import PUSH_SECONDS, Mirror
from .resilience.replicas import check_replicas
from .resilience.signals import Interrupted, Signals
from .state import TrainState, abstract_state, join
from .step import check_batch, make_train_step
from .validation import HeldOut

Evaluator = Callable[..., dict[str, float]]
EVALUATED = "data_bad_records"  # a number that the record of every evaluated step has


class Tasks(Protocol):
    """Asks a model the tasks of `eval.tasks` at some of the steps."""

    def due(self, step: int) -> bool:
        """Whether the state after a step is to be asked."""
        ...

    def __call__(self, model, params) -> dict[str, float]:
        """The numbers by the names that they have in the log; every process calls it."""
        ...


def train(
    config: Mapping, workdir, evaluators: Mapping[str, Evaluator] | None = None,
    tasks: Callable[[schema.Config, Any, Any], Tasks] | None = None, profile: int = 0,
) -> TrainState:  # fmt: skip
    """Train, resuming from the newest checkpoint in `workdir` if there is one.

    Args:
      config: a `ConfigDict`, as from `puna.get_config`.
      workdir: folder for checkpoints, tokenizer, config, metrics, plot and results; also one in
        object storage, `gs://BUCKET/RUN`.
      evaluators: name -> function of (config, model, params, tokenizer, mesh) giving numbers,
        called every `train.eval_every` steps and at the end; they are logged as `name_number`.
        None evaluates the loss on `data.validation`, if there is one, as `validation`.
      tasks: makes, of (config, tokenizer, mesh) and before the first step, what asks `eval.tasks`:
        `puna.eval.tasks.during.During`, which `puna train` passes.
      profile: steps to trace, see `train/profile.py`; 0 = none.

    Returns:
      The final `TrainState`.

    Raises:
      UserError: the config, the data or the folder will not do; one line says why.
      Interrupted: SIGTERM or Ctrl-C came; the state is saved.
    """
    workdir = storage.anywhere(workdir, "workdir")
    prepare_to_resume(workdir)
    c = resolve(schema.build(config), workdir)
    if c.eval.tasks and tasks is None:
        raise ConfigError(
            f"eval.tasks={c.eval.tasks} needs tasks=puna.eval.tasks.during.During, which `puna "
            "train` passes"
        )
    number = "" if processes.is_first() else f"{jax.process_index()}."
    folder = _writable(workdir)
    with (
        only_run(folder) as lock,
        Mirror(folder) as mirror,
        background_log(mirror.folder / f"{number}{BACKGROUND}"),
    ):
        return _train(c, mirror, evaluators, tasks, lock, profile)


def _train(
    c: schema.Config, mirror: Mirror, evaluators, tasks, lock: Lock | None, profile: int
) -> TrainState:
    """`train`, of a complete configuration and in a folder that is there and this run's own."""
    workdir, folder = mirror.home, mirror.folder
    ledger = Ledger(folder, started=process_start())
    _keep_programs()
    mesh = sharding.make_mesh(c.mesh)
    check_batch(c, mesh)
    origin = lineage(c, workdir)
    rows = sharding.local_rows(mesh, c.train.batch_size)
    with processes.first_goes_first("data"):  # it trains the tokenizer and builds data sets
        if not processes.is_first():
            mirror.pull()
        quarantine = prepare_quarantine(mirror)
        tokenizer = prepare_tokenizer(c, mirror, quarantine)
        mirror.push()
        objective = objectives.make(c, tokenizer.token_bytes)
        loader = make_train_loader(
            c.data, objective.transform(c, tokenizer), c.train.batch_size, rows, c.train.seed,
            quarantine, media_room(c),
        )  # fmt: skip
        held_out = None
        if evaluators is None and c.data.validation:
            held_out = HeldOut(c, objective, tokenizer, mesh)
    asked = tasks(c, tokenizer, mesh) if c.eval.tasks else None

    def due(step: int) -> bool:
        return _evaluates(c, step) or asked is not None and asked.due(step)

    model = Transformer(c.model)
    boxed = abstract_params(c.model)
    tx = make_optimizer(c, boxed, objective.added(c))
    places = abstract_state(c, tx, mesh, objective)
    if processes.is_first():
        print(sharding.table(sharding.unbox(boxed), sharding.shardings(boxed, mesh)), flush=True)
        held = sharding.bytes_per_device(places.opt_state)
        print(f"{c.optimizer.name}, {held:,} bytes per device", flush=True)
        if c.adapter.rank and adapters.misses_experts(c.model, places.params):
            warn(f"adapter.targets={c.adapter.targets} reaches no routed expert of the mixture")
        if c.train.trainable or c.adapter.rank:
            trains, total = (
                sum(x.size for x in jax.tree.leaves(tree))
                for tree in (places.params, sharding.unbox(boxed))
            )
            what = "parameters of adapters on" if c.adapter.rank else "of"
            print(f"{trains:,} {what} {total:,} parameters train", flush=True)

    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir, c, tokenizer_files(mirror), origin) as checkpoints,
        Profile(mirror, profile) as trace,
        Signals() as signals,
    ):
        start_anew = functools.partial(initial_state, c, tx, mesh, objective)
        state, position = checkpoints.restore(places) or (start_anew(), None)
        if position is not None:
            loader.set_state(position)
        start = step = int(state.step)
        ledger.going_on_from(start)
        if processes.is_first():
            write_json(folder / "config.json", schema.to_dict(c))
            print(_how_it_resumes(c, checkpoints.restored, start), flush=True)
        log = metrics.RunLog(c, folder, start, ledger, (origin or {}).get("init_from"))
        checkpoints.losses |= processes.gather(log.validation_losses())[0]
        watch = Watch(c, mirror, int(state.opt_state.bad))
        step_fn = make_train_step(c, model, tx, objective, places)
        if step < c.train.steps:
            trace.check(c.train.steps - step)
            with ledger.doing("compile"):
                step_fn = step_fn.lower(places, objective.abstract_batch(c, mesh)).compile()
                processes.wait("compiled")
            step_fn = trace.of(step_fn)

        def evaluate(state: TrainState, step: int) -> None:
            log.wait()
            with ledger.doing("evaluation"):
                params, numbers = join(state.params, state.frozen), {}
                if _evaluates(c, step):
                    if held_out is not None:
                        found = held_out(model, params, state.frozen)
                        numbers |= {f"validation_{k}": v for k, v in found.items()}
                    for name, evaluator in (evaluators or {}).items():
                        found = evaluator(c, model, params, tokenizer, mesh)
                        numbers |= {f"{name}_{k}": v for k, v in found.items()}
                if asked is not None and asked.due(step):
                    numbers |= asked(model, params)
            quarantine.share()
            log.add(step, numbers | {EVALUATED: quarantine.count()})
            mirror.push()
            if _evaluates(c, step):
                checkpoints.losses[step] = numbers.get(metrics.LOSS, math.nan)

        ledger.running()
        # What was saved, and then not evaluated.
        if any(processes.gather(due(step) and log.lacks(step, EVALUATED))):
            evaluate(state, step)
        while step < c.train.steps:
            step += 1
            last, ends = step == c.train.steps, signals.end_after(step)
            saves = ends or checkpoints.due(step)
            position = loader.get_state()
            batch = sharding.put_batch(mesh, log.fetch(loader), rows, c.train.batch_size)
            state, values = step_fn(state, batch)
            log.dispatched(step, values)
            with ledger.doing("save"):
                mirror.push(every=PUSH_SECONDS)
            if watch.look(step, values, position) or (saves and watch.last()):
                # Back to the last checkpoint, and over the data that made a step bad.
                with ledger.doing("lost_to_failure"):
                    checkpoints.wait()
                    state, _ = checkpoints.restore(places) or (start_anew(), None)
                loader.set_state(loader.get_state() if saves else position)
                step = int(state.step)
                watch.rewound(step, int(state.opt_state.bad))
                ledger.going_on_from(step)
                log.rewind(step)
                continue
            if c.train.check_replicas_every and step % c.train.check_replicas_every == 0:
                log.wait()
                with ledger.doing("replica_check"):
                    check_replicas(state.params, step)
            if saves:
                log.flush(wanted=due(step))
                with ledger.doing("save"):
                    if lock is not None:
                        lock.check()
                    quarantine.share()
                    mirror.push()
                    # Of all rows of the global batch, whichever process reads them.
                    read = processes.merge(loader.get_state())
                    checkpoints.save(state, step, read, provenance(c.data, read))
                    ledger.saving(step)
            # After the save, since it may fail; what is told to end may have seconds.
            if due(step) and (last or not ends):
                evaluate(state, step)
            if ends:
                break
        log.finish(step, checkpoints.best())
        loader.close()
        with ledger.doing("save"):
            checkpoints.wait()
        ledger.write(finished=step >= c.train.steps)
    if step < c.train.steps:
        raise Interrupted(f"{workdir}: ended after step {step}; the same command resumes from it")
    return state


def _evaluates(c: schema.Config, step: int) -> bool:
    """Whether the loss on held-out data is due after a step."""
    every = c.train.eval_every
    return step > 0 and (step == c.train.steps or (every > 0 and step % every == 0))


def _how_it_resumes(c: schema.Config, before: schema.Config | None, step: int) -> str:
    """The step a run starts at, and its new learning rate if `train.steps` has changed.

    Args:
      before: the configuration of the checkpoint that it resumes from, if there is one.
    """
    if step == c.train.steps:
        return f"step {step} of {step} is trained already; raise train.steps to train on"
    said = f"step {step} of {c.train.steps}; compiling"
    if before is None or before.train.steps == c.train.steps:
        return said
    old, new = (float(schedule(config)(step)) for config in (before, c))
    return (
        f"train.steps={c.train.steps} was {before.train.steps}: the schedule spans the new one, so "
        f"step {step + 1} has a learning rate of {new:.4g}, not {old:.4g}\n{said}"
    )


def _keep_programs() -> None:
    """Let JAX keep compiled programs on disk, so that a restart does not compile again."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "puna", "programs"))


def _writable(workdir: pathlib.Path) -> pathlib.Path:
    if paths.is_url(workdir):
        return workdir  # which putting the first file finds out
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir={workdir}: {e.strerror}; name a folder to write to") from e
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be written to; name another folder")
    return workdir

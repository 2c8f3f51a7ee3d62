"""Where a run starts: random parameters, the weights of any model, or a branch of another run.

`train.init_from` is what `puna.load` reads, or RUN@STEP. The architecture is the weights' own, the
tokenizer too where none is named, and the run's checkpoints carry on the licence of the weights.
Where the objective stays, what it trains beside the model (the vector of a reward model, the module
of multi-token prediction) trains on.
With `data.new_tokens` both grow, and the rows of the new tokens are the mean of the others'.
With `train.with_optimizer` a run keeps the moments of the one it branches from: its parameters
train on under another mixture, rate, batch, schedule or context length.
"""

import dataclasses
import math
import operator
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from ..configs import paths, patterns, schema, storage
from ..configs.errors import ConfigError, UserError
from ..configs.schema import Config, ModelConfig
from ..models.leaf import dense
from ..models.parallel import sharding
from ..models.text.tokenizer import load_tokenizer
from ..models.transformer import abstract_params
from ..models.weights import run
from ..models.weights.load import load, open_weights
from .objectives import Objective
from .optimizer import Guard
from .state import TrainState, abstract_state, init_state, state_of, trained

# Keys of the model that say how it is computed and trained, not what it is.
_OF_TRAINING = {
    *("compute_dtype", "param_dtype", "remat", "pipeline_microbatches", "capacity_factor"),
    *("load_balance_weight", "router_z_weight"),
}
# The parameters that have rows of tokens, and which of their dims these are.
_TABLES = {"embed/table_VD": 0, "unembed/table_DV": 1}
# Keys that change what the same parameters compute; a run may change them on purpose, for a longer
# context say. All others must be those of the weights.
_MAY_CHANGE = re.compile("max_positions|rope_.*|temperature_.*|norm_eps|chunk_size")


def resolve(config: schema.Config, workdir: pathlib.Path) -> Config:
    """Complete a configuration with the architecture and tokenizer of what the run starts from.

    Args:
      config: from `schema.build`, unchecked: rules may hold for the completed one only.
      workdir: the run's folder, whose checkpoints say what the weights were if there are any: a run
        resumes without them.

    Raises:
      ConfigError: the configuration contradicts itself, or the weights.
      UserError: nothing can be read at `train.init_from`.
    """
    where = config.train.init_from
    if not where:
        if config.train.with_optimizer:
            raise ConfigError("train.with_optimizer=True needs train.init_from, a run")
        schema.check(config)
        return config
    if run.steps(workdir):
        # The weights may have been deleted by now, or be a run that has trained on.
        old = run.read_config(run.find(workdir))
        config = _completed(config, old.model, old.data.tokenizer)
        schema.check(config)
        return config
    path, of_run = source(where)
    old = (
        run.read_config(path) if of_run
        else Config(model=open_weights(path, _of_rewards(config)).config)
    )  # fmt: skip
    config = _completed(config, old.model, str(path))
    if config.data.new_tokens:
        config = _with_new_rows(config)
    schema.check(config)
    if config.data.new_tokens:
        _check_new_tokens(config)
    if config.train.with_optimizer:
        if not of_run:
            raise ConfigError(
                f"train.with_optimizer=True needs a run, and train.init_from={where} is none"
            )
        _check_moments(config, old, path)
    return config


def _completed(config: Config, model: ModelConfig, tokenizer: str) -> Config:
    """The configuration with an architecture, and a tokenizer where it names none itself."""
    model = _architecture(config.model, model, config.train.init_from)
    data = config.data
    if data.tokenizer == schema.DataConfig.tokenizer:
        data = dataclasses.replace(data, tokenizer=tokenizer)
    return dataclasses.replace(config, model=model, data=data)


def _with_new_rows(config: Config) -> Config:
    """The configuration with a vocabulary that has room for `data.new_tokens`.

    It stays a multiple of 64 where it was one, and of what power of two below divides it else: a
    mesh that splits the old vocabulary splits the new one.
    """
    model, new = config.model, patterns.names(config.data.new_tokens)
    if model.vision.extra_rows:
        raise ConfigError(
            f"data.new_tokens={config.data.new_tokens} must be left out where "
            f"model.vision.extra_rows={model.vision.extra_rows}: the rows after the vocabulary "
            "have ids of their own"
        )
    size = _known_tokens(config) + len(new)
    step = math.gcd(model.vocab_size, 64)
    size = max(model.vocab_size, -(-size // step) * step)
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=size))


def _known_tokens(config: Config) -> int:
    """Ids of the tokenizer before any are added."""
    return load_tokenizer(storage.anywhere(config.data.tokenizer, "data.tokenizer")).vocab_size


def _check_new_tokens(config: Config) -> None:
    if config.train.with_optimizer:
        raise ConfigError(
            f"data.new_tokens={config.data.new_tokens} must be left out where "
            "train.with_optimizer=True: moments have no rows of new tokens"
        )
    boxed = abstract_params(config.model)
    trains, _ = trained(config, boxed)
    key = "adapter.targets" if config.adapter.rank else "train.trainable"
    every, training = (traverse_util.flatten_dict(tree, sep="/") for tree in (boxed, trains))
    for table in _TABLES:
        if table in every and table not in training:
            raise ConfigError(
                f"{key}={operator.attrgetter(key)(config)} must reach {table} where "
                f"data.new_tokens={config.data.new_tokens}: without it they all stay the same"
            )


def source(where: str) -> tuple[pathlib.Path, bool]:
    """What a `train.init_from` names: the path to load, and whether it is a checkpoint of a run.

    Raises:
      UserError: it is a run without that step, or without any.
    """
    path, step = storage.anywhere(where, "train.init_from"), None
    if (found := re.fullmatch(r"(.+)@(\d+)", str(path))) and not _exists(path):
        path, step = storage.at(found[1]), int(found[2])
    if run.is_run(path):
        return run.find(path, step), True
    if step is not None:
        raise UserError(f"train.init_from={where}: {path} is not a run of puna, so it has no steps")
    return path, False


def _exists(path: pathlib.Path) -> bool:
    with storage.explained(path):
        return path.exists()


def meaning(where: str) -> str:
    """The same text for any spelling of a `train.init_from`; RUN@STEP is RUN/checkpoints/STEP."""
    return where and paths.real(re.sub(r"@(\d+)$", rf"/{run.CHECKPOINTS}/\1", where))


def _architecture(wanted: ModelConfig, found: ModelConfig, where: str, prefix: str = "model."):
    """The architecture `found`, trained as `wanted` says; a key at its default says nothing."""
    made = {}
    for field in dataclasses.fields(found):
        name = field.name
        mine, theirs = getattr(wanted, name), getattr(found, name)
        if dataclasses.is_dataclass(theirs):
            made[name] = _architecture(mine, theirs, where, f"{prefix}{name}.")
        elif name in _OF_TRAINING:
            made[name] = mine
        elif mine in (theirs, field.default):
            made[name] = theirs
        elif _MAY_CHANGE.fullmatch(name):
            made[name] = mine
        else:
            raise ConfigError(
                f"{prefix}{name}={mine!r} differs from {theirs!r} of train.init_from={where}; the "
                "architecture is that of the weights: leave the key out"
            )
    return dataclasses.replace(found, **made)


def _check_moments(config: Config, old: Config, path: pathlib.Path) -> None:
    """Moments are of one update rule and of the parameters that trained."""
    if old.adapter.rank:
        raise ConfigError(
            f"train.with_optimizer=True: {path} has the moments of adapters (adapter.rank="
            f"{old.adapter.rank}), which are merged where a run starts; leave it out"
        )
    for key in ("optimizer.name", "train.trainable", "model.param_dtype"):
        section, name = key.split(".")
        mine, theirs = (getattr(getattr(c, section), name) for c in (config, old))
        if mine != theirs:
            raise ConfigError(
                f"{key}={mine!r} must be {theirs!r}, as in {path}, where train.with_optimizer=True"
            )
    if not _exists(path / "optimizer"):
        raise ConfigError(
            f"train.with_optimizer=True: {path} has no optimizer state; it was converted, not "
            "trained"
        )


def lineage(config: Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """Where a run comes from, for its checkpoints, results and card; None if from nowhere.

    Returns:
      `base_model`, `licence` and `files` of the weights (see `licences.origin_of`),
      `init_from`: the path, and for a branch the step, whether moments were kept, and each key that
      changed as [before, after]; for a branch `ancestors`, see `run.ancestry`.
    """
    where = config.train.init_from
    if not where:
        return None
    if run.steps(workdir):  # as it was found when the run began
        return run.read_meta(run.find(workdir)).get("origin")
    path, of_run = source(where)
    facts: dict[str, Any] = {"path": where}
    if config.data.new_tokens:
        facts["new_tokens"] = list(patterns.names(config.data.new_tokens))
    if not of_run:
        return open_weights(path, _of_rewards(config)).origin | {"init_from": facts}
    meta = run.read_meta(path)
    old, new = schema.flatten(meta["config"]), schema.flatten(schema.to_dict(config))
    facts["step"] = int(path.name)
    facts["with_optimizer"] = config.train.with_optimizer
    facts["changed"] = {
        key: [old.get(key), value]
        for key, value in new.items()
        if old.get(key) != value and not key.startswith(("train.init_from", "train.with_opt"))
    }
    found = (meta.get("origin") or {}) | {"init_from": facts}
    return found | {"ancestors": run.ancestry(path, meta)}


def initial_state(
    config: Config, tx: optax.GradientTransformation, mesh, objective: Objective | None = None
) -> TrainState:
    """The state before the first step; weights stream straight onto the mesh.

    Raises:
      UserError: the weights cannot be read.
    """
    if not config.train.init_from:
        return init_state(config, tx, mesh, objective)
    path, of_run = source(config.train.init_from)
    # As they are stored, where they will be rounded: the optimizer's float32 copy is of these.
    dtype = "float32" if config.model.param_dtype == "float32" else None
    # The adapters of a run are merged first: quantised is the sum.
    merges = of_run and run.read_config(path).adapter.rank
    kind = config.adapter.quantize
    quantize = "" if kind == "none" or merges else kind
    _, params = load(path, dtype, mesh, quantize, rewards=_of_rewards(config))
    if of_run and objective:
        params |= _own(run.read_config(path), config, path, mesh, objective)
    if config.data.new_tokens:
        params = _with_rows(params, config, mesh)
    state = state_of(config, tx, mesh, params, objective)
    if not config.train.with_optimizer:
        return state
    abstract = abstract_state(config, tx, mesh, objective)
    rest = {"step": abstract.step, "opt_state": abstract.opt_state}
    moments = run.restore(path, "optimizer", rest)["opt_state"]
    return state.replace(opt_state=_from_step_0(moments))


def _of_rewards(config: Config) -> bool:
    return config.train.objective == "reward"


def _own(old: Config, config: Config, path: pathlib.Path, mesh, objective: Objective) -> dict:
    """The parameters beside the model's own of a run with the same objective."""
    if old.train.objective != config.train.objective:
        return {}
    boxed = objective.added(old)
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        sharding.unbox(boxed), sharding.shardings(boxed, mesh),
    )  # fmt: skip
    return run.restore(path, "params", abstract) if boxed else {}


def _with_rows(params, config: Config, mesh):
    """Parameters whose tables have the rows of `data.new_tokens`.

    These, and what rows fill up the tables, are the mean of the rows of all tokens that there were.
    """
    first, count = _known_tokens(config), len(patterns.names(config.data.new_tokens))
    boxed = abstract_params(config.model)
    places = traverse_util.flatten_dict(sharding.shardings(boxed, mesh), sep="/")
    flat = traverse_util.flatten_dict(params, sep="/")

    def grow(leaf, axis):
        table = dense(leaf)
        known, rest = jnp.split(table, [first], axis)
        rest = jax.lax.slice_in_dim(rest, min(count, rest.shape[axis]), None, axis=axis)
        mean = jnp.mean(known.astype(jnp.float32), axis, keepdims=True).astype(table.dtype)
        fill = config.model.vocab_size - first - count - rest.shape[axis]
        new, last = jnp.repeat(mean, count, axis), jnp.repeat(mean, fill, axis)
        return jnp.concatenate([known, new, rest, last], axis)

    for path in [path for path in _TABLES if path in flat]:
        grown = jax.jit(grow, static_argnums=1, out_shardings=places[path])
        flat[path] = grown(flat[path], _TABLES[path])
    return traverse_util.unflatten_dict(flat, sep="/")


def _from_step_0(opt_state):
    """The same moments under a schedule that begins now."""

    def scheduled(x):
        return isinstance(x, optax.ScaleByScheduleState)

    def restart(x):
        return x._replace(count=jnp.zeros_like(x.count)) if scheduled(x) else x

    opt_state = jax.tree.map(restart, opt_state, is_leaf=scheduled)
    assert isinstance(opt_state, Guard)
    return opt_state._replace(bad=jnp.zeros_like(opt_state.bad))

"""`puna eval`: load a model, measure it on held-out text, give the numbers."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

from ..configs import schema, storage
from ..configs.display import Results
from ..configs.errors import ConfigError, UserError
from ..models.parallel import sharding
from ..models.text.tokenizer import load_tokenizer
from ..models.transformer import Transformer, count_params
from ..models.weights import run
from ..models.weights.load import load
from ..train import objectives
from ..train.data.tokenizer import with_ends
from ..train.state import restore_for_evaluation
from ..train.validation import HeldOut

# Objectives that measure a model with what their own runs hold; each has a section of its name.
_OWN = ("preference", "reward", "distill")


def evaluate(config: Mapping, path, quantize: str = "", adapter: str = "") -> Results:
    """Evaluate a run, or any model that `puna.load` reads, on `data.validation`.

    A run whose objective has more than the model (the vector of a reward model, the reference of
    preferences, a teacher) is measured by it as in training, if `train.objective` names it; a
    reward model of others likewise.

    Args:
      config: a `ConfigDict`; its data, eval and mesh sections, `train.objective` and
        `model.compute_dtype` count. The architecture is the checkpoint's own.
      path: run, checkpoint or model.
      quantize, adapter: as of `puna.load`; not of such a run.

    Returns:
      The dict that `results.json` holds; a notebook shows it as a table.

    Raises:
      UserError: the config, the data or the checkpoint will not do, or a number is not finite.
    """
    return Evaluation(config)(path, quantize, adapter)


class Evaluation:
    """`evaluate` of one model after another: data of one tokenizer are read and packed once.

    Args:
      config: as of `evaluate`.

    Raises:
      UserError: the config will not do.
    """

    def __init__(self, config: Mapping):
        self.config = schema.from_dict(config)
        if not self.config.data.validation:
            raise ConfigError("data.validation='' must name what to evaluate on")
        self.mesh = sharding.make_mesh(self.config.mesh)
        self._held_out: dict[tuple, HeldOut] = {}

    def __call__(self, path, quantize: str = "", adapter: str = "") -> Results:
        """Evaluate a model; see `evaluate`."""
        c, mesh = self.config, self.mesh
        path = storage.anywhere(path, "checkpoint")
        # The data before the weights, which may take minutes to load.
        tokenizer = with_ends(c.data, load_tokenizer(path))
        folder = _run_of(c, path)
        old = run.read_config(folder) if folder else None
        if old:
            if quantize or adapter:
                raise UserError(
                    f"--quantize={quantize} --adapter={adapter}: {path} is measured by its own "
                    f"train.objective={c.train.objective} as it was trained; leave both out"
                )
            c = _with_objective_of(c, old, path)
        held_out = self._prepared(c, tokenizer)
        if old and folder:
            model = Transformer(c.model)
            params, frozen = restore_for_evaluation(folder, old, held_out.objective, mesh)
        else:
            model, params = load(
                path, mesh=mesh, quantize=quantize, adapter=adapter,
                rewards=c.train.objective == "reward",
            )  # fmt: skip
            dtype = c.model.compute_dtype
            model = Transformer(dataclasses.replace(model.config, compute_dtype=dtype))
            frozen = {}
        numbers = held_out(model, params, frozen)
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise UserError(
                    f"{path}: {name} is {number} on data.validation={c.data.validation}: the "
                    "parameters are damaged or have diverged"
                )
        return Results(
            checkpoint=str(path),
            data=c.data.validation,
            begin_ids=list(tokenizer.begin_ids),
            end_ids=list(tokenizer.end_ids),
            parameters=count_params(model.config),
            **numbers,
        )

    def _prepared(self, c: schema.Config, tokenizer) -> HeldOut:
        """The data, ready to be measured; the last ones are kept, as they may fill memory."""
        key = (c, tokenizer.fingerprint, tuple(tokenizer.begin_ids), tuple(tokenizer.end_ids))
        if key not in self._held_out:
            objective = objectives.make(c, tokenizer.token_bytes)
            self._held_out = {key: HeldOut(c, objective, tokenizer, self.mesh)}
        return self._held_out[key]


def _run_of(c: schema.Config, path: pathlib.Path) -> pathlib.Path | None:
    """The checkpoint of a run that is to be measured by its own objective, beside the model."""
    if c.train.objective not in _OWN or not run.is_run(path):
        return None
    folder = run.find(path)
    return folder if run.read_config(folder).train.objective == c.train.objective else None


def _with_objective_of(c: schema.Config, old: schema.Config, path) -> schema.Config:
    """The configuration with the architecture of a run and the settings of its objective.

    Raises:
      ConfigError: a setting contradicts the run's.
    """
    name = c.train.objective
    mine, theirs = getattr(c, name), getattr(old, name)
    for field in dataclasses.fields(mine):
        value, wanted = getattr(mine, field.name), getattr(theirs, field.name)
        if value not in (wanted, field.default):
            raise ConfigError(
                f"{name}.{field.name}={value!r} differs from {wanted!r} of {path}; leave it out"
            )
    model = dataclasses.replace(old.model, compute_dtype=c.model.compute_dtype)
    return dataclasses.replace(c, model=model, **{name: theirs})

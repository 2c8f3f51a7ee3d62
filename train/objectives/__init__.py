"""Losses, one file each, behind one contract: `Objective`.

`train.objective=NAME` is the file `NAME.py` of this folder, whose `make(config, token_bytes_V)`
gives the objective of a run. The step, the loop, compiling ahead of time and evaluation on held-out
data know no other loss, so a new objective is a new file here.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ...configs.errors import ConfigError
from ...configs.schema import Config
from ...models.parallel.sharding import Param
from ...models.transformer import Transformer
from ..data.examples import Transform


class Loss(NamedTuple):
    """What an objective makes of a batch.

    total: the sum that training minimises, before it is divided by the weight of the whole batch.
    rows_B: sums of each row [B] that `Objective.summary` turns into numbers for people.
    router: statistics of the MoE layers, as `Output.router`; their auxiliary losses are added to
      the mean.
    """

    total: jax.Array
    rows_B: dict[str, jax.Array]
    router: dict


class Objective(Protocol):
    """A loss: a frozen dataclass of settings, compared by identity, whose methods are pure.

    Objectives inherit from it what most of them lack: parameters of their own.
    """

    def transform(self, config: Config, tokenizer) -> Transform:
        """How a record of the data becomes an example."""
        ...

    def abstract_batch(self, config: Config, mesh) -> dict[str, Any]:
        """Shapes, dtypes and places of a training batch."""
        ...

    def added(self, config: Config) -> dict[str, Any]:
        """Parameters beside the model's own, boxed; all of them train."""
        return {}

    def init_added(self, config: Config, key) -> dict[str, Any]:
        """Those parameters as a run starts: zeros, unless an objective has others."""
        return jax.tree.map(
            lambda p: jnp.zeros(p.value.shape),
            self.added(config), is_leaf=lambda x: isinstance(x, Param),
        )  # fmt: skip

    def abstract_frozen(self, config: Config, boxed) -> dict[str, Any]:
        """Trees beside the model's own that do not train, by name: a reference, a teacher.

        Args:
          boxed: the parameters of the model that train, with the logical names of their dims.

        Returns:
          Trees that are boxed likewise.
        """
        return {}

    def initial_frozen(self, config: Config, mesh, params) -> dict[str, Any]:
        """Those trees as a run starts, from the parameters of the model that train."""
        return {}

    def weight_B(self, batch) -> jax.Array:
        """What each row weighs in the mean over a batch [B]; known from the batch alone."""
        ...

    def loss(self, model: Transformer, params, frozen, batch) -> Loss:
        """The loss of a batch.

        Args:
          params: of the model, whole: those that train joined with those that do not.
          frozen: trees beside the model's own that do not train, by name (a reference, a teacher).
          batch: in training also with the `step`, an int32 from 0 on, for a loss that changes.
        """
        ...

    def summary(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers of a training step from the `rows_B` summed over rows; may be traced."""
        ...

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Numbers of an evaluation from the same sums; empty if nothing was measured."""
        ...


def names() -> list[str]:
    """The objectives there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make(config: Config, token_bytes_V) -> Objective:
    """The objective that a configuration names.

    Args:
      config: read by the objective: `train.objective`, and its own settings.
      token_bytes_V: bytes of text that each token id stands for.

    Raises:
      ConfigError: there is no such objective.
    """
    name = config.train.objective
    if name not in names():
        raise ConfigError(f"train.objective={name} must be one of {', '.join(names())}")
    return importlib.import_module(f".{name}", __name__).make(config, token_bytes_V)

"""Reward models: a vector beside the model gives a text the value of its last token.

The loss of a pair is that of Bradley and Terry, -log sigmoid(chosen - rejected), as in InstructGPT
(arXiv 2203.02155), and `reward.center` times the squared sum of both, which keeps rewards around 0
(arXiv 2312.09244). The vector starts as zeros, trains whatever `train.trainable` says, and is saved
with the parameters as `reward/head_D`; `load` reads both. Left out: margins of the data.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ...configs import storage
from ...configs.errors import UserError
from ...configs.schema import Config
from ...models.parallel import sharding
from ...models.parallel.sharding import Param
from ...models.weights import run
from ...models.weights.load import load as load_weights
from ..data.pairs import PairTransform
from . import Loss, Objective
from .preference import abstract_pairs, means, pairs_of_rows, per_text


@dataclasses.dataclass(frozen=True, eq=False)
class Reward(Objective):
    """Mean Bradley-Terry loss of pairs.

    Attributes:
      center: weight of (chosen + rejected)^2.
    """

    center: float

    def transform(self, config: Config, tokenizer) -> PairTransform:
        return PairTransform(tokenizer, config.data.seq_len, config.sft.date, ends=True)

    def abstract_batch(self, config: Config, mesh) -> dict[str, Any]:
        return abstract_pairs(config, mesh)

    def added(self, config: Config) -> dict[str, Any]:
        return {"reward": head(config)}

    def weight_B(self, batch):
        return pairs_of_rows(batch)

    def loss(self, model, params, frozen, batch) -> Loss:
        """Summed loss of the pairs of a batch.

        Args:
          params: the model's, and `reward`.
          batch: tokens, targets, positions, segment ids, and weights of 1 where a text has its
            last token, each [B, T].
        """
        if "reward" not in params:
            raise UserError(
                "train.objective=reward needs the vector of its training run, and these weights "
                "have none: name that run"
            )
        values_BT, router = rewards(model, params, batch)
        last_BT = batch["weights_BT"]
        chosen, rejected = per_text(values_BT * last_BT, batch)
        is_pair_BP = per_text(last_BT, batch).rejected > 0
        losses_BP = -jax.nn.log_sigmoid(chosen - rejected)
        losses_BP += self.center * (chosen + rejected) ** 2
        numbers = {
            "loss": losses_BP,
            "pairs": jnp.ones_like(losses_BP),
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": (chosen > rejected).astype(jnp.float32),
        }
        rows_B = {n: jnp.sum(jnp.where(is_pair_BP, x, 0.0), axis=1) for n, x in numbers.items()}
        return Loss(jnp.sum(rows_B["loss"]), rows_B, router)

    def summary(self, sums):
        """Means over pairs, and in what share of them the chosen answer has more reward."""
        return means(sums)

    def report(self, sums):
        """The same, and how many `pairs` there were."""
        return {**means(sums), "pairs": sums["pairs"]} if sums["pairs"] else {}


def make(config: Config, token_bytes_V) -> Reward:
    """The objective of reward models."""
    return Reward(config.reward.center)


def head(config: Config) -> dict[str, Param]:
    """The vector, abstract; beside adapters in float32 as they are: nothing there is rounded."""
    dtype = "float32" if config.adapter.rank else config.model.param_dtype
    shape = jax.ShapeDtypeStruct((config.model.embed_dim,), jnp.dtype(dtype))
    return {"head_D": Param(shape, ("norm",))}


def rewards(model, params, batch):
    """The value of each token in float32 [B, T], and the statistics of the routers.

    Args:
      params: the model's, and `reward`.
    """
    out = model.apply(
        {"params": params}, batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"],
        method="states",
    )  # fmt: skip
    head_D = params["reward"]["head_D"].astype(jnp.float32)
    hidden_BTD = out.hidden_BTD.astype(jnp.float32)
    return jnp.sum(hidden_BTD * head_D, axis=-1), out.router


def load(path, dtype: str = "float32", mesh=None):
    """The model and the parameters of a reward model, its vector as `reward` among them.

    Args:
      path: a run of this objective, or a directory of Hugging Face with one label
        (`LlamaForSequenceClassification`).

    Raises:
      UserError: it is neither.
    """
    mesh = sharding.make_mesh(Config().mesh) if mesh is None else mesh
    if not run.is_run(storage.anywhere(path, "path")):
        model, params = load_weights(path, dtype, mesh, rewards=True)
        if "reward" not in params:
            raise UserError(f"{path}: is no reward model: it has no score.weight")
        return model, params
    folder = run.find(path)
    config = run.read_config(folder)
    if config.train.objective != "reward":
        raise UserError(f"{path}: is no reward model: train.objective={config.train.objective}")
    model, params = run.load(folder, dtype, mesh)
    boxed = {"reward": head(config)}
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        sharding.unbox(boxed), sharding.shardings(boxed, mesh),
    )  # fmt: skip
    return model, params | run.restore(folder, "params", abstract)

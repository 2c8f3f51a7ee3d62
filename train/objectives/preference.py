"""Learning from preferences: DPO and its kin on pairs of a chosen and a rejected answer.

A pair is two texts of one row, prompt and answer each, that do not see each other; answers alone
count. Losses (of h, what the chosen answer is ahead by, and s = sigmoid; means over pairs):

- sigmoid: DPO (arXiv 2305.18290), -log s(beta h); with label smoothing conservative DPO.
- sigmoid_norm: the same with log-ratios a token.
- robust: unbiased where labels are flipped at a known rate (arXiv 2403.00409).
- ipo: (h - 1 / (2 beta))^2 (arXiv 2310.12036).
- ipo_norm: the same with log-ratios a token, as TRL's `ipo`.
- hinge: max(0, 1 - beta h), SLiC (arXiv 2305.10425).
- simpo: -log s(beta h - margin) with log-probabilities a token and no reference (2405.14734).
- orpo: cross-entropy of the chosen text, and -beta log s of the log odds ratio; no reference
  (arXiv 2403.07691). The cross-entropy is a mean over the tokens of each text, prompt included.

The reference is what the parameters that train were when the run began. Left out: losses of more
than two answers, and of answers that are judged alone (KTO).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...configs.errors import UserError
from ...configs.schema import Config, PreferenceConfig
from ...models.parallel import sharding
from ...models.transformer import unembed_table
from ..data.pairs import PairTransform
from ..state import join
from . import Loss, Objective
from .next_token import log_probs

_PER_TOKEN = ("sigmoid_norm", "ipo_norm", "simpo", "orpo")
_WITHOUT_REFERENCE = ("simpo", "orpo")


class Pairs(NamedTuple):
    """Two numbers of each pair of a batch [B, P]."""

    chosen: jax.Array
    rejected: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Preference(Objective):
    """Mean loss of pairs.

    Attributes:
      settings: which loss, and its numbers.
      loss_chunk: tokens whose logits exist at one time, a device.
    """

    settings: PreferenceConfig
    loss_chunk: int

    def transform(self, config: Config, tokenizer) -> PairTransform:
        return PairTransform(tokenizer, config.data.seq_len, config.sft.date)

    def abstract_batch(self, config: Config, mesh) -> dict[str, Any]:
        return abstract_pairs(config, mesh)

    def abstract_frozen(self, config: Config, boxed) -> dict[str, Any]:
        return {} if self.settings.loss in _WITHOUT_REFERENCE else {"reference": boxed}

    def initial_frozen(self, config: Config, mesh, params) -> dict[str, Any]:
        if self.settings.loss in _WITHOUT_REFERENCE:
            return {}
        return {"reference": jax.tree.map(jnp.copy, params)}

    def weight_B(self, batch):
        return pairs_of_rows(batch)

    def loss(self, model, params, frozen, batch) -> Loss:
        """Summed loss of the pairs of a batch.

        Args:
          batch: tokens, targets, positions, segment ids and weights, each [B, T].
          frozen: with the `reference` of those losses that have one.
        """
        s = self.settings
        logps_BT, router = self._log_probs(model, params, batch)
        answers_BT = batch["weights_BT"]
        logps, lengths = per_text(logps_BT * answers_BT, batch), per_text(answers_BT, batch)
        is_pair_BP = lengths.rejected > 0
        policy, reference = logps, Pairs(*(jnp.zeros_like(x) for x in logps))
        if s.loss not in _WITHOUT_REFERENCE:
            if "reference" not in frozen:
                raise UserError(
                    f"preference.loss={s.loss} is of a model and the reference of its training "
                    "run, which is only there in that run: name it"
                )
            before = join(frozen["reference"], frozen)
            reference_BT, _ = self._log_probs(model, before, batch)
            reference = per_text(reference_BT * answers_BT, batch)
        if s.loss in _PER_TOKEN:
            policy, reference = (
                Pairs(*(x / jnp.maximum(n, 1.0) for x, n in zip(sums, lengths, strict=True)))
                for sums in (policy, reference)
            )
        losses_BP = pair_losses(s, policy, reference)
        if s.loss == "orpo":
            inside_BT = _inside(batch)
            nll = per_text(-logps_BT * inside_BT, batch).chosen
            losses_BP += nll / jnp.maximum(per_text(inside_BT, batch).chosen, 1.0)
        losses_BP = jnp.where(is_pair_BP, losses_BP, 0.0)

        rewards = Pairs(*(s.beta * (x - r) for x, r in zip(policy, reference, strict=True)))
        numbers = {
            "loss": losses_BP,
            "pairs": jnp.ones_like(losses_BP),
            "reward_chosen": rewards.chosen,
            "reward_rejected": rewards.rejected,
            "reward_margin": rewards.chosen - rewards.rejected,
            "reward_accuracy": (rewards.chosen > rewards.rejected).astype(jnp.float32),
            "log_prob_chosen": logps.chosen,
            "log_prob_rejected": logps.rejected,
        }
        rows_B = {n: jnp.sum(jnp.where(is_pair_BP, x, 0.0), axis=1) for n, x in numbers.items()}
        return Loss(jnp.sum(losses_BP), rows_B, router)

    def _log_probs(self, model, params, batch):
        """Of each target [B, T], and the statistics of the routers."""
        out = model.apply(
            {"params": params}, batch["tokens_BT"], batch["positions_BT"],
            batch["segment_ids_BT"], method="states",
        )  # fmt: skip
        table_DV = unembed_table(model.config, params)
        dtype = model.config.activation_dtype
        logps_BT = log_probs(out.hidden_BTD, table_DV, batch["targets_BT"], dtype, self.loss_chunk)
        return logps_BT, out.router

    def summary(self, sums):
        """Means over pairs: `loss`; `reward_*`, beta times log-ratios (log-probabilities where
        there is no reference), a token if the loss has them so; `log_prob_*`, summed over answers;
        and in what share of pairs the chosen answer has more reward.
        """
        return means(sums)

    def report(self, sums):
        """The same, and how many `pairs` there were."""
        return {**means(sums), "pairs": sums["pairs"]} if sums["pairs"] else {}


def make(config: Config, token_bytes_V) -> Preference:
    """The objective of learning from preferences."""
    return Preference(config.preference, config.train.loss_chunk)


def pair_losses(settings: PreferenceConfig, policy: Pairs, reference: Pairs):
    """The loss of each pair [B, P], but for the cross-entropy of ORPO.

    Args:
      policy, reference: log-probabilities of the answers; a token, where the loss has them so.
    """
    s = settings
    h = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    e = s.label_smoothing
    log_sigmoid = jax.nn.log_sigmoid
    match s.loss:
        case "ipo" | "ipo_norm":
            return (h - 1.0 / (2.0 * s.beta)) ** 2
        case "hinge":
            return jax.nn.relu(1.0 - s.beta * h)
        case "robust":
            right, wrong = log_sigmoid(s.beta * h), log_sigmoid(-s.beta * h)
            return (-(1.0 - e) * right + e * wrong) / (1.0 - 2.0 * e)
        case "orpo":
            return -s.beta * log_sigmoid(_log_odds(policy.chosen) - _log_odds(policy.rejected))
    z = s.beta * h - (s.margin if s.loss == "simpo" else 0.0)
    return -(1.0 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def _log_odds(logp):
    """log(p / (1 - p)); what is as good as certain is held below it, where it would be infinite."""
    logp = jnp.minimum(logp, -1e-6)
    return logp - jnp.log(-jnp.expm1(logp))


def abstract_pairs(config: Config, mesh) -> dict[str, Any]:
    """Shapes, dtypes and places of a batch of pairs of text."""
    shape = (config.train.batch_size, config.data.seq_len)
    place = sharding.batch_sharding(mesh)
    names = ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT")
    batch = dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place))
    return batch | {"weights_BT": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)}


def pairs_of_rows(batch):
    """How many pairs each row has [B]; every second text is a rejected one."""
    return (jnp.max(batch["segment_ids_BT"], axis=1) // 2).astype(jnp.float32)


def means(sums):
    """Means over pairs; zeros of a batch without any."""
    pairs = sums["pairs"] + 1e-30
    return {name: x / pairs for name, x in sums.items() if name != "pairs"}


def per_text(x_BT, batch) -> Pairs:
    """Sums over the texts of each row, which are chosen and rejected in turn.

    Comparing with every text and not scattering adds in one order on every device.
    """
    segments_BT = batch["segment_ids_BT"]
    # A text has at least a token that is read and one that is predicted.
    most = (segments_BT.shape[1] + 1) // 4
    ids_P = 2 * jnp.arange(most)

    def sums(ids_P):
        here_BPT = segments_BT[:, None, :] == ids_P[:, None]
        return jnp.sum(jnp.where(here_BPT, x_BT[:, None, :], 0.0), axis=-1)

    return Pairs(sums(ids_P + 1), sums(ids_P + 2))


def _inside(batch):
    """1 where a target is in the text of its token [B, T]."""
    segments_BT = batch["segment_ids_BT"]
    next_BT = jnp.pad(segments_BT[:, 1:], [(0, 0), (0, 1)])
    # Behind the last token of a row there can only be an answer's, since pairs are never cut.
    inside_BT = (segments_BT > 0) & ((segments_BT == next_BT) | (batch["weights_BT"] > 0))
    return inside_BT.astype(jnp.float32)

"""Distillation: a student learns the next-token distribution of a larger teacher.

The loss of a target is `1 - hard` times a divergence of teacher p and student q, both softened by
`temperature`, and `hard` times the cross-entropy of the target itself. The divergence is the
generalized Jensen-Shannon one of GKD (arXiv 2306.13649): beta KL(p|m) + (1 - beta) KL(q|m) of
m = beta p + (1 - beta) q; by convention 0 is KL(p|q), as in arXiv 1503.02531, and 1 is KL(q|p), as
in arXiv 2306.08543. It is not multiplied by temperature^2. With `top_k` the ids that are not among
the teacher's likeliest count as one. `hard` can change from the first step to the last one, as the
weights of soft and hard targets do in Llama 4's codistillation, whose schedule is not published.

Logits exist for a slice of the positions at a time, as in `next_token`. The teacher lies on the
mesh of the student, in the dtype that it computes in. Left out: texts that the student writes
itself.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ...configs import paths
from ...configs.errors import ConfigError, UserError
from ...configs.schema import Config, DistillConfig, ModelConfig
from ...models import leaf
from ...models.layers import widen
from ...models.text.tokenizer import load_tokenizer
from ...models.transformer import Transformer, abstract_params, unembed_table
from ...models.weights import run
from ...models.weights.load import load, open_weights
from ..data.chats import of_conversations
from ..data.examples import Transform
from . import Loss
from .next_token import NextToken, OfLogits, over_logits


@dataclasses.dataclass(frozen=True, eq=False)
class Distill(NextToken):
    """Mean loss of the targets that weigh something.

    Attributes:
      settings: the divergence, and what the targets themselves count.
      teacher: the architecture of the teacher.
      steps: of the run, over which the weight of the targets changes.
    """

    settings: DistillConfig
    teacher: ModelConfig
    steps: int

    def transform(self, config: Config, tokenizer) -> Transform:
        """That of pretraining or of fine-tuning.

        Raises:
          ConfigError: ids are other texts to the teacher.
        """
        _check_tokenizer(self.settings.teacher, tokenizer)
        if self.settings.records == "conversations":
            return of_conversations(config, tokenizer)
        return super().transform(config, tokenizer)

    def abstract_frozen(self, config: Config, boxed) -> dict[str, Any]:
        return {"teacher": abstract_params(self.teacher)}

    def initial_frozen(self, config: Config, mesh, params) -> dict[str, Any]:
        path = paths.local(self.settings.teacher, "distill.teacher")
        _, teacher = load(path, self.teacher.param_dtype, mesh)
        return {"teacher": leaf.merge(teacher, self.teacher.param_dtype)}

    def loss(self, model, params, frozen, batch) -> Loss:
        """Summed loss of a batch.

        Args:
          frozen: with the parameters of the `teacher`.
          batch: tokens, targets, positions, segment ids and weights, each [B, T]; and the `step`
            in training. Without it the targets count as in the last step, so that measurements of
            different steps can be compared.
        """
        if "teacher" not in frozen:
            raise UserError(
                "train.objective=distill is measured with the teacher, which is only there in the "
                "training run: name that run, or evaluate with train.objective=next_token"
            )

        def states(model, params):
            return model.apply(
                {"params": params}, batch["tokens_BT"], batch["positions_BT"],
                batch["segment_ids_BT"], method="states",
            )  # fmt: skip

        out = states(model, params)
        teacher = states(Transformer(self.teacher), frozen["teacher"])
        dtype = model.config.activation_dtype
        table_DV = unembed_table(model.config, params)
        hidden_BTD, table_DV = widen(out.hidden_BTD, table_DV, dtype)
        weights_BT, targets_BT = batch["weights_BT"], batch["targets_BT"]
        hard_BT = jnp.full_like(weights_BT, self.hard_at(batch.get("step", self.steps)))
        total, (loss_BT, divergence_BT, nll_BT) = _summed(
            hidden_BTD, table_DV, (targets_BT, weights_BT, hard_BT, teacher.hidden_BTD),
            unembed_table(self.teacher, frozen["teacher"]), dtype, self.settings, self.loss_chunk,
        )  # fmt: skip
        bytes_BT = jnp.asarray(self.token_bytes_V)[targets_BT]
        numbers = {
            "loss": loss_BT, "divergence": divergence_BT, "nll": nll_BT, "bytes": bytes_BT,
            "hard": hard_BT,
        }  # fmt: skip
        rows_B = {name: jnp.sum(x * weights_BT, axis=1) for name, x in numbers.items()}
        return Loss(total, rows_B | {"tokens": self.weight_B(batch)}, out.router)

    def hard_at(self, step):
        """What the targets count at a step: `hard` at first, `hard_end` from the last one on."""
        s = self.settings
        if s.hard_schedule == "constant":
            return s.hard
        part = jnp.minimum(step / max(1, self.steps - 1), 1.0)
        if s.hard_schedule == "cosine":
            part = (1.0 - jnp.cos(jnp.pi * part)) / 2
        return s.hard + (s.hard_end - s.hard) * part

    def summary(self, sums):
        """`loss`, and its parts `divergence` and `nll`, in nats a target; `hard`, the weight of the
        latter; `bits_per_byte`.
        """
        numbers = super().summary(sums)
        tokens = sums["tokens"] + 1e-30
        each = {name: sums[name] / tokens for name in ("loss", "divergence", "nll", "hard")}
        return numbers | each

    def report(self, sums):
        """The same, the `perplexity` of the targets, and how many `tokens` and `bytes`."""
        numbers = super().report(sums)
        return numbers | self.summary(sums) if numbers else {}


def make(config: Config, token_bytes_V) -> Distill:
    """The objective of distillation.

    Raises:
      ConfigError: there is no teacher, or it is of another vocabulary.
      UserError: it cannot be read.
    """
    settings, model = config.distill, config.model
    if not settings.teacher:
        raise ConfigError("distill.teacher='' must name a model where train.objective=distill")
    if config.data.images or config.data.clips:
        raise ConfigError(
            f"data.images={config.data.images} and data.clips={config.data.clips} must be 0 where "
            "train.objective=distill: a teacher reads text alone"
        )
    path = paths.local(settings.teacher, "distill.teacher")
    teacher = (
        run.read_config(run.find(path)).model if run.is_run(path) else open_weights(path).config
    )
    if teacher.vocab_size != model.vocab_size:
        raise ConfigError(
            f"distill.teacher={settings.teacher} has {teacher.vocab_size} ids and must have the "
            f"model.vocab_size={model.vocab_size} of the student: divergences compare id with id"
        )
    teacher = dataclasses.replace(
        teacher, compute_dtype=model.activation_dtype, param_dtype=model.activation_dtype,
        remat="none", capacity_factor=0.0,
    )  # fmt: skip
    t = config.train
    return Distill(0.0, t.loss_chunk, token_bytes_V, settings, teacher, t.steps)


def _check_tokenizer(where: str, tokenizer) -> None:
    try:
        theirs = load_tokenizer(paths.local(where, "distill.teacher"))
    except UserError:  # weights alone
        return
    ids = range(min(tokenizer.vocab_size, theirs.vocab_size))
    same = tokenizer.special == theirs.special and all(
        tokenizer.decode_bytes([i], continuation=True, show_special=True)
        == theirs.decode_bytes([i], continuation=True, show_special=True)
        for i in ids
    )
    if not same or tokenizer.vocab_size != theirs.vocab_size:
        raise ConfigError(
            f"distill.teacher={where} must have the tokenizer of the student: an id of one is "
            "another text to the other"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _summed(hidden_BTD, table_DV, tokens, teacher_table, dtype, settings, loss_chunk):
    """The sum of the loss, differentiable by the student's two, and numbers of each target."""
    found = over_logits(
        _of_both(settings), hidden_BTD, table_DV, tokens, (teacher_table,), dtype, loss_chunk,
        with_gradient=False,
    )  # fmt: skip
    return found.total, found.each


def _forward(hidden_BTD, table_DV, tokens, teacher_table, dtype, settings, loss_chunk):
    found = over_logits(
        _of_both(settings), hidden_BTD, table_DV, tokens, (teacher_table,), dtype, loss_chunk,
        with_gradient=True,
    )  # fmt: skip
    saved = found.dhidden_BTD.astype(hidden_BTD.dtype), found.dtable_DV.astype(table_DV.dtype)
    return (found.total, found.each), saved


def _backward(dtype, settings, loss_chunk, saved, cotangents):
    g, _ = cotangents
    dhidden_BTD, dtable_DV = ((g * x).astype(x.dtype) for x in saved)
    return dhidden_BTD, dtable_DV, None, None


_summed.defvjp(_forward, _backward)


def _of_both(s: DistillConfig) -> OfLogits:
    """The loss, the divergence and the nll of each target, and the gradient of the loss."""

    def of_logits(logits, tokens, tables, dot, vocabulary):
        targets, weights, hard, hidden = tokens
        (table,) = tables
        theirs = dot("BtD,DV->BtV", hidden.astype(table.dtype), table)
        kept = _likeliest(theirs, s.top_k, vocabulary) if s.top_k else None
        theirs = theirs / s.temperature
        lse = vocabulary.log_sum_exp(logits)
        hit = vocabulary.hits(targets)
        nll = lse - vocabulary.add_up(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
        soft = logits / s.temperature
        logq = soft - vocabulary.log_sum_exp(soft)[..., None]
        logp = theirs - vocabulary.log_sum_exp(theirs)[..., None]
        divergence, gradient = _divergence(s.beta, logp, logq, kept, vocabulary)
        loss = (1.0 - hard) * divergence + hard * nll
        dlogits = ((1.0 - hard) / s.temperature)[..., None] * gradient
        dlogits += hard[..., None] * (jnp.exp(logits - lse[..., None]) - hit)
        return weights * loss, (loss, divergence, nll), weights[..., None] * dlogits

    return of_logits


def _divergence(beta: float, logp, logq, kept, vocabulary):
    """The divergence of each token [B, t], and its gradient by the logits that logq is of.

    Args:
      logp, logq: log-probabilities of this device's ids [B, t, V].
      kept: which of them count for themselves; None for all.
    """
    add_up, q = vocabulary.add_up, jnp.exp(logq)
    each, pull = _terms(beta, logp, logq)
    if kept is None:
        divergence = add_up(jnp.sum(each, axis=-1))
        return divergence, pull - q * add_up(jnp.sum(pull, axis=-1))[..., None]

    def tail(logs):
        mass = add_up(jnp.sum(jnp.where(kept, 0.0, jnp.exp(logs)), axis=-1))
        return jnp.log(jnp.maximum(mass, 1e-30))

    log_rest = tail(logq)
    rest, rest_pull = _terms(beta, tail(logp), log_rest)
    divergence = add_up(jnp.sum(jnp.where(kept, each, 0.0), axis=-1)) + rest
    # An id of the tail has its share of what pulls at the tail.
    pull = jnp.where(kept, pull, rest_pull[..., None] * jnp.exp(logq - log_rest[..., None]))
    return divergence, pull - q * add_up(jnp.sum(pull, axis=-1))[..., None]


def _terms(beta: float, logp, logq):
    """What each event adds to the divergence, and q times the derivative of that by q.

    A derivative may be off by a constant: probabilities add up to 1.
    """
    p, q = jnp.exp(logp), jnp.exp(logq)
    if beta == 0.0:
        return p * (logp - logq), -p
    if beta == 1.0:
        return q * (logq - logp), q * (logq - logp)
    logm = jnp.logaddexp(jnp.log(beta) + logp, jnp.log1p(-beta) + logq)
    each = beta * p * (logp - logm) + (1.0 - beta) * q * (logq - logm)
    return each, (1.0 - beta) * q * (logq - logm)


def _likeliest(logits, k: int, vocabulary):
    """Which of this device's ids are among the k likeliest of each token [B, t, V]."""
    # Compared with themselves: computed twice, they could differ by a rounding.
    logits = jax.lax.optimization_barrier(logits)
    largest = jax.lax.top_k(logits, min(k, vocabulary.size))[0]
    if vocabulary.axis:
        largest = jax.lax.all_gather(largest, vocabulary.axis, axis=2, tiled=True)
        largest = jax.lax.top_k(largest, min(k, largest.shape[-1]))[0]
    return logits >= largest[..., -1:]

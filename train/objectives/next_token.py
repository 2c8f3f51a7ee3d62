"""Next-token cross-entropy that never holds the logits of a whole batch.

Logits exist for a slice of the positions at a time. The gradient is made in the same pass, so
the vocabulary matmul runs three times a step (logits, d hidden, d table), as it must.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ...configs.schema import Config
from ...models.audio import Audio
from ...models.layers import widen
from ...models.parallel import sharding
from ...models.tiled_vision import TiledImages
from ...models.transformer import unembed_table
from ...models.vision import Images
from ..data import packing, transforms
from ..data.examples import Transform
from . import Loss, Objective


@dataclasses.dataclass(frozen=True, eq=False)
class NextToken(Objective):
    """Mean cross-entropy of the targets that weigh something.

    Attributes:
      z_loss: weight of log(Z)^2 (PaLM, arXiv 2204.02311), which keeps logits from drifting.
      loss_chunk: tokens whose logits exist at one time, a device.
      token_bytes_V: bytes of text that each token id stands for.
    """

    z_loss: float
    loss_chunk: int
    token_bytes_V: np.ndarray

    def transform(self, config: Config, tokenizer) -> Transform:
        """Whole documents, each of whose ids is learnt."""
        return transforms.of_text(config, tokenizer)

    def abstract_batch(self, config: Config, mesh) -> dict[str, Any]:
        """Shapes, dtypes and places of a batch of text, and of pictures and clips if it has any."""
        shape = (config.train.batch_size, config.data.seq_len)
        place = sharding.batch_sharding(mesh)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
        weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        names = ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT")
        batch = dict.fromkeys(names, ids) | {"weights_BT": weights}
        for name, shape in packing.media_room(config).items():
            counts = () if name == "tiles" else shape[:1]
            for key, dims, dtype in (
                (packing.BATCH_NAMES[name], shape, jnp.float32),
                (packing.BATCH_NAMES[f"num_{name}"], counts, jnp.int32),
            ):
                shape_B = (config.train.batch_size, *dims)
                batch[key] = jax.ShapeDtypeStruct(shape_B, dtype, sharding=place)
        return batch

    def weight_B(self, batch):
        return jnp.sum(batch["weights_BT"], axis=1)

    def loss(self, model, params, frozen, batch) -> Loss:
        """Summed loss of a batch: weight * (nll + z_loss * log(Z)^2) over its targets.

        Args:
          batch: tokens, targets, positions, segment ids and weights, each [B, T]; and tiles and
            frames of the rows, if there are any, whose own tokens should weigh nothing.
        """
        return self.of_states(model, params, self.states(model, params, batch), batch)

    def of_states(self, model, params, out, batch) -> Loss:
        """`loss` of what the layers gave."""
        weights_BT, targets_BT = batch["weights_BT"], batch["targets_BT"]
        total, nll_BT = cross_entropy(
            out.hidden_BTD, unembed_table(model.config, params), targets_BT, weights_BT,
            model.config.activation_dtype, self.z_loss, self.loss_chunk,
        )  # fmt: skip
        bytes_BT = jnp.asarray(self.token_bytes_V)[targets_BT] * weights_BT
        rows_B = {
            "nll": jnp.sum(nll_BT * weights_BT, axis=1),
            "tokens": self.weight_B(batch),
            "bytes": jnp.sum(bytes_BT, axis=1),
        }
        return Loss(total, rows_B, out.router)

    def states(self, model, params, batch):
        """What the layers give for a batch."""
        images = audio = None
        if "tiles_BIYXC" in batch:
            images = Images(batch["tiles_BIYXC"], batch["num_tiles_B"])
        if "tiles_BMIYXC" in batch:
            images = TiledImages(batch["tiles_BMIYXC"], batch["grids_BM"])
        if "frames_BISM" in batch:
            audio = Audio(batch["frames_BISM"], batch["num_frames_BI"])
        return model.apply(
            {"params": params}, batch["tokens_BT"], batch["positions_BT"],
            batch["segment_ids_BT"], images=images, audio=audio, method="states",
        )  # fmt: skip

    def summary(self, sums):
        """`loss` in nats a target, and `bits_per_byte` of the text that the targets stand for."""
        least = 1e-30  # of a batch without a target; the numbers are then 0
        return {
            "loss": sums["nll"] / (sums["tokens"] + least),
            "bits_per_byte": sums["nll"] / math.log(2) / (sums["bytes"] + least),
        }

    def report(self, sums):
        """The same, `perplexity`, and how many `tokens` and `bytes` were predicted."""
        if not sums["tokens"] or not sums["bytes"]:
            return {}
        numbers = self.summary(sums)
        perplexity = math.exp(min(numbers["loss"], 700.0))
        counts = {name: sums[name] for name in ("tokens", "bytes")}
        return {"loss": numbers["loss"], "perplexity": perplexity, **numbers, **counts}


def make(config: Config, token_bytes_V) -> NextToken:
    """The objective of pretraining."""
    return NextToken(config.train.z_loss, config.train.loss_chunk, token_bytes_V)


def cross_entropy(hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss=0.0, loss_chunk=1024):
    """Weighted cross-entropy of targets under softmax(hidden @ table).

    Args:
      table_DV: a leaf of any kind.
      dtype: what the matmuls round their operands to; they accumulate in float32.
      loss_chunk: rows are cut along T into slices of about this many tokens a device.

    Returns:
      The weighted sum with z-loss, which is differentiable, and nll_BT in nats, which is not.
    """
    hidden_BTD, table_DV = widen(hidden_BTD, table_DV, dtype)
    inputs = (hidden_BTD, table_DV, targets_BT, weights_BT)
    return _cross_entropy(*inputs, dtype, z_loss, loss_chunk)


def log_probs(hidden_BTD, table_DV, targets_BT, dtype, loss_chunk=1024):
    """Log-probability of each target under softmax(hidden @ table) [B, T], in nats.

    For losses that are no weighted sum over targets: differentiable target by target, for one more
    vocabulary matmul than `cross_entropy`, whose arguments these are.
    """
    hidden_BTD, table_DV = widen(hidden_BTD, table_DV, dtype)
    return -_negative_log_probs(hidden_BTD, table_DV, targets_BT, dtype, loss_chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss, loss_chunk):
    found = over_logits(
        _of_targets(z_loss), hidden_BTD, table_DV, (targets_BT, weights_BT), (), dtype, loss_chunk,
        with_gradient=False,
    )  # fmt: skip
    return found.total, found.each[0]


class Vocabulary(NamedTuple):
    """The part of the vocabulary that a device has: `size` ids from `first` on."""

    axis: str | None  # mesh axis that the vocabulary is split over
    first: Any
    size: int

    def add_up(self, x):
        return jax.lax.psum(x, self.axis) if self.axis else x

    def log_sum_exp(self, logits):
        """Of all logits of each token [B, t, V] -> [B, t]."""
        top = jnp.max(logits, axis=-1)
        top = jax.lax.pmax(top, self.axis) if self.axis else top
        return top + jnp.log(self.add_up(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)))

    def hits(self, y):
        """Where the ids y [B, t] are, [B, t, V]."""
        return jnp.arange(self.size) + self.first == y[..., None]


class OverLogits(NamedTuple):
    """total: of all tokens. each: numbers of each token [B, T]. And the gradient of the total."""

    total: jax.Array
    each: tuple
    dhidden_BTD: Any
    dtable_DV: Any


# (logits_BtV in float32, arrays of the tokens, tables, product of them, vocabulary) ->
# (the loss of each token [B, t], weighed; numbers of each; the gradient of the loss by logits).
OfLogits = Callable[..., tuple[jax.Array, tuple, jax.Array]]


def _of_targets(z_loss) -> OfLogits:
    """Weighted cross-entropy of targets, and of each token nll."""

    def of_logits(logits, tokens, tables, dot, vocabulary):
        y, w = tokens
        lse = vocabulary.log_sum_exp(logits)
        hit = vocabulary.hits(y)
        nll = lse - vocabulary.add_up(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
        p = jnp.exp(logits - lse[..., None]) * (1.0 + 2.0 * z_loss * lse)[..., None]
        return w * (nll + z_loss * lse**2), (nll,), (p - hit) * w[..., None]

    return of_logits


def over_logits(of_logits: OfLogits, hidden_BTD, table_DV, tokens, tables, dtype, loss_chunk,
                with_gradient: bool) -> OverLogits:  # fmt: skip
    """A loss of logits, and its gradient; each device works on its tokens and its vocabulary.

    The gradient of the table is added up over devices once, not slice by slice, and straight into
    the parts in which the table itself lies.

    Args:
      tokens: arrays [B, T] or [B, T, D] that belong to tokens. Positions that are added to fill up
        the last slice have zeros, among them a weight of 0.
      tables: arrays [D, V] beside `table_DV` that are not differentiated.
    """
    split = sharding.split_axes()
    run = functools.partial(
        _scan, of_logits, dtype=dtype, loss_chunk=loss_chunk, with_gradient=with_gradient
    )
    if not split:
        return run(hidden_BTD, table_DV, tokens, tables)

    def of_tokens(x):
        return sharding.activation(x.shape, ("batch", "loss_length", None)[: x.ndim])

    rows, each = of_tokens(hidden_BTD), of_tokens(hidden_BTD[..., 0])
    table = sharding.activation(table_DV.shape, (None, "act_vocab"))
    token_axes = _axes(each)
    stored = sharding.activation(table_DV.shape, ("embed", "vocab"))
    scattered = tuple(a for a in _axes(stored[:1]) if a in token_axes)
    added = tuple(a for a in token_axes if a not in scattered)

    def local(hidden_BTD, table_DV, tokens, tables):
        found = run(hidden_BTD, table_DV, tokens, tables, vocab_axis=table[1])
        dtable_DV = found.dtable_DV
        if dtable_DV is not None:
            if scattered:
                dtable_DV = jax.lax.psum_scatter(
                    dtable_DV, scattered, scatter_dimension=0, tiled=True
                )
            # Added up before the layers' gradients are made. Left to itself the compiler for TPUs
            # waits until after them, with the whole table in float32 beside them, and then adds
            # it up whole on every device, since more than one operation reads a part of it.
            dtable_DV, dhidden_BTD = jax.lax.optimization_barrier(
                (jax.lax.psum(dtable_DV, added), found.dhidden_BTD)
            )
            found = found._replace(dtable_DV=dtable_DV, dhidden_BTD=dhidden_BTD)
        return found._replace(total=jax.lax.psum(found.total, token_axes))

    out = OverLogits(PartitionSpec(), each, rows, PartitionSpec(scattered or None, table[1]))
    if not with_gradient:
        out = out._replace(dhidden_BTD=None, dtable_DV=None)
    places = (rows, table, jax.tree.map(of_tokens, tokens), table)
    return sharding.per_device(local, places, out)(
        hidden_BTD, table_DV.astype(dtype), tokens, tuple(x.astype(dtype) for x in tables)
    )


def _axes(spec) -> tuple[str, ...]:
    """The mesh axes of a `PartitionSpec`."""
    return tuple(a for dim in spec if dim for a in ((dim,) if isinstance(dim, str) else dim))


def _scan(of_logits, hidden_BTD, table_DV, tokens, tables, *, dtype, loss_chunk, with_gradient,
          vocab_axis=None):  # fmt: skip
    """The same on one device.

    Args:
      vocab_axis: mesh axis that the vocabulary is split over.
    """
    B, T, D = hidden_BTD.shape
    t = max(1, min(T, loss_chunk // B))
    slices = math.ceil(T / t)
    table, tables = table_DV.astype(dtype), tuple(x.astype(dtype) for x in tables)
    V = table.shape[1]
    first = jax.lax.axis_index(vocab_axis) * V if vocab_axis else 0
    vocabulary = Vocabulary(vocab_axis, first, V)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def cut(x):
        """[B, T, ...] -> [slices, B, t, ...]; the positions added at the end weigh nothing."""
        x = jnp.pad(x, [(0, 0), (0, slices * t - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, slices, t, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, slices * t, *x.shape[3:])[:, :T]

    def one(carry, slice_):
        total, dtable_DV = carry
        h, rest = slice_
        h = h.astype(dtype)
        logits = dot("BtD,DV->BtV", h, table)
        losses, each, dlogits = of_logits(logits, rest, tables, dot, vocabulary)
        total += jnp.sum(losses)
        if not with_gradient:
            return (total, dtable_DV), (each, None)
        dlogits = dlogits.astype(dtype)
        dtable_DV += dot("BtD,BtV->DV", h, dlogits)
        dh = vocabulary.add_up(dot("BtV,DV->BtD", dlogits, table))
        return (total, dtable_DV), (each, dh.astype(dtype))

    start = (jnp.zeros(()), jnp.zeros(table_DV.shape) if with_gradient else None)
    parts = (cut(hidden_BTD), jax.tree.map(cut, tokens))
    (total, dtable_DV), (each, dhidden) = jax.lax.scan(one, start, parts)
    each = jax.tree.map(join, each)
    return OverLogits(total, each, None if dhidden is None else join(dhidden), dtable_DV)


def _forward(hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss, loss_chunk):
    found = over_logits(
        _of_targets(z_loss), hidden_BTD, table_DV, (targets_BT, weights_BT), (), dtype, loss_chunk,
        with_gradient=True,
    )  # fmt: skip
    # Carried in the dtypes their cotangents need.
    saved = found.dhidden_BTD.astype(hidden_BTD.dtype), found.dtable_DV.astype(table_DV.dtype)
    return (found.total, found.each[0]), saved


def _backward(dtype, z_loss, loss_chunk, saved, cotangents):
    g, _ = cotangents
    dhidden_BTD, dtable_DV = ((g * x).astype(x.dtype) for x in saved)
    return dhidden_BTD, dtable_DV, None, None


_cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _negative_log_probs(hidden_BTD, table_DV, targets_BT, dtype, loss_chunk):
    weights_BT = jnp.ones(targets_BT.shape)
    return over_logits(
        _of_targets(0.0), hidden_BTD, table_DV, (targets_BT, weights_BT), (), dtype, loss_chunk,
        with_gradient=False,
    ).each[0]  # fmt: skip


def _forward_each(hidden_BTD, table_DV, targets_BT, dtype, loss_chunk):
    nll_BT = _negative_log_probs(hidden_BTD, table_DV, targets_BT, dtype, loss_chunk)
    return nll_BT, (hidden_BTD, table_DV, targets_BT)


def _backward_each(dtype, loss_chunk, saved, g_BT):
    """The gradient of sum(g * nll), where g are weights like any others."""
    hidden_BTD, table_DV, targets_BT = saved
    found = over_logits(
        _of_targets(0.0), hidden_BTD, table_DV, (targets_BT, g_BT), (), dtype, loss_chunk,
        with_gradient=True,
    )  # fmt: skip
    dhidden_BTD, dtable_DV = found.dhidden_BTD, found.dtable_DV
    return dhidden_BTD.astype(hidden_BTD.dtype), dtable_DV.astype(table_DV.dtype), None


_negative_log_probs.defvjp(_forward_each, _backward_each)

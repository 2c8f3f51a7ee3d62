"""Next-token cross-entropy that never holds the logits of a whole batch.

Logits exist for a slice of the positions at a time. The gradient is made in the same pass, so
the vocabulary matmul runs three times a step (logits, d hidden, d table), as it must.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ...configs.schema import Config
from ...models.audio import Audio
from ...models.layers import widen
from ...models.parallel import sharding
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
        images = audio = None
        if "tiles_BIYXC" in batch:
            images = Images(batch["tiles_BIYXC"], batch["num_tiles_B"])
        if "frames_BISM" in batch:
            audio = Audio(batch["frames_BISM"], batch["num_frames_BI"])
        out = model.apply(
            {"params": params}, batch["tokens_BT"], batch["positions_BT"],
            batch["segment_ids_BT"], images=images, audio=audio, method="states",
        )  # fmt: skip
        weights_BT, targets_BT = batch["weights_BT"], batch["targets_BT"]
        total, nll_BT = cross_entropy(
            out.hidden_BTD, unembed_table(model.config, params), targets_BT, weights_BT,
            model.config.compute_dtype, self.z_loss, self.loss_chunk,
        )  # fmt: skip
        bytes_BT = jnp.asarray(self.token_bytes_V)[targets_BT] * weights_BT
        rows_B = {
            "nll": jnp.sum(nll_BT * weights_BT, axis=1),
            "tokens": self.weight_B(batch),
            "bytes": jnp.sum(bytes_BT, axis=1),
        }
        return Loss(total, rows_B, out.router)

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
    inputs = (hidden_BTD, table_DV, targets_BT, weights_BT)
    return _on_mesh(*inputs, dtype, z_loss, loss_chunk, with_gradient=False)[:2]


def _on_mesh(hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss, loss_chunk,
             with_gradient):  # fmt: skip
    """Total, nll_BT, d hidden and d table; each device works on its tokens and its vocabulary.

    The gradient of the table is added up over devices once, not slice by slice, and straight into
    the parts in which the table itself lies.
    """
    split = sharding.split_axes()
    run = functools.partial(
        _scan, dtype=dtype, z_loss=z_loss, loss_chunk=loss_chunk, with_gradient=with_gradient
    )
    if not split:
        return run(hidden_BTD, table_DV, targets_BT, weights_BT)
    rows = sharding.activation(hidden_BTD.shape, ("batch", "loss_length", None))
    tokens = sharding.activation(targets_BT.shape, ("batch", "loss_length"))
    table = sharding.activation(table_DV.shape, (None, "act_vocab"))
    token_axes = _axes(tokens)
    stored = sharding.activation(table_DV.shape, ("embed", "vocab"))
    scattered = tuple(a for a in _axes(stored[:1]) if a in token_axes)
    added = tuple(a for a in token_axes if a not in scattered)

    def local(hidden_BTD, table_DV, targets_BT, weights_BT):
        total, nll_BT, dhidden_BTD, dtable_DV = run(
            hidden_BTD, table_DV, targets_BT, weights_BT, vocab_axis=table[1]
        )
        total = jax.lax.psum(total, token_axes)
        if dtable_DV is not None:
            if scattered:
                dtable_DV = jax.lax.psum_scatter(
                    dtable_DV, scattered, scatter_dimension=0, tiled=True
                )
            dtable_DV = jax.lax.psum(dtable_DV, added)
        return total, nll_BT, dhidden_BTD, dtable_DV

    out = (PartitionSpec(), tokens, rows, PartitionSpec(scattered or None, table[1]))
    if not with_gradient:
        out = (*out[:2], None, None)
    return sharding.per_device(local, (rows, table, tokens, tokens), out)(
        hidden_BTD, table_DV.astype(dtype), targets_BT, weights_BT
    )


def _axes(spec) -> tuple[str, ...]:
    """The mesh axes of a `PartitionSpec`."""
    return tuple(a for dim in spec if dim for a in ((dim,) if isinstance(dim, str) else dim))


def _scan(hidden_BTD, table_DV, targets_BT, weights_BT, *, dtype, z_loss, loss_chunk,
          with_gradient, vocab_axis=None):  # fmt: skip
    """The same on one device.

    Args:
      vocab_axis: mesh axis that the vocabulary is split over.
    """
    B, T, D = hidden_BTD.shape
    t = max(1, min(T, loss_chunk // B))
    slices = math.ceil(T / t)
    table = table_DV.astype(dtype)
    V = table.shape[1]
    first = jax.lax.axis_index(vocab_axis) * V if vocab_axis else 0
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def add_up(x):
        return jax.lax.psum(x, vocab_axis) if vocab_axis else x

    def cut(x):
        """[B, T, ...] -> [slices, B, t, ...]; the positions added at the end weigh nothing."""
        x = jnp.pad(x, [(0, 0), (0, slices * t - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, slices, t, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, slices * t, *x.shape[3:])[:, :T]

    def one(carry, slice_):
        total, dtable_DV = carry
        h, y, w = slice_
        h = h.astype(dtype)
        logits = dot("BtD,DV->BtV", h, table)
        top = jnp.max(logits, axis=-1)
        top = jax.lax.pmax(top, vocab_axis) if vocab_axis else top
        lse = top + jnp.log(add_up(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)))
        hit = jnp.arange(V) + first == y[..., None]
        nll = lse - add_up(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
        total += jnp.sum(w * (nll + z_loss * lse**2))
        if not with_gradient:
            return (total, dtable_DV), (nll, None)
        p = jnp.exp(logits - lse[..., None]) * (1.0 + 2.0 * z_loss * lse)[..., None]
        dlogits = ((p - hit) * w[..., None]).astype(dtype)
        dtable_DV += dot("BtD,BtV->DV", h, dlogits)
        dh = add_up(dot("BtV,DV->BtD", dlogits, table))
        return (total, dtable_DV), (nll, dh.astype(dtype))

    start = (jnp.zeros(()), jnp.zeros(table_DV.shape) if with_gradient else None)
    parts = (cut(hidden_BTD), cut(targets_BT), cut(weights_BT))
    (total, dtable_DV), (nll, dhidden) = jax.lax.scan(one, start, parts)
    return total, join(nll), None if dhidden is None else join(dhidden), dtable_DV


def _forward(hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss, loss_chunk):
    total, nll_BT, dhidden_BTD, dtable_DV = _on_mesh(
        hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss, loss_chunk, with_gradient=True
    )
    assert dhidden_BTD is not None and dtable_DV is not None
    # Carried in the dtypes their cotangents need.
    saved = dhidden_BTD.astype(hidden_BTD.dtype), dtable_DV.astype(table_DV.dtype)
    return (total, nll_BT), saved


def _backward(dtype, z_loss, loss_chunk, saved, cotangents):
    g, _ = cotangents
    dhidden_BTD, dtable_DV = ((g * x).astype(x.dtype) for x in saved)
    return dhidden_BTD, dtable_DV, None, None


_cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _negative_log_probs(hidden_BTD, table_DV, targets_BT, dtype, loss_chunk):
    weights_BT = jnp.ones(targets_BT.shape)
    return _on_mesh(
        hidden_BTD, table_DV, targets_BT, weights_BT, dtype, 0.0, loss_chunk, with_gradient=False
    )[1]


def _forward_each(hidden_BTD, table_DV, targets_BT, dtype, loss_chunk):
    nll_BT = _negative_log_probs(hidden_BTD, table_DV, targets_BT, dtype, loss_chunk)
    return nll_BT, (hidden_BTD, table_DV, targets_BT)


def _backward_each(dtype, loss_chunk, saved, g_BT):
    """The gradient of sum(g * nll), where g are weights like any others."""
    hidden_BTD, table_DV, targets_BT = saved
    _, _, dhidden_BTD, dtable_DV = _on_mesh(
        hidden_BTD, table_DV, targets_BT, g_BT, dtype, 0.0, loss_chunk, with_gradient=True
    )
    assert dhidden_BTD is not None and dtable_DV is not None
    return dhidden_BTD.astype(hidden_BTD.dtype), dtable_DV.astype(table_DV.dtype), None


_negative_log_probs.defvjp(_forward_each, _backward_each)

"""Next-token cross-entropy that never holds the logits of a whole batch.

Logits exist for a slice of the positions at a time. The gradient is made in the same pass, so
the vocabulary matmul runs three times a step (logits, d hidden, d table), as it must.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ...models import sharding
from ...models.transformer import unembed_table


def loss(model, params, batch, z_loss: float, loss_chunk: int):
    """Summed training loss of a batch, and the sums that metrics are made of.

    Args:
      model: a `Transformer`.
      params: its parameters.
      batch: tokens, targets, positions, segment ids and weights, each [B, T]; and `images` or
        `audio` of the rows, if there are any, whose own tokens should weigh nothing.
      z_loss: weight of log(Z)^2 (PaLM, arXiv 2204.02311), which keeps logits from drifting.
      loss_chunk: tokens whose logits exist at one time, a device.

    Returns:
      The sum over targets of weight * (nll + z_loss * log(Z)^2); the sum of weight * nll in
      nats; and the statistics of the MoE routers, as `Output.router`.
    """
    out = model.apply(
        {"params": params}, batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"],
        images=batch.get("images"), audio=batch.get("audio"),
    )  # fmt: skip
    total, nll_BT = cross_entropy(
        out.hidden_BTD, unembed_table(model.config, params), batch["targets_BT"],
        batch["weights_BT"], model.config.compute_dtype, z_loss, loss_chunk,
    )  # fmt: skip
    return total, jnp.sum(nll_BT * batch["weights_BT"]), out.router


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss=0.0, loss_chunk=1024):
    """Weighted cross-entropy of targets under softmax(hidden @ table).

    Args:
      dtype: what the matmuls round their operands to; they accumulate in float32.
      loss_chunk: rows are cut along T into slices of about this many tokens a device.

    Returns:
      The weighted sum with z-loss, which is differentiable, and nll_BT in nats, which is not.
    """
    inputs = (hidden_BTD, table_DV, targets_BT, weights_BT)
    return _scan(*inputs, dtype, z_loss, loss_chunk, with_gradient=False)[:2]


def _scan(hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss, loss_chunk, with_gradient):
    B, T, D = hidden_BTD.shape
    mesh = jax.sharding.get_abstract_mesh()
    rows = B if mesh.empty else max(1, B // sharding.batch_parts(mesh))
    t = max(1, min(T, loss_chunk // rows))
    slices = math.ceil(T / t)
    table = table_DV.astype(dtype)
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
        h, y, w = slice_
        h = h.astype(dtype)
        logits = dot("BtD,DV->BtV", h, table)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        total += jnp.sum(w * (nll + z_loss * lse**2))
        if not with_gradient:
            return (total, dtable_DV), (nll, None)
        p = jnp.exp(logits - lse[..., None]) * (1.0 + 2.0 * z_loss * lse)[..., None]
        hit = jnp.arange(logits.shape[-1]) == y[..., None]
        dlogits = ((p - hit) * w[..., None]).astype(dtype)
        dtable_DV += dot("BtD,BtV->DV", h, dlogits)
        return (total, dtable_DV), (nll, dot("BtV,DV->BtD", dlogits, table).astype(dtype))

    start = (jnp.zeros(()), jnp.zeros(table_DV.shape) if with_gradient else None)
    parts = (cut(hidden_BTD), cut(targets_BT), cut(weights_BT))
    (total, dtable_DV), (nll, dhidden) = jax.lax.scan(one, start, parts)
    return total, join(nll), None if dhidden is None else join(dhidden), dtable_DV


def _forward(hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss, loss_chunk):
    total, nll_BT, dhidden_BTD, dtable_DV = _scan(
        hidden_BTD, table_DV, targets_BT, weights_BT, dtype, z_loss, loss_chunk, with_gradient=True
    )
    assert dhidden_BTD is not None and dtable_DV is not None
    # Carried in the dtypes their cotangents need.
    saved = dhidden_BTD.astype(hidden_BTD.dtype), dtable_DV.astype(table_DV.dtype)
    return (total, nll_BT), saved


def _backward(dtype, z_loss, loss_chunk, saved, cotangents):
    g, _ = cotangents
    dhidden_BTD, dtable_DV = saved
    return (g * dhidden_BTD).astype(dhidden_BTD.dtype), g * dtable_DV, None, None


cross_entropy.defvjp(_forward, _backward)

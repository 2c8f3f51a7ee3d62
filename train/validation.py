"""Token-weighted loss, perplexity and bits per byte of a split, the same for any batch or mesh.

Rows are packed without regard to the batch size, each row's loss is summed on the device, and
the rows are summed on the host in float64.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.errors import UserError
from ..configs.schema import Config
from ..models.parallel import processes, sharding
from ..models.transformer import unembed_table
from .data import batches, make_eval_rows
from .objectives.next_token import cross_entropy


def evaluate_loss(config: Config, model, params, tokenizer, mesh) -> dict[str, float]:
    """Measure the loss on `data.validation`, or its first `eval.max_rows` packed rows.

    Returns:
      `loss` in nats a token, `perplexity` = exp(loss), `bits_per_byte` of text, and how many
      `tokens` and `bytes` were predicted.

    Raises:
      UserError: the split holds nothing to predict.
    """
    parts = sharding.parts("batch", mesh)
    size = -(-config.eval.batch_size // parts) * parts
    rows = make_eval_rows(config.data, tokenizer, config.data.validation, config.data.seq_len)
    rows = itertools.islice(rows, config.eval.max_rows or None)
    nll = tokens = bytes_ = 0.0
    processes.wait("evaluation")
    with jax.set_mesh(mesh):
        for batch in batches(rows, size):
            device = sharding.put_batch(mesh, batch, list(range(size)), size)
            nll_B = processes.on_host(_row_losses(model, params, device))
            nll += float(np.sum(nll_B.astype(np.float64)))
            weights = batch["weights_BT"]
            tokens += float(weights.sum(dtype=np.float64))
            bytes_ += float((tokenizer.token_bytes[batch["targets_BT"]] * weights).sum())
    if not tokens or not bytes_:
        raise UserError(f"data.validation={config.data.validation} holds nothing to predict")
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nll / math.log(2) / bytes_,
        "tokens": tokens,
        "bytes": bytes_,
    }


@functools.partial(jax.jit, static_argnums=0)
def _row_losses(model, params, batch):
    """Summed negative log-likelihood of each row, [B] in nats."""
    out = model.apply(
        {"params": params}, batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"],
        method="states",
    )  # fmt: skip
    _, nll_BT = cross_entropy(
        out.hidden_BTD, unembed_table(model.config, params), batch["targets_BT"],
        batch["weights_BT"], model.config.compute_dtype,
    )  # fmt: skip
    return jnp.sum(nll_BT * batch["weights_BT"], axis=1)

"""Mixture-of-experts layer: three routers behind one contract, and the expert computation.

A router turns the logits of a row into `Choice`: pairs of (token, expert) with a scale on what
the expert reads or on what it writes. All decisions are made row by row (a row is one sequence of
the batch), so they do not depend on how the batch is spread over devices or microbatches.

- `sigmoid`: Llama 4. Top-k of the raw logits; sigmoid(logit) multiplies the expert's input.
- `softmax`: Mixtral (arXiv 2401.04088). Top-k; softmax over the chosen multiplies the output.
- `expert_choice`: arXiv 2202.09368. Each expert takes its top tokens of the row; not causal.
"""

import math
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from ..configs.schema import ModelConfig
from . import sharding
from .experts import Routing, swiglu_experts
from .layers import SwiGLU, contract, normal, param, residual_std
from .sharding import constrain


class Choice(NamedTuple):
    """M (token, expert) pairs of each row; expert E marks an unused pair."""

    token_BM: jax.Array
    expert_BM: jax.Array
    input_scale_BM: jax.Array | None
    output_scale_BM: jax.Array | None


class RouterStats(flax.struct.PyTreeNode):
    """What one layer's router did with the tokens of the batch, padding apart.

    load_E: share of the pairs that each expert was chosen for. entropy: of a token's
    distribution over experts, nats. dropped: share of the pairs beyond an expert's capacity.
    loss: load-balancing and z-loss, weighted.
    """

    load_E: jax.Array
    entropy: jax.Array
    dropped: jax.Array
    loss: jax.Array


def choose_experts(logits_BTE, bias_E, valid_BT, config: ModelConfig) -> Choice:
    """Token choice: each token takes its `experts_per_token` best experts."""
    A, E = config.experts_per_token, config.num_experts
    if bias_E is None:
        top_BTA, expert_BTA = jax.lax.top_k(logits_BTE, A)
    else:
        # The bias decides who is chosen, never how much a chosen expert counts (2412.19437).
        score = jax.nn.sigmoid if config.router == "sigmoid" else jax.nn.softmax
        _, expert_BTA = jax.lax.top_k(score(logits_BTE) + jax.lax.stop_gradient(bias_E), A)
        top_BTA = jnp.take_along_axis(logits_BTE, expert_BTA, axis=-1)
    expert_BTA = jnp.where(valid_BT[..., None], expert_BTA, E)
    B, T = valid_BT.shape
    token_BM = jnp.broadcast_to(jnp.repeat(jnp.arange(T), A), (B, T * A))
    expert_BM = expert_BTA.reshape(B, T * A)
    if config.router == "sigmoid":
        return Choice(token_BM, expert_BM, jax.nn.sigmoid(top_BTA).reshape(B, T * A), None)
    return Choice(token_BM, expert_BM, None, jax.nn.softmax(top_BTA).reshape(B, T * A))


def choose_tokens(logits_BTE, valid_BT, config: ModelConfig) -> Choice:
    """Expert choice: each expert takes its best tokens of the row, all experts equally many."""
    B, T, E = logits_BTE.shape
    C = capacity(config, T, config.capacity_factor or 1.0)
    score_BTE = jnp.where(valid_BT[..., None], jax.nn.softmax(logits_BTE), 0.0)
    score_BEC, token_BEC = jax.lax.top_k(jnp.swapaxes(score_BTE, 1, 2), C)
    expert_BEC = jnp.where(score_BEC > 0, jnp.arange(E)[:, None], E)
    return Choice(
        token_BEC.reshape(B, E * C), expert_BEC.reshape(B, E * C), None, score_BEC.reshape(B, E * C)
    )


def capacity(config: ModelConfig, row_length: int, factor: float) -> int:
    """Pairs of one row that an expert takes: `factor` times an even share, within the row."""
    even = row_length * config.experts_per_token / config.num_experts
    return max(1, min(row_length, math.ceil(factor * even)))


def drop_overflow(choice: Choice, num_experts: int, limit: int) -> Choice:
    """Mark as unused the pairs beyond the first `limit` of each expert in each row."""
    chosen_BME = jax.nn.one_hot(choice.expert_BM, num_experts, dtype=jnp.int32)
    place_BM = jnp.sum(jnp.cumsum(chosen_BME, axis=1) * chosen_BME, axis=-1)
    kept_BM = jnp.where(place_BM <= limit, choice.expert_BM, num_experts)
    return choice._replace(expert_BM=kept_BM)


def router_stats(logits_BTE, chosen_BM, kept_BM, valid_BT, config: ModelConfig) -> RouterStats:
    """Statistics and auxiliary losses over all tokens of the batch.

    Load balancing is E * sum_e load_e * mean probability_e (Switch, arXiv 2101.03961), 1 where
    even; the z-loss is the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906).
    """
    E = config.num_experts
    tokens = jnp.maximum(jnp.sum(valid_BT), 1)
    mask_BT1 = valid_BT[..., None]
    prob_BTE = jnp.where(mask_BT1, jax.nn.softmax(logits_BTE), 0.0)
    log_BTE = jnp.where(mask_BT1, jax.nn.log_softmax(logits_BTE), 0.0)
    experts = jnp.arange(E)
    count_E = jnp.sum(chosen_BM[..., None] == experts, axis=(0, 1))
    kept = jnp.sum(kept_BM < E)
    pairs = jnp.maximum(jnp.sum(count_E), 1)
    load_E = count_E / pairs
    balance = E * jnp.sum(load_E * jnp.sum(prob_BTE, axis=(0, 1)) / tokens)
    z_BT = jnp.where(valid_BT, jax.nn.logsumexp(logits_BTE, axis=-1), 0.0)
    return RouterStats(
        load_E=load_E,
        entropy=-jnp.sum(prob_BTE * log_BTE) / tokens,
        dropped=1.0 - kept / pairs,
        loss=config.load_balance_weight * balance
        + config.router_z_weight * jnp.sum(z_BT**2) / tokens,
    )


class MoE(nn.Module):
    """Routed experts, and one shared expert that every token goes to."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, valid_BT):
        """Returns the output [B, T, D] and the router's statistics."""
        c = self.config
        D, E, F = c.embed_dim, c.num_experts, c.expert_dim
        read, write = normal(D**-0.5), normal(residual_std(F, c))
        router_DE = param(self, "router_DE", (D, E), ("embed", "router"), read, c.param_dtype)
        up_names, down_names = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        w_gate_EDF = param(self, "w_gate_EDF", (E, D, F), up_names, read, c.param_dtype)
        w_up_EDF = param(self, "w_up_EDF", (E, D, F), up_names, read, c.param_dtype)
        w_down_EFD = param(self, "w_down_EFD", (E, F, D), down_names, write, c.param_dtype)
        bias_E = None
        if c.bias_update_rate:
            bias_E = param(self, "router_bias_E", (E,), ("router",), normal(0.0), "float32")

        # In float32 whatever the rest: a rounded logit sends a token to another expert.
        logits_BTE = contract("BTD,DE->BTE", x_BTD, router_DE, "float32")
        if c.router == "expert_choice":
            choice = kept = choose_tokens(logits_BTE, valid_BT, c)
            limit = capacity(c, x_BTD.shape[1], c.capacity_factor or 1.0)
        else:
            choice = kept = choose_experts(logits_BTE, bias_E, valid_BT, c)
            limit = None
            if c.capacity_factor:
                limit = capacity(c, x_BTD.shape[1], c.capacity_factor)
                kept = drop_overflow(choice, E, limit)
        stats = router_stats(logits_BTE, choice.expert_BM, kept.expert_BM, valid_BT, c)
        y_BTD = apply_experts(x_BTD, kept, w_gate_EDF, w_up_EDF, w_down_EFD, limit, c.compute_dtype)
        if c.shared_expert:
            y_BTD = y_BTD + SwiGLU(c, F, name="shared")(x_BTD)
        return constrain(y_BTD, "batch", "length", "act_embed"), stats


def apply_experts(x_BTD, choice: Choice, w_gate_EDF, w_up_EDF, w_down_EFD, limit, dtype):
    """Each token's sum over its experts, with experts split over the mesh axis `expert`.

    Devices of one `expert` group gather each other's tokens, compute the pairs of their own
    experts and add up what belongs together; the hidden width is split over `tensor`.

    Args:
      limit: most pairs of one row that an expert takes, None if there is no bound.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = {} if mesh.empty else {a: n for a, n in mesh.shape.items() if n > 1}

    def local(x_BTD, choice, w_gate_EDF, w_up_EDF, w_down_EFD):
        experts = w_gate_EDF.shape[0]
        if "expert" in split:
            x_BTD, choice = jax.tree.map(
                lambda a: jax.lax.all_gather(a, "expert", axis=0, tiled=True), (x_BTD, choice)
            )
            mine_BM = choice.expert_BM - jax.lax.axis_index("expert") * experts
            here_BM = (mine_BM >= 0) & (mine_BM < experts)
            choice = choice._replace(expert_BM=jnp.where(here_BM, mine_BM, experts))
        B, T, D = x_BTD.shape
        pairs = choice.expert_BM.size
        row_B1 = jnp.arange(B)[:, None]
        choice = choice._replace(token_BM=choice.token_BM + T * row_B1)
        routing = Routing(*jax.tree.map(lambda a: a.reshape(-1), choice))
        y_TD, _ = swiglu_experts(
            x_BTD.reshape(B * T, D), routing, w_gate_EDF, w_up_EDF, w_down_EFD,
            capacity=None if limit is None else B * limit,
            expected_pairs=pairs // split.get("expert", 1), dtype=dtype,
        )  # fmt: skip
        if "tensor" in split:
            y_TD = jax.lax.psum(y_TD, "tensor")
        y_BTD = y_TD.reshape(B, T, D)
        if "expert" in split:
            y_BTD = jax.lax.psum_scatter(y_BTD, "expert", scatter_dimension=0, tiled=True)
        return y_BTD

    if not split:
        return local(x_BTD, choice, w_gate_EDF, w_up_EDF, w_down_EFD)
    up = sharding.resolve("experts", w_gate_EDF.shape, ("experts", None, "act_mlp"), mesh)
    down = sharding.resolve("experts", w_down_EFD.shape, ("experts", "act_mlp", None), mesh)
    rows = sharding.resolve("tokens", x_BTD.shape, ("batch", "length", None), mesh)
    pair_rows = jax.tree.map(lambda _: PartitionSpec(rows[0]), choice)
    return jax.shard_map(
        local, in_specs=(rows, pair_rows, up, up, down), out_specs=rows, check_vma=False
    )(x_BTD, choice, w_gate_EDF, w_up_EDF, w_down_EFD)

"""Mixture-of-experts layer: three routers behind one contract, and the expert computation.

A router turns the logits of a row into `Choice`: pairs of (token, expert) with a scale on what
the expert reads or on what it writes. All decisions are made row by row (a row is one sequence of
the batch), so they do not depend on how the batch is spread over devices or microbatches.

- `sigmoid`: Llama 4. Top-k of the raw logits; sigmoid(logit) multiplies the expert's input.
- `softmax`: Mixtral (arXiv 2401.04088). Top-k; softmax over the chosen multiplies the output.
- `expert_choice`: arXiv 2202.09368. Each expert takes its top tokens of the row; not causal.
"""

import functools
import math
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from ..configs.schema import ModelConfig
from .kernels.experts import Routing, read_pairs, sort_by_expert, swiglu_experts, write_pairs
from .layers import SwiGLU, contract, normal, param, residual_std
from .leaf import of_rows, split_names
from .masks import Tokens
from .parallel import context, exchange, sharding
from .parallel.sharding import constrain


class Choice(NamedTuple):
    """M (token, expert) pairs of each row; expert E marks an unused pair."""

    token_BM: jax.Array
    expert_BM: jax.Array
    input_scale_BM: jax.Array | None
    output_scale_BM: jax.Array | None


class RouterSums(flax.struct.PyTreeNode):
    """What one layer's router did, as sums over tokens, padding apart; parts of a batch add up.

    tokens: how many. count_E: pairs that each expert was chosen for. kept: pairs within capacity.
    prob_E: of each expert. entropy: of a token's distribution over experts, nats. z: the squares
    of logsumexp(logits).
    """

    tokens: jax.Array
    count_E: jax.Array
    kept: jax.Array
    prob_E: jax.Array
    entropy: jax.Array
    z: jax.Array


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
        top_BTA, expert_BTA = _top_k(logits_BTE, A, "length")
    else:
        # The bias decides who is chosen, never how much a chosen expert counts (2412.19437).
        score = jax.nn.sigmoid if config.router == "sigmoid" else jax.nn.softmax
        _, expert_BTA = _top_k(score(logits_BTE) + jax.lax.stop_gradient(bias_E), A, "length")
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
    score_BEC, token_BEC = _top_k(jnp.swapaxes(score_BTE, 1, 2), C, None)
    expert_BEC = jnp.where(score_BEC > 0, jnp.arange(E)[:, None], E)
    return Choice(
        token_BEC.reshape(B, E * C), expert_BEC.reshape(B, E * C), None, score_BEC.reshape(B, E * C)
    )


def _top_k(x, k: int, second: str | None):
    """`top_k` over the last dim of an array split along its first two, "batch" and `second`.

    Left to itself the compiler gathers all rows of the batch on every device.
    """
    if not sharding.split_axes():
        return jax.lax.top_k(x, k)
    spec = sharding.activation(x.shape, ("batch", second, None))
    return sharding.per_device(lambda x: tuple(jax.lax.top_k(x, k)), (spec,), (spec, spec))(x)


def capacity(config: ModelConfig, row_length: int, factor: float) -> int:
    """Pairs of one row that an expert takes: `factor` times an even share, within the row."""
    even = row_length * config.experts_per_token / config.num_experts
    return max(1, min(row_length, math.ceil(factor * even)))


def drop_overflow(choice: Choice, num_experts: int, limit: int, zigzag: bool = False) -> Choice:
    """Mark as unused the pairs beyond the first `limit` of each expert in each row.

    Args:
      zigzag: tokens are in zig-zag order, but the first to come are those in the natural one.
    """
    expert_BM = context.from_zigzag(choice.expert_BM) if zigzag else choice.expert_BM
    expert_BM = constrain(expert_BM, "batch", None)  # counting needs the whole row
    chosen_BME = jax.nn.one_hot(expert_BM, num_experts, dtype=jnp.int32)
    place_BM = jnp.sum(jnp.cumsum(chosen_BME, axis=1) * chosen_BME, axis=-1)
    kept_BM = jnp.where(place_BM <= limit, expert_BM, num_experts)
    return choice._replace(expert_BM=context.to_zigzag(kept_BM) if zigzag else kept_BM)


def router_sums(logits_BTE, chosen_BM, kept_BM, valid_BT) -> RouterSums:
    """What the router did with these tokens."""
    E = logits_BTE.shape[-1]
    mask_BT1 = valid_BT[..., None]
    prob_BTE = jnp.where(mask_BT1, jax.nn.softmax(logits_BTE), 0.0)
    log_BTE = jnp.where(mask_BT1, jax.nn.log_softmax(logits_BTE), 0.0)
    z_BT = jnp.where(valid_BT, jax.nn.logsumexp(logits_BTE, axis=-1), 0.0)
    return RouterSums(
        tokens=jnp.sum(valid_BT),
        count_E=jnp.sum(chosen_BM[..., None] == jnp.arange(E), axis=(0, 1)),
        kept=jnp.sum(kept_BM < E),
        prob_E=jnp.sum(prob_BTE, axis=(0, 1)),
        entropy=-jnp.sum(prob_BTE * log_BTE),
        z=jnp.sum(z_BT**2),
    )


def router_stats(sums: RouterSums, config: ModelConfig) -> RouterStats:
    """Statistics and auxiliary losses from the sums of one layer, or of a stack of layers.

    Load balancing is E * sum_e load_e * mean probability_e (Switch, arXiv 2101.03961), 1 where
    even; the z-loss is the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906).
    """
    tokens = jnp.maximum(sums.tokens, 1)
    pairs = jnp.maximum(jnp.sum(sums.count_E, axis=-1), 1)
    load_E = sums.count_E / pairs[..., None]
    balance = config.num_experts * jnp.sum(load_E * sums.prob_E, axis=-1) / tokens
    return RouterStats(
        load_E=load_E,
        entropy=sums.entropy / tokens,
        dropped=1.0 - sums.kept / pairs,
        loss=config.load_balance_weight * balance + config.router_z_weight * sums.z / tokens,
    )


class MoE(nn.Module):
    """Routed experts, and one shared expert that every token goes to."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, tokens: Tokens):
        """Returns the output [B, T, D] and the router's sums."""
        c = self.config
        D, E, F = c.embed_dim, c.num_experts, c.expert_dim
        read, write = normal(D**-0.5), normal(residual_std(F, c))
        router_DE = param(self, "router_DE", (D, E), ("embed", "router"), read, c.param_dtype)
        up_names = ("experts", "expert_embed", "mlp")
        down_names = ("experts", "mlp", "expert_embed")
        w_gate_EDF = param(self, "w_gate_EDF", (E, D, F), up_names, read, c.param_dtype)
        w_up_EDF = param(self, "w_up_EDF", (E, D, F), up_names, read, c.param_dtype)
        w_down_EFD = param(self, "w_down_EFD", (E, F, D), down_names, write, c.param_dtype)
        bias_E = None
        if c.bias_update_rate:
            bias_E = param(self, "router_bias_E", (E,), ("router",), normal(0.0), "float32")

        # In float32 whatever the rest: a rounded logit sends a token to another expert.
        logits_BTE = contract("BTD,DE->BTE", x_BTD, router_DE, "float32")
        logits_BTE = constrain(logits_BTE, "batch", "length", None)
        valid_BT = tokens.segments_BT != 0
        # The dim of the pairs: an expert's choice may be anywhere in the row.
        pairs = "length"
        if c.router == "expert_choice":
            choice = kept = choose_tokens(logits_BTE, valid_BT, c)
            limit = capacity(c, x_BTD.shape[1], c.capacity_factor or 1.0)
            pairs = None
        else:
            choice = kept = choose_experts(logits_BTE, bias_E, valid_BT, c)
            limit = None
            if c.capacity_factor:
                limit = capacity(c, x_BTD.shape[1], c.capacity_factor)
                kept = drop_overflow(choice, E, limit, tokens.zigzag)
        sums = router_sums(logits_BTE, choice.expert_BM, kept.expert_BM, valid_BT)
        weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
        y_BTD = apply_experts(x_BTD, kept, weights, limit, pairs, c.compute_dtype)
        if c.shared_expert:
            y_BTD = y_BTD + SwiGLU(c, F, name="shared")(x_BTD)
        return constrain(y_BTD, "batch", "residual_length", "act_embed"), sums


def apply_experts(x_BTD, choice: Choice, weights, limit, pairs, dtype):
    """Each token's sum over its experts, with experts split over the mesh axis `expert`.

    Each device sends the pairs of its own tokens to the devices that have their experts, and gets
    the results back. The hidden width is split over `tensor`.

    Args:
      weights: w_gate_EDF, w_up_EDF, w_down_EFD.
      limit: most pairs of one row that an expert takes, None if there is no bound.
      pairs: logical axis of the pairs' dim.
    """
    num_experts = weights[0].shape[0]
    split = sharding.split_axes()
    rows = out = PartitionSpec(None, None, None)
    if split:
        up, down = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
        stored = tuple(
            jax.tree.map(lambda x, n: sharding.activation(x.shape, n), w, split_names(w, names))
            for w, names in zip(weights, (up, up, down), strict=True)
        )
        rows = sharding.activation(x_BTD.shape, ("batch", "length", None))
        out = sharding.activation(x_BTD.shape, ("batch", "residual_length", None))

    def local(x_BTD, choice, weights):
        B, T, D = x_BTD.shape
        if split:
            weights = jax.tree.map(_gathered, weights, stored)
        token_BM, expert_BM = choice.token_BM, choice.expert_BM
        if rows[1]:  # the row continues on other devices
            token_BM = token_BM - T * jax.lax.axis_index(context.AXIS)
            here_BM = (token_BM >= 0) & (token_BM < T)
            token_BM = jnp.where(here_BM, token_BM, 0)
            expert_BM = jnp.where(here_BM, expert_BM, num_experts)
        token_BM = token_BM + T * jnp.arange(B)[:, None]
        weights = of_rows(weights, lambda chosen_B: jnp.repeat(chosen_B, T))
        choice = choice._replace(token_BM=token_BM, expert_BM=expert_BM)
        routing = Routing(*jax.tree.map(lambda a: a.reshape(-1), choice))
        x_TD = x_BTD.reshape(B * T, D)
        bound = None if limit is None else B * limit
        experts = functools.partial(
            swiglu_experts, dtype=dtype, hidden_axis="tensor" if "tensor" in split else None
        )
        if "expert" in split:
            y_TD = _exchanged(x_TD, routing, weights, num_experts, bound, experts)
        else:
            y_TD, _ = experts(x_TD, routing, *weights, capacity=bound)
        y_BTD = y_TD.reshape(B, T, D)
        if "tensor" in split and out[1] != rows[1]:
            return jax.lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y_BTD, "tensor") if "tensor" in split else y_BTD

    if not split:
        return local(x_BTD, choice, weights)
    of_pair = sharding.activation(x_BTD.shape[:2], ("batch", pairs))
    in_specs = (rows, jax.tree.map(lambda _: of_pair, choice), stored)
    local = jax.checkpoint(local, policy=_save_all_but_gathered, prevent_cse=False)
    return sharding.per_device(local, in_specs, out)(x_BTD, choice, weights)


def _gathered(w, spec):
    """An expert weight with its whole embed dim, of which a device keeps a part.

    Its gradient comes back to the parts added up by a reduce-scatter.
    """
    for dim in range(1, w.ndim):
        axes = spec[dim]
        if axes and axes != "tensor":
            w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    return w


def _save_all_but_gathered(primitive, *_, **__) -> bool:
    """Gather weights again for the gradient: they are many times what a device keeps of them."""
    return primitive.name != "all_gather"


def _exchanged(x_TD, routing: Routing, weights, num_experts, bound, experts):
    """`experts`, a `swiglu_experts`, where each device of the group has some of the experts."""
    here, num_pairs = weights[0].shape[0], len(routing.token_M)
    devices = num_experts // here
    # An unused pair has expert `num_experts`, so its device is none of the group.
    order_M, all_n = sort_by_expert(routing.expert_M // here, devices)
    slots = exchange.slots(num_pairs, devices)
    if bound is not None:
        slots = min(slots, here * bound)

    def one_round(i, args):
        x_TD, routing, weights, order_M, all_n = args
        pair_P, send_n = exchange.of_round(i, all_n, order_M, slots)
        plan = exchange.plan(send_n)
        rows_RD = exchange.send(read_pairs(x_TD, routing, pair_P), plan, slots)

        def sent(number_P):
            """Numbers from 0 on with their rows; -1 for an empty slot."""
            return jnp.ravel(exchange.send(number_P[:, None] + 1, plan, slots)) - 1

        expert_R = sent(routing.expert_M.at[pair_P].get(mode="clip") % here)
        expert_R = jnp.where(expert_R >= 0, expert_R, here)
        token_P = routing.token_M.at[pair_P].get(mode="clip")
        y_RD, _ = experts(
            rows_RD, Routing(jnp.arange(len(rows_RD)), expert_R),
            *of_rows(weights, lambda chosen_T: sent(chosen_T[token_P])),
            capacity=None if bound is None else devices * bound,
            expected_pairs=min(num_pairs, len(rows_RD)),
        )  # fmt: skip
        y_PD = exchange.bring_back(y_RD, plan, len(pair_P))
        return write_pairs(y_PD, routing, pair_P, x_TD)

    args = x_TD, routing, weights, order_M, all_n
    if slots == num_pairs:
        return one_round(0, args)
    most = jax.lax.pmax(jnp.max(all_n), exchange.AXIS)
    return exchange.sum_of_rounds(one_round, -(-most // slots), args)

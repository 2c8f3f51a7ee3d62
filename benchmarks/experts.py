"""Forward and backward at 8 and at 128 experts of equal active size, as a ratio of one run.

    python benchmarks/experts.py [--rounds=9]

Prints, for float32 and bfloat16, the routed experts alone and a whole Llama 4 layer (attention,
router, routed and shared expert): 4096 tokens, top-1, width 512, expert width 704, medians of
rounds that alternate between the two. With 16 times the experts the weights and their gradient
are 16 times the memory traffic (1.7 GB a step in float32); the arithmetic is the same.
"""

import argparse
import os
import statistics
import sys
import time

# Huge pages for the gradients, which are fresh memory every step: glibc reads it at start only.
if "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.argv])

import jax
import jax.numpy as jnp

from puna.configs.schema import ModelConfig
from puna.models import sharding
from puna.models.experts import Routing, swiglu_experts
from puna.models.masks import default_tokens
from puna.models.transformer import Layer

B, T, D, F = 8, 512, 512, 704
FEW, MANY = 8, 128


def experts_step(num_experts, dtype):
    """Jitted gradient of the routed experts alone, and its arguments."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(num_experts, D, F), (num_experts, D, F), (num_experts, F, D)]
    weights = [
        jax.random.normal(k, s) * s[1] ** -0.5 for k, s in zip(keys[:3], shapes, strict=True)
    ]
    x_TD = jax.random.normal(keys[3], (B * T, D), dtype)
    expert_M = jax.random.randint(keys[4], (B * T,), 0, num_experts)
    scale_M = jax.random.uniform(keys[5], (B * T,))

    @jax.jit
    def step(x_TD, scale_M, weights):
        def loss(x_TD, scale_M, weights):
            routing = Routing(jnp.arange(B * T), expert_M, input_scale_M=scale_M)
            y_TD, _ = swiglu_experts(x_TD, routing, *weights, dtype=dtype)
            return jnp.sum(y_TD.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(x_TD, scale_M, weights)

    return step, (x_TD, scale_M, weights)


def layer_step(num_experts, dtype):
    """Jitted gradient of one layer of the model, and its arguments."""
    config = ModelConfig(
        embed_dim=D, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=64,
        moe_interval=1, num_experts=num_experts, expert_dim=F, compute_dtype=dtype,
    )  # fmt: skip
    layer, tokens = Layer(config, 0), default_tokens((B, T))
    x_BTD = jax.random.normal(jax.random.key(0), (B, T, D), dtype)
    params = jax.jit(lambda x: layer.init(jax.random.key(1), x, tokens, None))(x_BTD)
    params = sharding.unbox(params)

    @jax.jit
    def step(params, x_BTD):
        def loss(params, x_BTD):
            y_BTD = layer.apply(params, x_BTD, tokens, None)[0]
            return jnp.sum(y_BTD.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1))(params, x_BTD)

    return step, (params, x_BTD)


def compare(make, dtype, rounds):
    """Milliseconds a step at FEW and at MANY experts: medians of alternating runs."""
    steps = [make(num_experts, dtype) for num_experts in (FEW, MANY)]
    times = [[] for _ in steps]
    for _ in range(rounds + 1):
        for (step, arguments), taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]  # the first run compiles


def main():
    """Print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each size")
    rounds = parser.parse_args().rounds
    print(f"{'forward + backward':30}{FEW:>6} experts{MANY:>6} experts   ratio")
    for dtype in ("float32", "bfloat16"):
        for name, make in (("routed experts alone", experts_step), ("layer", layer_step)):
            few, many = compare(make, dtype, rounds)
            print(
                f"{name + ', ' + dtype:30}{few:11.0f} ms{many:11.0f} ms{many / few:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

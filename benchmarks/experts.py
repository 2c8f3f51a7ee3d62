"""Forward and backward at 8 and at 128 experts of equal active size, as a ratio of one run.

    python benchmarks/experts.py [--rounds=9]

Prints, for float32 and bfloat16, the routed experts alone and a whole Llama 4 layer (attention,
router, routed and shared expert): 4096 tokens, top-1, width 512, expert width 704, medians of
rounds that alternate between the two. The arithmetic is the same; weights and their gradient
are 16 times the memory (1.1 GB at 128 experts). Processor time is the ratio to read where other
programs share the machine.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from puna.configs.schema import ModelConfig
from puna.models.kernels.experts import Routing, swiglu_experts
from puna.models.masks import default_tokens
from puna.models.parallel import sharding
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
    params = jax.jit(lambda x: layer.init(jax.random.key(1), x, tokens, None, None))(x_BTD)
    params = sharding.unbox(params)

    @jax.jit
    def step(params, x_BTD):
        def loss(params, x_BTD):
            y_BTD = layer.apply(params, x_BTD, tokens, None, None)[0]
            return jnp.sum(y_BTD.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1))(params, x_BTD)

    return step, (params, x_BTD)


def compare(make, dtype, rounds):
    """Milliseconds of a step at FEW and MANY experts: medians of wall time, of processor time."""
    steps = [make(num_experts, dtype) for num_experts in (FEW, MANY)]
    times = [([], []) for _ in steps]
    for _ in range(rounds + 1):
        for (step, arguments), taken in zip(steps, times, strict=True):
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(step(*arguments))
            end = time.perf_counter(), time.process_time()
            for clock in range(2):
                taken[clock].append(1e3 * (end[clock] - start[clock]))
    # The first round compiles.
    return [[statistics.median(taken[clock][1:]) for taken in times] for clock in range(2)]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each size")
    rounds = parser.parse_args().rounds
    header = [f"{n} experts {what}" for what in ("wall ms", "cpu ms") for n in (FEW, MANY)]
    columns = [header[0], header[1], "ratio", header[2], header[3], "ratio"]
    print(f"{'forward + backward':31}" + "".join(f"{column:>21}" for column in columns))
    for dtype in ("float32", "bfloat16"):
        for name, make in (("routed experts alone", experts_step), ("layer", layer_step)):
            figures = ""
            for few, many in compare(make, dtype, rounds):
                figures += f"{few:21.0f}{many:21.0f}{many / few:21.2f}"
            print(f"{name + ', ' + dtype:31}{figures}", flush=True)


if __name__ == "__main__":
    main()

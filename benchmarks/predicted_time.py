"""Predict the time of training steps on a CPU core from the compiled program, then run them.

    python benchmarks/predicted_time.py

The time model of `puna plan` with rates that are measured here first: matrix products, additions,
transpositions, exponentials, new pages of memory, and what an operation costs by itself. One core,
in CPU seconds, so that other work on the machine disturbs little. Prints predicted / measured for
each of five configurations.
"""

import argparse
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

import puna
from puna.configs import schema
from puna.models.parallel import sharding
from puna.train import ahead
from puna.train.plan import program, timing

SHORT = ("train.batch_size=4", "data.seq_len=256")
CONFIGS = {
    "tiny": (),
    "tiny, AdamW, full remat": ("optimizer.name=adamw", "model.remat=full"),
    "tiny, 1024 tokens a row": ("data.seq_len=1024", "train.batch_size=2"),
    "tiny, 2 layers of width 512": (
        *("model.num_layers=2", "model.embed_dim=512", "model.num_heads=8"),
        *("model.head_dim=64", "model.num_kv_heads=4", "model.mlp_dim=1408"),
    ),
    "llama4:scout-tiny": SHORT,
}


def best(function, *inputs, tries: int) -> float:
    """CPU seconds of the fastest of some calls."""
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(tries):
        start = time.process_time()
        jax.block_until_ready(function(*inputs))
        times.append(time.process_time() - start)
    return min(times)


def measured(tries: int) -> timing.Rates:
    """What one core does in a CPU second, in operations like those of a step."""

    def seconds(function, *shapes):
        inputs = [jnp.full(shape, 0.01) for shape in shapes]
        return best(jax.jit(function), *inputs, tries=tries)

    product = seconds(lambda a, b: a @ b, (2048, 256), (256, 1024))
    rows = (8, 2, 3, 256, 256)
    elements = math.prod(rows)
    moved = seconds(lambda x, y: x + y, rows, rows)
    powers = seconds(jnp.exp, rows) - moved * 2 / 3
    turned = seconds(lambda x: x.T + 1, (elements // 512, 512)) - moved * 2 / 3
    chain = 300

    def small(x):
        for _ in range(chain):
            x = jnp.cumsum(x @ x, axis=0)
        return x

    start = seconds(small, (8, 8)) / chain / 2
    size = 2**28
    fresh = best(lambda: np.empty(size, np.int8).fill(1), tries=tries)
    return timing.Rates(
        flops=2 * 2048 * 256 * 1024 / product,
        bandwidth=12 * elements / moved,
        transcendental=elements / powers,
        strided=4 * elements / turned,
        fresh=size / fresh,
        overlaps=False,
        start=start,
    )


def main():
    """Measure rates, predict, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=10, help="calls of which the fastest counts")
    tries = parser.parse_args().tries
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX counts the cores
    jax.config.update("jax_platforms", "cpu")
    devices = ahead.devices("cpu-1")
    rates = measured(tries)
    print(
        f"{rates.flops / 1e9:.0f} GFLOP/s, {rates.bandwidth / 1e9:.1f} GB/s, transposed "
        f"{rates.strided / 1e9:.1f} GB/s, new pages {rates.fresh / 1e9:.1f} GB/s, "
        f"{rates.transcendental / 1e9:.2f}e9 exponentials/s, "
        f"{rates.start * 1e6:.2f} us an operation"
    )
    print("| configuration | predicted | measured | predicted / measured |\n|---|---|---|---|")
    for name, overrides in CONFIGS.items():
        base = name if name.startswith("llama") else "tiny"
        config = schema.from_dict(puna.get_config(base, list(overrides)))
        compiled = ahead.compile_step(config, devices)
        mesh = sharding.make_mesh(config.mesh, devices)
        found = program.Program(compiled.as_text(), 1)
        temporaries = ahead.memory(compiled).temporaries
        times = timing.measure(found, timing.Links(mesh, None), rates, temporaries)
        took = real(compiled, ahead.abstract_inputs(config, mesh), tries)
        print(
            f"| {name} | {times.seconds * 1e3:.0f} ms | {took * 1e3:.0f} ms "
            f"| {times.seconds / took:.2f} |", flush=True,
        )  # fmt: skip


def real(step, inputs, tries: int) -> float:
    """Seconds of the fastest of some steps on a state and a batch of small numbers."""
    state, batch = jax.tree.map(
        lambda x: jax.device_put(np.full(x.shape, 0.01).astype(x.dtype), x.sharding), inputs
    )
    state, _ = jax.block_until_ready(step(state, batch))
    times = []
    for _ in range(tries):
        start = time.process_time()
        state, _ = jax.block_until_ready(step(state, batch))
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()

"""Compile time of a training step at 8 and at 96 layers, as a ratio of one run.

    python benchmarks/compile_depth.py [--rounds=3]

Layers are scanned in blocks of one period, so the ratio should be near 1. Prints medians of
rounds that alternate between the two depths, with the compile cache off.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from puna.configs import get_config, schema
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params
from puna.train import objectives
from puna.train.optimizer import make_optimizer
from puna.train.state import abstract_state
from puna.train.step import make_train_step


def compile_seconds(config, num_layers: int) -> float:
    """Seconds to trace, lower and compile the step, nothing computed."""
    model = dataclasses.replace(config.model, num_layers=num_layers)
    config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(config.mesh)
    tx = make_optimizer(config, abstract_params(model))
    state = abstract_state(config, tx, mesh)
    shape = (config.train.batch_size, config.data.seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    names = ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT")
    batch = dict.fromkeys(names, ids)
    batch["weights_BT"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    step = make_train_step(
        config, Transformer(model), tx, objectives.make(config, jnp.ones(model.vocab_size)), state
    )
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        step.lower(state, batch).compile()
        return time.perf_counter() - began


def main():
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", default="llama4:scout-tiny")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    config = schema.from_dict(get_config(args.config))
    seconds = {8: [], 96: []}
    for _ in range(args.rounds):
        for depth, times in seconds.items():
            times.append(compile_seconds(config, depth))
    few, many = (statistics.median(times) for times in seconds.values())
    print(f"{args.config}: 8 layers {few:.1f} s, 96 layers {many:.1f} s, ratio {many / few:.2f}")


if __name__ == "__main__":
    main()

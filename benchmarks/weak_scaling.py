"""Memory of one device while devices and batch grow together: it should stay flat.

    pip install -e '.[tpu]'
    python benchmarks/weak_scaling.py [--config=llama3:3.2-1b] [--devices=8,64,512] [--grow=data]

Each row compiles the whole training step for a v5p slice of so many chips with one row of 8192
tokens a chip, two ways: `data` grows over parameters split eight ways (`fsdp=8`), and `fsdp`
grows, where each chip holds ever less of the state and as much of all else.
"""

import argparse
import dataclasses
import os

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

from puna.configs import get_config, schema
from puna.train import ahead


def scaled(config: schema.Config, **axes) -> schema.Config:
    """The configuration on these mesh axes, one row a device."""
    mesh = dataclasses.replace(schema.MeshConfig(), **axes)
    rows = mesh.data * mesh.fsdp
    train = dataclasses.replace(config.train, batch_size=rows, microbatches=1, compiler_options="")
    return dataclasses.replace(config, mesh=mesh, train=train)


def axes_of(count: int, grow: str) -> dict[str, int]:
    """Mesh axes of `count` devices, of which 8 are no more than the start."""
    return {"data": count // 8, "fsdp": 8} if grow == "data" else {"data": 1, "fsdp": count}


def main():
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="llama3:3.2-1b")
    parser.add_argument("--devices", default="8,64,512")
    parser.add_argument("--grow", default="data,fsdp")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    config = schema.from_dict(get_config(args.config))
    print("| chips | grows | mesh | state, GiB | the rest, GiB | peak, GiB | peak / first |")
    print("|---|---|---|---|---|---|---|", flush=True)
    first = None
    for count in map(int, args.devices.split(",")):
        devices = ahead.devices(f"v5p-{2 * count}")
        for grow in args.grow.split(",") if count > 8 else ["both"]:
            axes = axes_of(count, grow)
            memory = ahead.memory(ahead.compile_step(scaled(config, **axes), devices))
            first = first or memory.peak
            sizes = (memory.arguments, memory.peak - memory.arguments, memory.peak)
            state, rest, peak = (size / 2**30 for size in sizes)
            print(
                f"| {count} | {grow} | data={axes['data']} fsdp={axes['fsdp']} | {state:.2f} "
                f"| {rest:.2f} | {peak:.2f} | {memory.peak / first:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

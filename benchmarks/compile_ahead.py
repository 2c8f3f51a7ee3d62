"""Compile a configuration's whole training step for TPUs or GPUs that are not here: does it fit?

    pip install -e '.[tpu]'   # for TPUs; '.[cuda]' for GPUs. No TPU, GPU or driver is needed.
    python benchmarks/compile_ahead.py --config=llama3:3.1-8b --topology=v5p-32 \
      --config.mesh.fsdp=16 --config.mesh.data=1 --config.train.batch_size=16

Prints seconds to lower and to compile, and the bytes that one device needs, by kind, against its
memory. Exit status 1 if it does not fit. `--json=FILE` writes the same as JSON.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

from puna.configs import errors, get_config, schema
from puna.train import ahead


def measure(config: schema.Config, topology: str) -> dict:
    """Seconds and bytes of one compile; `verdict` is the compiler's word if it refused."""
    devices = ahead.devices(topology)
    began = time.perf_counter()
    lowered = ahead.lower_step(config, devices)
    middle = time.perf_counter()
    facts = {"topology": topology, "devices": len(devices), "limit": ahead.memory_limit(topology)}
    facts["lower_seconds"] = round(middle - began, 1)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        return facts | {"fits": False, "verdict": str(e).splitlines()[0]}
    facts["compile_seconds"] = round(time.perf_counter() - middle, 1)
    memory = ahead.memory(compiled)
    return facts | {"fits": memory.peak <= facts["limit"]} | dataclasses.asdict(memory)


def main():
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="NAME[:VARIANT]")
    parser.add_argument("--topology", required=True, help="such as v5p-256, 2xv5p-64, h100-8")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args, rest = parser.parse_known_args()
    # A program for a TPU is of no use to any other run.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        config = get_config(args.config, [text.removeprefix("--config.") for text in rest])
        facts = {"config": args.config, "overrides": rest}
        facts |= measure(schema.from_dict(config), args.topology)
    except errors.UserError as e:
        sys.exit(f"compile_ahead: {e}")
    for name, value in facts.items():
        big = name in ("limit", *(f.name for f in dataclasses.fields(ahead.Memory)))
        print(f"{name:16} {f'{value / 2**30:.2f} GiB' if big else value}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    sys.exit(0 if facts["fits"] else 1)


if __name__ == "__main__":
    main()

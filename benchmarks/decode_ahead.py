"""Compile the engine of `puna serve` for TPUs or GPUs that are not here: does it fit?

    pip install -e '.[tpu]'   # for TPUs; '.[cuda]' for GPUs. No TPU, GPU or driver is needed.
    python benchmarks/decode_ahead.py --config=llama3:3.1-8b --topology=h100-1 \
      --slots=32 --max_length=4096 [--quantize=int8 --cache_dtype=int8 --config.mesh.tensor=8]

Two programs: the largest piece of a prompt, and one token of every slot. Prints seconds to compile
each, and the bytes that one device needs, by kind, against its memory. Exit status 1 if it does not
fit. `--json=FILE` writes the same as JSON.
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
from puna.models.decode import ahead as engine_ahead
from puna.models.parallel import sharding
from puna.train import ahead


def measure(config: schema.Config, args) -> dict:
    """Bytes of one device; of each program `verdict` is the compiler's word if it refused it."""
    devices = ahead.devices(args.topology)
    model = dataclasses.replace(config.model, param_dtype="bfloat16", compute_dtype="bfloat16")
    mesh = sharding.make_mesh(config.mesh, devices)
    params, cache = engine_ahead.abstract_inputs(
        model, mesh, args.slots, args.max_length, args.quantize, args.cache_dtype
    )
    programs = engine_ahead.lower(model, mesh, params, cache, args.max_length)
    limit = ahead.memory_limit(args.topology)
    facts = {"devices": len(devices), "limit": limit, "fits": True}
    facts["params_bytes"] = sharding.bytes_per_device(params)
    facts["cache_bytes"] = sharding.bytes_per_device(cache)
    for name, lowered in programs._asdict().items():
        began = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            facts |= {"fits": False, f"{name}_verdict": str(e).splitlines()[0]}
            continue
        memory = ahead.memory(compiled)
        facts[f"{name}_compile_seconds"] = round(time.perf_counter() - began, 1)
        facts[f"{name}_temporaries_bytes"] = memory.temporaries
        facts[f"{name}_peak_bytes"] = memory.peak
        facts["fits"] &= memory.peak <= limit
    return facts


def main():
    """Compile and print."""
    parser = argparse.ArgumentParser(description="see the top of the file")
    parser.add_argument("--config", required=True, help="NAME[:VARIANT]")
    parser.add_argument("--topology", required=True, help="such as v5e-64, h100-1")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--quantize", default="", help="weights: int8, int4 or nf4; else bfloat16")
    parser.add_argument("--cache_dtype", default="", help="keys and values: int8, float8_e4m3fn")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args, rest = parser.parse_known_args()
    # A program for a TPU is of no use to any other run.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        config = get_config(args.config, [text.removeprefix("--config.") for text in rest])
        facts = {"config": args.config, "overrides": rest}
        facts |= measure(schema.from_dict(config), args)
    except errors.UserError as e:
        sys.exit(f"decode_ahead: {e}")
    for name, value in facts.items():
        big = name == "limit" or name.endswith("_bytes")
        print(f"{name:26} {f'{value / 2**30:.2f} GiB' if big else value}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    sys.exit(0 if facts["fits"] else 1)


if __name__ == "__main__":
    main()

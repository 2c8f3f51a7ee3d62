"""The demo trained in bfloat16, float8 and int8: how far the losses lie apart.

    python benchmarks/eight_bits.py [--steps=300 --kinds=float8,int8 --experts=0]
    python benchmarks/eight_bits.py --topology=h100-1   # what a GPU or TPU would multiply

Trains `--config=tiny` once with each `model.compute_dtype`, from the same parameters on the same
batches, and prints the mean loss of each tenth of the steps, the loss of validation, and how much
more than bfloat16's the worst of them is. `--experts=E` puts E experts, top-1, in every layer.
With `--topology` nothing is trained: it compiles the step of a wider model for hardware that is not
here and counts the program's matrix products and kernels, by the dtypes of what they multiply, and
its loops (over layers, and over parts of the loss). On a CPU 8 bits are slower than bfloat16: their
time is not printed.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

import puna
from puna.configs import schema
from puna.train import ahead
from puna.train.plan.program import Program

PARTS = 10
WIDE = {"embed_dim": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "mlp_dim": 1408}


def config_of(kind: str, steps: int, experts: int):
    """The demo's, in a compute_dtype."""
    config = puna.get_config("tiny")
    config.model.compute_dtype = kind
    if experts:
        config.model.update(moe_interval=1, num_experts=experts, expert_dim=config.model.mlp_dim)
    config.train.update(steps=steps, log_every=1, eval_every=steps, save_every=steps)
    return config


def losses(config, workdir: pathlib.Path) -> list[float]:
    """Means of the parts of a run, and the last validation."""
    with contextlib.redirect_stdout(sys.stderr):
        puna.train(config, workdir)
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    each = [x["loss"] for x in lines if "loss" in x]
    size = len(each) // PARTS
    means = [statistics.mean(each[i * size : (i + 1) * size]) for i in range(PARTS)]
    return [*means, next(x["validation_loss"] for x in reversed(lines) if "validation_loss" in x)]


def compare(kinds: list[str], steps: int, experts: int):
    """Train with each and print the table."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("bfloat16", *kinds):
            found[kind] = losses(config_of(kind, steps, experts), pathlib.Path(folder) / kind)
    ends = [f"{(i + 1) * steps // PARTS}" for i in range(PARTS)]
    print(f"| loss to step | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for end, row in zip([*ends, "validation"], zip(*found.values(), strict=True), strict=True):
        print(f"| {end} | {' | '.join(f'{x:.4f}' for x in row)} |")
    for kind in kinds:
        pairs = list(zip(found[kind], found["bfloat16"], strict=True))
        most = max(a / b - 1 for a, b in pairs)
        print(f"{kind}: at most {most:+.2%}; validation {pairs[-1][0] / pairs[-1][1] - 1:+.2%}")


def products(text: str, devices: int) -> collections.Counter:
    """The products of an optimized program by the dtypes of their operands."""
    program, found = Program(text, devices), collections.Counter()
    for ops in program.computations.values():
        for op in ops:
            is_call = op.code == "custom-call"
            kernel = is_call and re.search("tpu_custom_call|triton|cublas", op.rest)
            if op.code in ("dot", "convolution") or kernel:
                kinds = (program.types.get(x, "").partition("[")[0] for x in op.operands[-2:])
                own = re.search(r"/(\w+)/pallas_call", op.rest) if kernel else None
                name = own[1] if own else "kernel" if kernel else "product"
                found[f"{name} of {', '.join(sorted({*kinds}))}"] += 1
            elif op.code == "while":
                found["loop"] += 1
    return found


def compiled(topology: str, kinds: list[str], experts: int):
    """Compile the step with each and print what it multiplies."""
    jax.config.update("jax_enable_compilation_cache", False)
    devices = ahead.devices(topology)
    for kind in ("bfloat16", *kinds):
        config = config_of(kind, 300, experts)
        config.model.update(WIDE | ({"expert_dim": WIDE["mlp_dim"]} if experts else {}))
        config.optimizer.update(name="adamw", learning_rate=1e-3)  # Muon has products of its own
        config.mesh.update(data=1, fsdp=len(devices))
        config.data.update(tokenizer="bytes", seq_len=1024)
        config.train.batch_size = 8 * len(devices)
        text = ahead.compile_step(schema.from_dict(config), devices).as_text()
        print(f"{topology}, {kind}:")
        for name, count in sorted(products(text, len(devices)).items()):
            print(f"  {count:3} {name}")


def main():
    """Train, or compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--kinds", default="float8,int8", help="beside bfloat16")
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0 = dense")
    parser.add_argument("--topology", default="", help="such as h100-1 or v6e-4: compile alone")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if args.topology:
        compiled(args.topology, kinds, args.experts)
    else:
        compare(kinds, args.steps, args.experts)


if __name__ == "__main__":
    main()

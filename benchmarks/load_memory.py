"""Peak host memory of loading a checkpoint, beyond the bytes that the devices keep.

    python benchmarks/load_memory.py [--gigabytes=2] [--shards=8] [--devices=8]

Writes a random bfloat16 checkpoint of Llama's shape, loads it in a process of its own onto
simulated devices that split it (`mesh.fsdp`), and prints the high-water mark of that process' own
memory: `VmHWM` with the file's pages, which the system can take back, and the sampled peak of
`RssAnon` without them. Linux only.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

VOCAB, DIM, MLP, HEADS, KV = 32000, 2048, 8192, 32, 8


def config_json(gigabytes: float) -> dict:
    """A Llama of about that size in bfloat16."""
    layer = DIM * (DIM + DIM * KV // HEADS) * 2 + 3 * DIM * MLP
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCAB * DIM) / layer))
    return {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": MLP,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    }  # fmt: skip


def write(folder: pathlib.Path, config: dict, shards: int) -> None:
    """Write the checkpoint, one shard after another."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from puna.configs import schema
    from puna.models.weights import config as hf_config
    from puna.models.weights import huggingface

    (folder / "config.json").write_text(json.dumps(config))
    model = schema.from_dict(hf_config.from_hf(config), schema.ModelConfig)
    shapes = huggingface.hf_shapes(model)
    total, place, shard = 2 * sum(map(math.prod, shapes.values())), {}, {}
    rng = np.random.default_rng(0)
    number, size = 1, 0

    def flush():
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(shard, folder / name)
        place.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        if size >= total * number / shards and number < shards:
            flush()
            number += 1
        bits = rng.integers(0x3C00, 0x3E00, size=shape, dtype=np.uint16)
        shard[name] = bits.view(ml_dtypes.bfloat16)
        size += 2 * int(np.prod(shape))
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def status(field: str) -> int:
    """A figure of this process in bytes, from /proc."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(folder: str, devices: int, dtype: str) -> None:
    """Load and print what it took; runs in the process that the figures are of."""
    import jax

    import puna
    from puna.configs import schema
    from puna.models.parallel import sharding

    mesh = sharding.make_mesh(schema.MeshConfig(data=1, fsdp=devices))
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
    before, peak, done = status("RssAnon"), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], status("RssAnon"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    _, params = puna.load(folder, dtype=dtype, mesh=mesh)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    own = sum(x.nbytes for x in jax.tree.leaves(params))
    leaves = jax.tree.leaves_with_path(params)
    # A scanned leaf is as many tensors of the file as it has layers.
    largest = max(
        x.nbytes // (x.shape[0] if "blocks" in sharding.path_name(p) else 1) for p, x in leaves
    )
    beyond = peak[0] - before - own
    print(f"  read and placed        {own / 1e9:8.3f} GB on {devices} devices in {seconds:.1f} s")
    print(f"  largest tensor         {largest / 1e9:8.3f} GB")
    print(
        f"  peak beyond the model  {beyond / 1e9:8.3f} GB = {beyond / largest:.2f} of the largest"
    )
    print(f"  peak with file pages   {(status('VmHWM') - before) / 1e9:8.3f} GB")


def main() -> None:
    """Write the checkpoint and start the measured process for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--measure", help="used by itself: folder and dtype")
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure.split(",")[:1], args.devices, args.measure.split(",")[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        config = config_json(args.gigabytes)
        write(pathlib.Path(folder), config, args.shards)
        total = sum(p.stat().st_size for p in pathlib.Path(folder).glob("*.safetensors"))
        print(f"{total / 1e9:.2f} GB in {args.shards} shards, bfloat16")
        for dtype in ("bfloat16", "float32"):
            print(f"loaded as {dtype}:")
            flags = f"--xla_force_host_platform_device_count={args.devices}"
            subprocess.run(
                [sys.executable, __file__, f"--measure={folder},{dtype}",
                 f"--devices={args.devices}"],
                env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                check=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()

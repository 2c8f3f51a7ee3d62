"""What checkpoints cost: host memory while restoring, and the time that saving holds a run up.

    python benchmarks/checkpoints.py [--gigabytes=2] [--devices=8]
    python benchmarks/checkpoints.py --config=tiny [--config.train.save_every=100 ...]

The first saves a random state of that size (parameters and two moments, in float32) and restores it
in a process of its own, whose memory is sampled: what `RssAnon` rises to beyond the state itself.
It restores again with one read at a time, for the time that several in flight save.
The second trains, and prints what part of its time after the first step went into `save`: waiting
for the step, the checksums, the copy to the host, and for the save before it. Linux only.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

VOCAB, DIM, MLP, HEADS, KV = 16384, 1024, 4096, 16, 4


def experiment(gigabytes: float, devices: int):
    """A Llama whose state in training has about that size."""
    from puna.configs import base

    layer = DIM * (DIM + DIM * KV // HEADS) * 2 + 3 * DIM * MLP
    layers = max(1, round((gigabytes * 1e9 / 12 - 2 * VOCAB * DIM) / layer))
    config = base.get_config()
    config.model.update(vocab_size=VOCAB, embed_dim=DIM, mlp_dim=MLP, num_layers=layers,
                        num_heads=HEADS, num_kv_heads=KV, head_dim=DIM // HEADS)  # fmt: skip
    config.mesh.update(data=1, fsdp=devices)
    return config


def rss() -> int:
    """Bytes of this process's own memory that are in use."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise KeyError("RssAnon")


def state_memory(action: str, folder: str, gigabytes: float, devices: int) -> None:
    """Save a random state or restore it; runs in the process that the figures are of."""
    import jax

    from puna.configs import schema
    from puna.models.parallel import sharding
    from puna.models.transformer import abstract_params
    from puna.models.weights import stored
    from puna.train.checkpoint import Checkpoints
    from puna.train.optimizer import make_optimizer
    from puna.train.state import abstract_state, init_state

    jax.config.update("jax_num_cpu_devices", devices)
    c = schema.from_dict(experiment(gigabytes, devices))
    mesh = sharding.make_mesh(c.mesh)
    tx = make_optimizer(c, abstract_params(c.model))
    places = abstract_state(c, tx, mesh)
    with Checkpoints(pathlib.Path(folder), c, {}) as checkpoints:
        if action == "save":
            state = init_state(c, tx, mesh)
            # Moments of zero are stored as nothing.
            moments = jax.tree.map(
                lambda x: (
                    x
                    if x.ndim == 0
                    else x + jax.numpy.sin(jax.numpy.arange(x.size, dtype=x.dtype)).reshape(x.shape)
                ),
                state.opt_state,
            )
            state = state.replace(opt_state=moments)
            start = time.perf_counter()
            checkpoints.save(state, c.train.steps, {})
            held = time.perf_counter() - start
            checkpoints.wait()
            total = time.perf_counter() - start
            print(f"  save returned after    {held:8.2f} s, all was written after {total:.2f} s")
            return
        if action == "restore one by one":
            stored._LEAST_BYTES = stored._MOST_BYTES = stored._PIECE_BYTES
        before, peak, done = rss(), [0], threading.Event()

        def watch():
            while not done.is_set():
                peak[0] = max(peak[0], rss())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        state, _ = checkpoints.restore(places)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        own = sum(x.nbytes for x in jax.tree.leaves(state))
        largest = max(x.nbytes for x in jax.tree.leaves(state))
        beyond = peak[0] - before - own
        print(f"  restored               {own / 1e9:8.3f} GB on {devices} devices, {seconds:.1f} s")
        print(f"  largest tensor         {largest / 1e9:8.3f} GB")
        print(f"  peak beyond the state  {beyond / 1e9:8.3f} GB = {beyond / largest:.2f} of it")


def blocking(arguments: list[str]) -> None:
    """Train as `puna train` does and print what part of the time `save` took."""
    from puna import __main__ as cli
    from puna.train import loop
    from puna.train.checkpoint import Checkpoints

    took = []

    class Timed(Checkpoints):
        def save(self, *args):
            start = time.perf_counter()
            super().save(*args)
            took.append(time.perf_counter() - start)

    loop.Checkpoints = Timed
    with tempfile.TemporaryDirectory() as folder:
        cli._run(["train", *arguments, f"--workdir={folder}"])
        seconds = json.loads((pathlib.Path(folder) / "goodput.json").read_text())["seconds"]
    total = sum(seconds[kind] for kind in ("step", "input_wait", "save", "evaluation"))
    each = ", ".join(f"{t:.2f}" for t in took)
    print(f"{len(took)} saves held the run up for {each} s: {100 * sum(took) / total:.1f} % of "
          f"{total:.1f} s")  # fmt: skip


def main() -> None:
    """Run one or the other."""
    if any(argument.startswith("--config") for argument in sys.argv):
        blocking(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--action", help="used by itself: what to do, and the folder")
    args = parser.parse_args()
    if args.action:
        action, folder = args.action.split(",")
        state_memory(action, folder, args.gigabytes, args.devices)
        return
    with tempfile.TemporaryDirectory() as folder:
        for action in ("save", "restore", "restore one by one", "restore", "restore one by one"):
            print(action, flush=True)
            subprocess.run(
                [sys.executable, __file__, f"--action={action},{folder}",
                 f"--gigabytes={args.gigabytes}", f"--devices={args.devices}"], check=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()

"""Kill a run at random moments until it is done, and compare it with one that was left alone.

    python benchmarks/kill_anywhere.py [--kills=20] [--steps=60] [--processes=1] [--experts=0]

Each time the same command is started again. SIGKILL may hit anything: start-up, compiling, a step,
a save, the removal of an old checkpoint. At the end every loss and every array of the last
checkpoint must be the same, bit for bit; prints where the kills hit and how much was done twice.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

CONFIG = """
from puna.configs import base

def get_config():
    config = base.get_config()
    config.model.update(vocab_size=264, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2,
                        head_dim=16, mlp_dim=128, compute_dtype="float32")
    if {experts}:
        config.model.update(moe_interval=2, num_experts={experts}, expert_dim=64,
                            bias_update_rate=0.01, load_balance_weight=0.01)
    config.data.update(train="{folder}/*.txt", validation="", seq_len=64)
    config.optimizer.update(warmup_steps=2)
    config.train.update(steps={steps}, batch_size=8, log_every=1, save_every=6, eval_every=0,
                        spike_factor=9.0, local_dir="{folder}/local", local_every=2)
    return config
"""


def start(folder: pathlib.Path, workdir: pathlib.Path, processes: int) -> subprocess.Popen:
    """The run, as a process group of its own."""
    train = ["train", f"--config={folder}/experiment.py", f"--workdir={workdir}"]
    if processes > 1:
        train = ["launch", f"-n={processes}", "--", *train]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "puna", *train]
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)


def wait(process: subprocess.Popen, seconds: float) -> None:
    """For so long, or until the process has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Step -> loss, as far as the run has got."""
    from puna.train import metrics

    return {m["step"]: m["loss"] for m in metrics.read(workdir / "metrics.jsonl")}


def checksums(workdir: pathlib.Path) -> dict:
    """Of every array in the newest checkpoint."""
    from puna.models.weights import run

    return run.read_meta(run.find(workdir))["checksums"]


def main() -> None:
    """Run once in peace and once not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--experts", type=int, default=0, help="0 = a dense model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        text = CONFIG.format(folder=folder, steps=args.steps, experts=args.experts)
        (folder / "experiment.py").write_text(text)
        for i in range(6):
            (folder / f"{i}.txt").write_text(f"llama {i} walks over the puna. " * 40)
        whole, cut = folder / "whole", folder / "cut"
        began = time.monotonic()
        process = start(folder, whole, args.processes)
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
        alone = time.monotonic() - began
        print(f"left alone: {args.steps} steps in {alone:.1f} s", flush=True)
        hits, kills = [], 0
        while True:
            process = start(folder, cut, args.processes)
            if kills < args.kills:
                if rng.random() < 0.2:
                    wait(process, rng.uniform(0, alone / 2))
                else:
                    # Some steps on from where it was, and then at any moment of a step or a save.
                    goal = max(losses(cut), default=0) + rng.randint(1, 8)
                    while process.poll() is None and max(losses(cut), default=0) < goal:
                        time.sleep(0.01)
                    wait(process, rng.uniform(0, 0.3))
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills += 1
                    hits.append(max(losses(cut), default=0))
                    continue
            _, said = process.communicate()
            assert process.returncode == 0, said.decode()
            break
        print(f"killed {kills} times, after steps {hits}")
        a, b = losses(whole), losses(cut)
        same = a == b and len(a) == args.steps and checksums(whole) == checksums(cut)
        aside = [p.name for p in (cut / "checkpoints").iterdir() if "." in p.name]
        print(json.dumps({"kills": kills, "bit_identical": same, "set_aside": aside}))
        if not same:
            missing = sorted(a.keys() ^ b.keys())
            other = [step for step in a if step in b and a[step] != b[step]]
            print(f"steps missing: {missing}; other losses at {other}")
            sys.exit(1)


if __name__ == "__main__":
    main()

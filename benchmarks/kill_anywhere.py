"""Kill a run at random moments until it is done, and compare it with one that was left alone.

    python benchmarks/kill_anywhere.py [--kills=20] [--steps=120] [--processes=1] [--experts=0]
        [--bucket=gs://BUCKET]

Each time the same command is started again. SIGKILL may hit anything: start-up, compiling, a step,
a save, the removal of an old checkpoint; of several processes all or one. After each kill every
array of the newest checkpoint must be, bit for bit, what the run left alone had after that step; so
must be every loss and the last checkpoint at the end. If that comes before all kills, there is
another run. With --bucket the runs that are killed have their folders there, and no local disk.
"""

import argparse
import json
import os
import pathlib
import random
import secrets
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


def start(folder: pathlib.Path, workdir: pathlib.Path, processes: int, *more) -> subprocess.Popen:
    """The run, as a process group of its own."""
    train = ["train", f"--config={folder}/experiment.py", f"--workdir={workdir}", *more]
    if processes > 1:
        train = ["launch", f"-n={processes}", "--", *train]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "puna", *train]
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)


def end(process: subprocess.Popen) -> None:
    """Until a run has ended, as it should."""
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


def wait(process: subprocess.Popen, seconds: float) -> None:
    """For so long, or until the process has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Step -> loss, as far as the run has got."""
    from puna.train import metrics

    return {m["step"]: m["loss"] for m in metrics.read(workdir / "metrics.jsonl")}


def at(workdir: pathlib.Path) -> int:
    """The last step that a run has written down."""
    return max(losses(workdir), default=0)


def strike(process: subprocess.Popen, workdir, first: float, processes: int, rng) -> bool:
    """Kill all processes of a run or one, at some moment; False if the run ends before.

    Args:
      first: seconds that a run takes until its first step.
    """
    if rng.random() < 0.2:
        wait(process, rng.uniform(0, first))
    else:
        # Some steps on from where it was, and then at any moment of a step or a save.
        goal = at(workdir) + rng.randint(1, 8)
        while process.poll() is None and at(workdir) < goal:
            time.sleep(0.01 if isinstance(workdir, pathlib.Path) else 0.2)
        wait(process, rng.uniform(0, 0.3))
    if process.poll() is not None:
        return False
    launched = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    one = rng.randrange(-1, processes) if processes > 1 else -1
    if 0 <= one < len(launched):
        os.kill(int(launched[one]), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def newest(*workdirs: pathlib.Path) -> tuple[int, pathlib.Path | None]:
    """The newest checkpoint in some folders and its step; 0 and None where there is none."""
    from puna.models.weights import run

    found = [(step, run.find(workdir, step)) for workdir in workdirs for step in run.steps(workdir)]
    return max(found, default=(0, None))


def checksums(checkpoint: pathlib.Path) -> dict:
    """Of every array in it."""
    from puna.models.weights import run

    return run.read_meta(checkpoint)["checksums"]


def alike(whole: pathlib.Path, cut: pathlib.Path, *also: pathlib.Path) -> tuple[int, bool]:
    """Step of the newest checkpoint of a run, and whether the other run had the same after it."""
    step, found = newest(cut, *also)
    return step, found is None or checksums(found) == checksums(whole / "checkpoints" / str(step))


def main() -> None:
    """Run once in peace, and then not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--experts", type=int, default=0, help="0 = a dense model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", default="", help="gs://BUCKET for the runs that are killed")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        text = CONFIG.format(folder=folder, steps=args.steps, experts=args.experts)
        (folder / "experiment.py").write_text(text)
        for i in range(6):
            (folder / f"{i}.txt").write_text(f"llama {i} walks over the puna. " * 40)
        whole = folder / "whole"
        # Keeps a checkpoint of each step that the others may be found at.
        keep = (f"--config.train.keep={args.steps}", "--config.train.save_every=2")
        began = time.monotonic()
        alone = ("--config.train.local_dir=", "--config.train.local_every=50")
        process = start(folder, whole, args.processes, *keep, *alone)
        while process.poll() is None and not losses(whole):
            time.sleep(0.05)
        first = time.monotonic() - began
        end(process)
        print(f"left alone: {args.steps} steps, the first after {first:.1f} s", flush=True)
        homes, there = folder, ()
        if args.bucket:
            from puna.configs import storage

            homes = storage.at(f"{args.bucket}/{secrets.token_hex(4)}")
            there = (*alone, "--config.train.save_every=2")
        kills = same = runs = 0
        same_ends, aside = True, []
        while kills < args.kills:
            runs += 1
            cut = homes / f"cut{runs}"
            local = [] if args.bucket else [folder / "local" / cut.relative_to("/")]
            process = start(folder, cut, args.processes, *there)
            while kills < args.kills and strike(process, cut, first, args.processes, rng):
                kills += 1
                step, well = alike(whole, cut, *local)
                same += well
                how = f"checkpoint {step} {'the same' if well else 'DIFFERS'}"
                print(f"kill {kills} after step {at(cut)}: {how}", flush=True)
                process = start(folder, cut, args.processes, *there)
            end(process)
            step, well = alike(whole, cut)
            well = well and step == args.steps and losses(cut) == losses(whole)
            print(f"run {runs} at its end: {'the same' if well else 'DIFFERS'}", flush=True)
            same_ends = same_ends and well
            aside += [p.name for p in (cut / "checkpoints").iterdir() if "." in p.name]
        print(f"{same} of {kills} kills left the same bits")
        found = {"kills": kills, "same": same, "bit_identical": same_ends, "set_aside": aside}
        print(json.dumps(found))
        sys.exit(0 if same_ends and same == kills else 1)


if __name__ == "__main__":
    main()
